"""slurm/stage.sbatch without a SLURM: what it tells scontrol, and when it gives up. (The rest: tests/slurm.)"""

import os
import subprocess

import pytest
from support import PROJECT

JOB = "JobId=12 JobState=RUNNING Requeue=1 Restarts={}"
KILLED = "kill -KILL $$"


@pytest.fixture
def script(tmp_path):
    """Runs the script as a job that SLURM has begun again so often, with another program for Python."""

    def run(restarts, python, *words, **environment):
        for name, lines in {
            "scontrol": f'echo "$@" >>{tmp_path}/asked\n[ "$2" != show ] || echo "{JOB.format(restarts)}"',
            "python": python,
        }.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{lines}\n")
            (tmp_path / name).chmod(0o755)
        (tmp_path / "asked").write_text("")
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PIPELINE_"))}
        variables |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "12", **environment}
        if restarts:
            variables["SLURM_RESTART_COUNT"] = str(restarts)
        script = str(PROJECT / "slurm/stage.sbatch")
        done = subprocess.run(["bash", script, *words], env=variables, cwd=tmp_path, capture_output=True, text=True)
        return done.returncode, (tmp_path / "asked").read_text().splitlines(), done.stderr

    return run


def test_a_launcher_that_is_killed_each_time_before_it_counts_is_given_up(script, tmp_path):
    for restarts in range(3):
        status, asked, _ = script(restarts, KILLED, "task", str(tmp_path))
        assert (status, asked[1:]) == (75, ["update JobId=12 Requeue=1", "requeue 12"])
    status, asked, said = script(3, KILLED, "task", str(tmp_path))
    assert (status, asked) == (4, ["--oneliner show job 12"])
    assert said.splitlines()[-1].endswith(
        "'python' was killed (status 137), as each time before; are run.memory_per_node and run.time enough?"
    )
    assert script(3, KILLED, "preflight", str(tmp_path))[0] == 4


def test_a_task_that_was_begun_counts_its_tries_itself(script, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work/tries.jsonl").write_text('{"share": "-00003", "done": []}\n')
    element = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}
    assert script(9, KILLED, "task", str(tmp_path), **element)[0] == 75
    assert script(9, KILLED, "task", str(tmp_path), **element | {"SLURM_ARRAY_TASK_ID": "4"})[0] == 4
    assert script(9, KILLED, "task", str(tmp_path))[0] == 4
    assert script(9, KILLED, "job=tiny")[0] == 75  # by hand
