"""Submission to a real SLURM: what the plan shows is what is done, all of it or nothing, and never twice."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from submitted import wait_until
from support import MODEL_TASKS, PROJECT, command, run_command, run_pipeline

from pipeline.launch.lock import locked

DATA = ("job=tiny", *(f"~tasks.{task}" for task in (*MODEL_TASKS, "report")))
DATA_TASKS = ("shard", "clean", "dedup", "train_tokenizer", "tokenize")
HELD = ("run=slurm", "run.array=2", "run.flags=[--hold]")  # submitted, and never started


@pytest.fixture
def submit(cluster, tmp_path):
    """Submits a job whose SLURM jobs never start, into `tmp_path`."""

    def submit(*words: object, **options):
        return run_pipeline(*words, *HELD, f"root={tmp_path / 'root'}", **{**cluster_variables(cluster), **options})

    return submit


def cluster_variables(cluster) -> dict[str, str]:
    return {"SLURM_CONF": cluster.env["SLURM_CONF"]}


def jobs(cluster) -> dict[str, list[str]]:
    """Ids of the jobs that wait or run, by name."""
    found: dict[str, list[str]] = {}
    for line in cluster.run("squeue", "--noheader", "--format", "%j %F").stdout.splitlines():
        name, job = line.split()
        found.setdefault(name, []).append(job)
    return found


def wrapped(tmp_path: Path, script: str) -> str:
    """A PATH on which `script` comes before sbatch: $real is the real one, $count how often it was called to submit."""
    here = tmp_path / "wrapped"
    here.mkdir()
    (here / "sbatch").write_text(
        f"""#!/bin/bash
real={shutil.which("sbatch")}
for word; do [[ $word == --test-only ]] && exec "$real" "$@"; done
count=$(($(cat {here}/count 2>/dev/null) + 1))
echo $count >{here}/count
{script}
exec "$real" "$@"
"""
    )
    (here / "sbatch").chmod(0o755)
    return f"{here}:{os.environ['PATH']}"


def waiting(tmp_path: Path, call: int, then: str = "") -> str:
    """A PATH with an sbatch that at its call of this number makes the file `reached`, and waits for the file `go`."""
    here = tmp_path / "wrapped"
    wait = f"touch {here}/reached; until [ -e {here}/go ]; do sleep 0.1; done"
    return wrapped(tmp_path, f"((count == {call})) && {{ {wait}; {then or ':'}; }}")


def begin(cluster, tmp_path: Path, *words: object, **variables: str) -> subprocess.Popen[str]:
    """A submission under way, in a process group of its own."""
    environment = {**os.environ, "PYTHONWARNINGS": "", **cluster_variables(cluster), **variables}
    return subprocess.Popen(
        command(*words, *HELD, f"root={tmp_path / 'root'}"),
        cwd=PROJECT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def is_clean(cluster, tmp_path: Path) -> bool:
    """Whether nothing is left of a submission that came to nothing."""
    left = [*(tmp_path / "root").rglob("claim.json"), *(tmp_path / "root").rglob("wanted/*")]
    return not jobs(cluster) and not left and not (tmp_path / "root/jobs/tiny/job.json").exists()


# the same job under another name, with all but the last of its tasks in common
OTHER = (*DATA, "name=other", "tasks.tokenize.held_out_fraction=0.2")


def record(tmp_path: Path, name: str = "tiny") -> dict[str, dict]:
    tasks = json.loads((tmp_path / "root/jobs" / name / "job.json").read_text())["tasks"]
    return {task["name"]: task for task in tasks}


def test_the_plan_shows_the_commands_that_are_given_and_does_nothing(cluster, submit, tmp_path):
    words = ("job=tiny", "run.nodes=2", "run.time=3:00:00", "run.memory_per_node=1G")
    shown = submit(*words, "--plan").stdout
    assert not (tmp_path / "root").exists()
    assert not jobs(cluster)

    log = tmp_path / "given"
    path = wrapped(tmp_path, f'{{ printf "%s\\0" sbatch "$@"; printf "\\n"; }} >>{log}')
    submit(*words, PATH=path)
    names = {}
    for task in record(tmp_path).values():
        names |= {task["slurm"]: f"<{task['name']}>", task["preflight"]: "<pretrain.preflight>"}

    def plain(words: list[str]) -> list[str]:
        """A command without what a submission makes of its own."""
        after = [word.removeprefix("--dependency=afterok:").split(":") for word in words if "=afterok:" in word]
        kept = [word for word in words if not word.startswith(("--comment=", "--dependency="))]
        return [*kept, *sorted(names.get(job, job) for ids in after for job in ids)]

    given = [plain(line.rstrip("\0").split("\0")) for line in log.read_text().splitlines()]
    commands = [shlex.split(line) for line in shown.splitlines() if line.startswith("sbatch ")]
    planned = [plain(command) for command in commands]
    assert shown.count(f"export PIPELINE_PYTHON={sys.executable} PIPELINE_CODE={tmp_path}/root/code/") == 1
    assert planned == given
    assert len(given) == 12  # eleven tasks, and a preflight for both trainings
    assert "pretrain: jobs of 3:00:00 at the most; disk: " in shown
    assert "memory of a rank: 0.7 MB for the model's states, and the activations" in shown
    assert "memory: not known before it runs" in shown


def test_without_slurm_the_plan_says_what_it_could_not_look_at(tmp_path):
    words = ("job=tiny", "run=slurm", "run.data.time=8:00", f"root={tmp_path / 'root'}")
    shown = run_pipeline(*words, "--plan", "run.python=/no/python", PATH=str(tmp_path)).stdout
    assert "shard: jobs of 8 min at the most" in shown
    assert "\nrun.python: /no/python is not on this machine; right only if the nodes have it\n" in shown
    assert "sbatch --parsable --job-name=tiny.shard" in shown
    assert "not checked (SLURM is not on this machine): partitions, nodes" in shown
    refused = run_pipeline(*words, "run.time=0:30", "--plan", status=2, PATH=str(tmp_path)).stderr
    assert "run.time: wanted a minute or more, found '0:30'" in refused
    refused = run_pipeline(*words, status=4, PATH=str(tmp_path)).stderr
    assert "there is no such command on this machine's PATH; run this on a login node" in refused
    assert not (tmp_path / "root").exists()


def test_sbatch_that_fails_for_the_moment_is_tried_again(cluster, submit, tmp_path):
    text = "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)"
    path = wrapped(tmp_path, f'((count <= 2)) && {{ echo "{text}" >&2; exit 1; }}')
    done = submit(*DATA, PATH=path)
    assert f"{text.replace('error: ', '')}; try 2 of 6 in 1 s" in done.stderr
    assert f"{text.replace('error: ', '')}; try 3 of 6 in 2 s" in done.stderr
    assert {name: len(ids) for name, ids in jobs(cluster).items()} == {f"tiny.{task}": 1 for task in DATA_TASKS}


def test_a_job_whose_answer_was_lost_is_not_submitted_twice(cluster, submit, tmp_path):
    text = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
    path = wrapped(tmp_path, f'((count == 1 || count == 3)) && {{ "$real" "$@"; echo "{text}" >&2; exit 1; }}')
    submit(*DATA, PATH=path)
    assert jobs(cluster) == {f"tiny.{name}": [task["slurm"]] for name, task in record(tmp_path).items()}
    assert len(jobs(cluster)) == len(DATA_TASKS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sbatch: error: Batch job submission failed: Access/permission denied", "sbatch: {}"),
        (
            "sbatch: error: Batch job submission failed: Resource temporarily unavailable",
            "the queue is full, SLURM takes no more jobs; submit later ({})",
        ),
    ],
)
def test_when_a_task_is_not_taken_nothing_stays_submitted(cluster, submit, tmp_path, text, message):
    path = wrapped(tmp_path, f'((count == 3)) && {{ echo "{text}" >&2; exit 1; }}')
    assert message.format(text.removeprefix("sbatch: error: ")) in submit(*DATA, PATH=path, status=4).stderr
    assert not jobs(cluster)
    assert not list((tmp_path / "root").rglob("claim.json"))
    assert not (tmp_path / "root/jobs/tiny/job.json").exists()
    submit(*DATA)  # and so it can be submitted again
    assert len(jobs(cluster)) == len(DATA_TASKS)


def test_a_job_that_is_under_way_is_not_started_again(cluster, submit, tmp_path):
    submit(*DATA)
    before = record(tmp_path)
    ids = ", ".join(task["slurm"] for task in before.values())
    message = f"tiny: a job of this name is under way (SLURM job {ids}); wait for it"
    assert message in submit(*DATA, status=4).stderr
    assert message in submit(*DATA, "--plan", status=2).stderr
    here = run_pipeline(*DATA, f"root={tmp_path / 'root'}", status=4, **cluster_variables(cluster))
    assert message in here.stderr
    assert record(tmp_path) == before
    assert len(jobs(cluster)) == len(DATA_TASKS)


@pytest.mark.parametrize("lock", ["lock", "lock-00003", "lock-publish"])
def test_a_job_that_runs_on_this_machine_is_not_submitted(cluster, submit, tmp_path, lock):
    plan = run_pipeline(*DATA, "--plan", f"root={tmp_path / 'root'}").stdout
    shard = next(word for word in plan.split() if "/corpus/shard-" in word)
    with locked(Path(shard), lock):
        assert f"process {os.getpid()} on " in submit(*DATA, status=4).stderr
    assert not jobs(cluster)


def test_what_another_job_makes_is_waited_for_and_not_made_twice(cluster, submit, tmp_path):
    submit(*DATA)
    first = record(tmp_path)
    plan = submit(*OTHER, "--plan").stdout
    assert f"dedup: is made by SLURM job {first['dedup']['slurm']} of tiny, which is waited for" in plan
    submit(*OTHER)
    second = record(tmp_path, "other")
    for name in DATA_TASKS[:-1]:
        assert (second[name]["slurm"], second[name]["shared_with"]) == (first[name]["slurm"], "tiny")
    assert second["tokenize"]["slurm"] != first["tokenize"]["slurm"]
    assert {*jobs(cluster)} == {*(f"tiny.{task}" for task in DATA_TASKS), "other.tokenize"}
    waits = cluster.job(second["tokenize"]["slurm"])["Dependency"]
    assert all(f"afterok:{first[name]['slurm']}" in waits for name in ("dedup", "train_tokenizer"))


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 75), (signal.SIGHUP, 75), (signal.SIGUSR1, 75), (signal.SIGUSR2, 75), (signal.SIGINT, 130)],
)
def test_a_submission_that_is_told_to_stop_takes_everything_back(cluster, submit, tmp_path, number, status):
    submission = begin(cluster, tmp_path, *DATA, PATH=waiting(tmp_path, 2))
    wait_until((tmp_path / "wrapped/reached").exists, 60)
    assert len(jobs(cluster)) == 1
    os.killpg(submission.pid, number)  # as Ctrl-C and a terminal that is closed do
    (tmp_path / "wrapped/go").touch()
    _, said = submission.communicate(timeout=60)
    assert submission.returncode == status, said
    assert "stopped: tiny: nothing was submitted; run the same command to continue" in said
    assert "Traceback" not in said
    assert is_clean(cluster, tmp_path)
    submit(*DATA)
    assert len(jobs(cluster)) == len(DATA_TASKS)


def test_a_stop_while_the_answer_of_sbatch_is_lost_leaves_nothing(cluster, tmp_path):
    text = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
    path = waiting(tmp_path, 2, f'"$real" "$@"; echo "{text}" >&2; exit 1')
    submission = begin(cluster, tmp_path, *DATA, PATH=path)
    wait_until((tmp_path / "wrapped/reached").exists, 60)
    submission.send_signal(signal.SIGTERM)
    (tmp_path / "wrapped/go").touch()
    _, said = submission.communicate(timeout=60)
    assert submission.returncode == 75, said
    assert is_clean(cluster, tmp_path)


def test_what_a_killed_submission_leaves_is_found_and_not_made_twice(cluster, submit, tmp_path):
    submission = begin(cluster, tmp_path, *DATA, PATH=waiting(tmp_path, 2))
    wait_until((tmp_path / "wrapped/reached").exists, 60)
    assert f"process {submission.pid} on " in submit(*DATA, status=4).stderr  # it is under way
    submission.kill()
    submission.communicate()
    again = begin(cluster, tmp_path, *DATA)  # waits for the sbatch that lives on
    (tmp_path / "wrapped/go").touch()
    out, said = again.communicate(timeout=90)
    assert again.returncode == 0, said + out
    assert jobs(cluster) == {f"tiny.{name}": [task["slurm"]] for name, task in record(tmp_path).items()}
    assert len(jobs(cluster)) == len(DATA_TASKS)


def test_a_killed_submission_can_be_cancelled_whole(cluster, tmp_path):
    submission = begin(cluster, tmp_path, *DATA, PATH=waiting(tmp_path, 2))
    wait_until((tmp_path / "wrapped/reached").exists, 60)
    cancel = ("cancel", "tiny", f"root={tmp_path / 'root'}")
    refused = run_command(*cancel, status=4, **cluster_variables(cluster)).stderr
    assert f"tiny: process {submission.pid} on {os.uname().nodename} is submitting it; wait for that" in refused
    submission.kill()
    submission.communicate()
    (tmp_path / "wrapped/go").touch()
    said = run_command(*cancel, **cluster_variables(cluster)).stdout
    assert said.count("cancelled, SLURM job") == 2
    assert not jobs(cluster)


def test_what_sbatch_prints_is_an_id_or_nothing_stays_submitted(cluster, submit, tmp_path):
    path = wrapped(tmp_path, '((count == 2)) && { "$real" "$@"; echo thank you; exit 0; }; echo welcome')
    said = submit(*DATA, PATH=path, status=4).stderr
    assert re.search(r"^error: sbatch: wanted the id of a job, and it printed '\d+ thank you'$", said, re.MULTILINE)
    assert is_clean(cluster, tmp_path)


def test_a_submission_that_fails_leaves_what_another_job_waits_for_by_now(cluster, submit, tmp_path):
    first = begin(cluster, tmp_path, *DATA, PATH=waiting(tmp_path, 3, "echo refused >&2; exit 1"))
    wait_until((tmp_path / "wrapped/reached").exists, 60)
    second = begin(cluster, tmp_path, *OTHER)
    there = tmp_path / "root/jobs/other/job.json"
    wait_until(lambda: there.exists() and bool(record(tmp_path, "other")["clean"]["slurm"]), 60)
    (tmp_path / "wrapped/go").touch()
    _, said = first.communicate(timeout=60)
    assert (first.returncode, said) == (4, "error: sbatch: refused\n")
    out, said = second.communicate(timeout=60)
    assert second.returncode == 0, out + said
    tasks = record(tmp_path, "other")
    assert [tasks[name]["shared_with"] for name in DATA_TASKS] == ["tiny", "tiny", None, None, None]
    assert {name: ids for name, ids in jobs(cluster).items() if name.startswith("tiny")} == {
        f"tiny.{name}": [tasks[name]["slurm"]] for name in ("shard", "clean")
    }
    assert len(jobs(cluster)) == len(DATA_TASKS)
    assert not (tmp_path / "root/jobs/tiny/job.json").exists()


def test_cancelling_a_job_leaves_what_one_shares_that_is_being_submitted(cluster, submit, tmp_path):
    submit(*DATA)
    second = begin(cluster, tmp_path, *OTHER, PATH=waiting(tmp_path, 1))
    wait_until((tmp_path / "wrapped/reached").exists, 60)
    said = run_command("cancel", "tiny", f"root={tmp_path / 'root'}", **cluster_variables(cluster)).stdout
    assert said.count("goes on: other waits for it too") == len(DATA_TASKS) - 1
    (tmp_path / "wrapped/go").touch()
    out, errors = second.communicate(timeout=60)
    assert second.returncode == 0, out + errors
    assert sorted(ids[0] for ids in jobs(cluster).values()) == sorted(
        task["slurm"] for task in record(tmp_path, "other").values()
    )
