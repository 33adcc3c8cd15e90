"""slurm/stage.sbatch without a SLURM: what it tells scontrol, and when it gives up. (The rest: tests/slurm.)"""

import os
import subprocess
import sys

import pytest
from support import PROJECT

JOB = "JobId=12 JobState=RUNNING Requeue=1 Restarts={}"
KILLED = "kill -KILL $$"
LOOK = "--oneliner show job 12"
AGAIN = ["update JobId=12 Requeue=1", "requeue 12"]
ELEMENT = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}


@pytest.fixture
def script(tmp_path):
    """Runs the script as a job that SLURM has begun again so often, with another program for Python.

    `told` is what scontrol says of the job, `scontrol` are lines of shell that it runs before.
    """

    def run(restarts, python, *words, told=JOB, scontrol="", **environment):
        for name, lines in {
            "scontrol": f'echo "$@" >>asked\n{scontrol}\n[ "$2" != show ] || echo "{told.format(restarts)}"',
            "sleep": 'echo "sleep $1" >>asked',
            "python": python,
        }.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{lines}\n")
            (tmp_path / name).chmod(0o755)
        (tmp_path / "asked").write_text("")
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PIPELINE_"))}
        variables |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "12"}
        variables |= {"PIPELINE_CODE": str(tmp_path)} if words[0] in ("task", "preflight") else {}
        if restarts:
            variables["SLURM_RESTART_COUNT"] = str(restarts)
        done = subprocess.run(
            ["bash", str(PROJECT / "slurm/stage.sbatch"), *words],
            env=variables | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        return done.returncode, (tmp_path / "asked").read_text().splitlines(), done.stderr

    return run


def test_a_launcher_that_is_killed_each_time_before_it_counts_is_given_up(script, tmp_path):
    for restarts in range(3):
        assert script(restarts, KILLED, "task", str(tmp_path))[:2] == (75, [LOOK, *AGAIN])
    status, asked, said = script(3, KILLED, "task", str(tmp_path))
    assert (status, asked) == (4, [LOOK])
    assert said.splitlines()[-1].endswith(
        "'python' was killed (status 137), as each time before; are its memory and time enough (run.memory_per_node, "
        "run.time; by hand --mem, --time)?"
    )
    assert script(3, KILLED, "preflight", str(tmp_path))[0] == 4
    assert script(2, KILLED, "job=tiny")[0] == 75
    assert script(3, KILLED, "job=tiny")[0] == 4


def test_a_task_that_was_begun_counts_its_tries_itself(script, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work/tries-00003.jsonl").write_text('{"done": []}\n')
    assert script(9, KILLED, "task", str(tmp_path), **ELEMENT)[0] == 75
    assert script(9, KILLED, "task", str(tmp_path), **ELEMENT | {"SLURM_ARRAY_TASK_ID": "4"})[0] == 4
    assert script(9, KILLED, "task", str(tmp_path))[0] == 4


def test_a_job_that_slurm_does_not_begin_again_has_failed(script, tmp_path):
    refused = '[ "$1" != requeue ] || { echo "Requested operation is presently disabled" >&2; exit 1; }'
    status, asked, said = script(0, KILLED, "task", str(tmp_path), scontrol=refused)
    assert (status, asked) == (4, [LOOK, *AGAIN])
    assert "presently disabled" in said
    assert said.splitlines()[-1].endswith(
        "'python' was killed (status 137), and SLURM does not begin this job again; submit it again (python -m "
        "pipeline retry)"
    )


def test_a_controller_that_is_restarted_is_waited_for(script, tmp_path):
    away = "[ $(grep -c show asked) -gt {} ] || exit 1"
    status, asked, _ = script(0, KILLED, "task", str(tmp_path), scontrol=away.format(2))
    assert (status, asked) == (75, [LOOK, "sleep 1", LOOK, "sleep 2", LOOK, *AGAIN])
    status, asked, said = script(0, KILLED, "task", str(tmp_path), scontrol=away.format(99))
    assert (status, asked.count(LOOK)) == (4, 8)
    assert said.splitlines()[-1].endswith("SLURM does not answer; submit it again (python -m pipeline retry)")


@pytest.mark.parametrize("told", [JOB.format(1), JOB.replace("RUNNING", "COMPLETING")])
def test_a_job_that_was_cancelled_or_comes_by_itself_is_left_alone(script, tmp_path, told):
    assert script(0, KILLED, "task", str(tmp_path), told=told)[:2] == (75, [LOOK])


SEEN = "env | grep -E '^SLURM_(ARRAY_|RESTART_)' | sort >seen"


def test_what_is_run_by_hand_is_not_the_job_in_which_somebody_said_sbatch(script, tmp_path):
    around = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "2"}
    assert script(0, f"{SEEN}; {KILLED}", "job=tiny", **around)[:2] == (75, [LOOK, LOOK, *AGAIN])
    assert (tmp_path / "seen").read_text() == "SLURM_RESTART_COUNT=0\n"


def test_an_element_of_an_array_by_hand_is_one(script, tmp_path):
    told = "JobId=13 ArrayJobId=12 ArrayTaskId=2 JobState=RUNNING Requeue=1 Restarts=0\n" + JOB.replace(
        "JobState", "ArrayJobId=12 ArrayTaskId=3 JobState"
    )
    status, asked, _ = script(1, f"{SEEN}; {KILLED}", "job=tiny", told=told, **ELEMENT)
    assert (status, asked[2:]) == (75, ["update JobId=12_3 Requeue=1", "requeue 12_3"])
    assert (tmp_path / "seen").read_text() == ("SLURM_ARRAY_JOB_ID=12\nSLURM_ARRAY_TASK_ID=3\nSLURM_RESTART_COUNT=1\n")


@pytest.mark.parametrize(
    ("words", "added"),
    [
        ("job=tiny root=a", ["run=slurm"]),
        ("--config-dir conf stage=clean", ["run=slurm"]),
        ("~tasks.export job=tiny", ["run=slurm"]),
        ("job=tiny run=h100_ib", []),
        ("verify artifacts/tokens", []),
        ("trace step=12 run=tiny.pretrain", []),
    ],
)
def test_only_jobs_and_stages_by_hand_get_a_launcher(script, tmp_path, words, added):
    assert script(0, 'echo "$@" >words', *words.split())[0] == 0
    assert (tmp_path / "words").read_text().split() == ["-m", "pipeline", *words.split(), *added]


def test_a_job_by_hand_that_is_told_to_stop_before_it_listens_is_begun_again(script):
    told = "m._run = lambda words: os.kill(os.getpid(), signal.SIGTERM)"  # as while it composes
    python = f"exec {sys.executable} -c 'import os, signal; import pipeline.__main__ as m; {told}; m.main()'"
    status, asked, said = script(0, python, "job=tiny", PYTHONPATH=str(PROJECT))
    assert (status, asked) == (75, [LOOK, *AGAIN])
    assert said.endswith("'python' was killed (status 143): this job is to begin again\n")


def test_code_that_is_not_there_is_said_with_both_reasons(script, tmp_path):
    status, _, said = script(0, "true", "task", str(tmp_path), PIPELINE_CODE="/nowhere/code")
    assert status == 4
    assert said.endswith(
        "there is no /nowhere/code here; root=DIR has to be on a disk that all nodes share, or it was deleted: start "
        "the job again\n"
    )
