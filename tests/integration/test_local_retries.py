"""Processes on this machine that are lost, told to stop, or started twice: `run.tries`, and what a launcher says."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support import MODEL_TASKS, PROJECT, command, run_pipeline

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("tiny")]

TRAINING = [f"~tasks.{task}" for task in (*MODEL_TASKS[1:], "report")]
TRAINING += ["job=tiny", "tasks.pretrain.steps=60", "run.checkpoints.every_steps=5", "run.threads=1"]
DIES_AT_ONCE = """
import os, sys
if any(word.endswith("rank.py") for word in sys.orig_argv):
    open({path!r}, "a").write("begun\\n")
    os.kill(os.getpid(), 9)
"""


@pytest.fixture
def root(tiny_tokens, tmp_path):
    shutil.copytree(tiny_tokens.parent.parent, tmp_path / "artifacts", symlinks=True)
    return tmp_path / "artifacts"


@pytest.fixture
def start():
    """Starts a command; what a test that fails leaves running is ended."""
    processes = []

    def start(*arguments):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command(*arguments), cwd=PROJECT, **pipes))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def wait_for_step(root, step, process):
    """Return when a checkpoint of this step or a later one is there: old ones go."""
    deadline = time.monotonic() + 120
    while not any(int(path.name[5:]) >= step for path in root.glob("model/pretrain-*/checkpoints/step-*[0-9]")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"step {step} did not come"
        time.sleep(0.01)


def pid_of(rank, launcher):
    """Process id of a rank."""
    for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return int(pid)
    raise AssertionError(f"no process is rank {rank}")


def weights(root):
    return (root / "jobs/tiny/pretrain/model.safetensors").read_bytes()


def rows(root):
    lines = (root / "jobs/tiny/pretrain/metrics.jsonl").read_text().splitlines()
    timeless = ("time", "tokens_per_s", "seconds")
    return [{k: v for k, v in json.loads(line).items() if not k.endswith(timeless)} for line in lines]


def test_a_run_that_loses_a_rank_goes_on_by_itself_and_ends_as_if_nothing_had_been(root, tmp_path, start):
    reference = tmp_path / "undisturbed"
    shutil.copytree(root, reference, symlinks=True)
    run_pipeline(*TRAINING, f"root={reference}", "run.ranks=2")
    process = start(*TRAINING, f"root={root}", "run.ranks=2", "run.tries=3")
    wait_for_step(root, 10, process)
    os.kill(pid_of(1, process), signal.SIGKILL)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert out.count("pretrain: begun again") == 1
    assert "rank 1 was ended by SIGKILL" in out
    assert "continues after" in out
    for rank in range(2):
        log = (root / f"jobs/tiny/pretrain/logs/rank-{rank:05d}.log").read_text()
        assert re.findall(r"^--- try (\d+), 20[^,]* UTC ---$", log, re.MULTILINE) == ["1", "2"]
    assert weights(root) == weights(reference)
    assert [(row["step"], row["loss"]) for row in rows(root)] == [(row["step"], row["loss"]) for row in rows(reference)]
    directory = (root / "jobs/tiny/pretrain").resolve()
    assert (directory / "work/attempt").read_text() == "2"
    assert (directory / "work/lock").read_bytes() == b""


@pytest.mark.parametrize(
    ("tries", "begun", "said"),
    [
        ([], 1, "rank 0 was ended by SIGKILL; the same command continues"),
        (["run.tries=3"], 3, "begun 3 times without any progress; the last time: "),
    ],
)
def test_a_rank_that_always_dies_at_once_is_given_up(tries, begun, said, tmp_path):
    count = tmp_path / "begun"
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(DIES_AT_ONCE.format(path=str(count)))
    words = ["job=tiny", f"root={tmp_path / 'artifacts'}", *tries]
    done = run_pipeline(*words, status=4, PYTHONPATH=str(tmp_path / "site"))
    assert count.read_text() == begun * "begun\n"
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert done.stdout.count("begun again") == begun - 1
    again = run_pipeline(*words, status=4, PYTHONPATH=str(tmp_path / "site"))  # a person begins anew: so does the count
    assert count.read_text() == 2 * begun * "begun\n"
    assert said in again.stderr


def test_a_second_launcher_is_refused_and_a_stop_is_not_tried_again(root, tmp_path, start):
    words = [*TRAINING, f"root={root}", "tasks.pretrain.steps=20000", "tasks.pretrain.max_epochs=200", "run.tries=3"]
    process = start(*words)
    wait_for_step(root, 5, process)
    owner = f"process {process.pid} on {os.uname().nodename}"
    refused = run_pipeline(*words, status=4)
    assert refused.stderr.startswith(f"error: tiny: a job of this name is under way ({owner})")
    shutil.copy(PROJECT / "tests/conf/job/tiny.yaml", tmp_path / "other.yaml")
    words[words.index("job=tiny")] = f"job={tmp_path / 'other.yaml'}"  # which wants the same artifact
    refused_too = run_pipeline(*words, status=4)
    assert f"{owner} is working in it; wait for it or end it" in refused_too.stderr
    assert refused.stderr.count("\n") == refused_too.stderr.count("\n") == 1
    process.send_signal(signal.SIGUSR2)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 75
    assert "begun again" not in out + errors
    assert errors.startswith("stopped: ")
    assert errors.endswith("; run the same command to continue\n")
    (directory,) = root.glob("model/pretrain-*")
    result = json.loads((directory / "work/result.json").read_text())
    assert result["status"] == 75
    assert (directory / "work/attempt").read_text() == "1"
