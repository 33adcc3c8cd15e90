"""The real W&B client against tests/wandb_server.py: what W&B's own server makes of it is not covered."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from support import MODEL_TASKS, PROJECT, run_pipeline
from wandb_server import KEY, Server

from pipeline.errors import ConfigError, LaunchError, TrainingError
from pipeline.perform import leave_result
from pipeline.track import METRICS, Wandb, open_tracker, upload

ID = "pretrain-0123456789abcdef"
NO_ACCOUNT = {"WANDB_API_KEY": "", "NETRC": "/nowhere/netrc"}


def rows(*steps):
    return [{"step": step, "time": 1e9 + step, "loss": 10.0 - step} for step in steps]


@pytest.fixture(scope="module")
def one_server():
    """For all tests: the client remembers the address for as long as its process lives."""
    with Server().running() as server:
        yield server


@pytest.fixture
def server(one_server, monkeypatch):
    for name, value in one_server.variables().items():
        monkeypatch.setenv(name, value)
    yield one_server
    one_server.runs.clear()
    one_server.broken = None


def send(steps, state="finished"):
    return upload(Wandb(), ID, "job.pretrain", {"lr": 1e-3}, rows(*steps), state)


@pytest.mark.slow
def test_a_run_is_replayed_from_the_step_on_that_the_server_has(server):
    assert send([1, 2, 3], "unfinished") == (3, -1)
    assert send([1, 2, 3, 4, 5]) == (2, 3)
    assert send([1, 2, 3, 4, 5]) == (0, 5)
    (run,) = server.runs.values()
    assert [(row["_step"], row["loss"]) for row in run.rows] == [(step, 10 - step) for step in range(1, 6)]
    assert [row["_timestamp"] for row in run.rows] == [1e9 + step for step in range(1, 6)]  # of the training
    assert (run.title, run.project, run.config["lr"]["value"]) == ("job.pretrain", "pipeline", 1e-3)
    assert list(server.runs) == [ID]
    assert run.preempting == 1
    assert run.ends == [1, 0, 0]


@pytest.mark.slow
def test_a_run_that_failed_is_marked(server):
    send([1], "failed")
    (run,) = server.runs.values()
    assert (run.ends, run.preempting) == ([1], 0)


@pytest.mark.slow
def test_what_the_server_does_not_take_is_said_and_comes_with_the_next_sync(server):
    send([1])
    server.broken = 404
    with pytest.raises(LaunchError, match=r"W&B: job\.pretrain: not all that was sent was taken; the next sync"):
        send([1, 2])
    server.broken = None
    assert send([1, 2]) == (1, 1)
    assert server.runs[ID].steps == [1, 2]


def test_no_account_is_one_line(monkeypatch):
    for name, value in NO_ACCOUNT.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="W&B: no account is set up here; `wandb login`"):
        send([1])


@pytest.mark.slow
def test_no_network_is_one_line():
    code = (
        "from pipeline import track; track.PATIENCE_S = 1\n"
        "try: track.upload(track.Wandb(), 'id', 'job.pretrain', {}, [], 'finished')\n"
        "except track.LaunchError as error: print(error)"
    )
    nobody = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": KEY}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **nobody}, cwd=PROJECT, capture_output=True, text=True
    )
    (line,) = [said for said in done.stdout.splitlines() if "wandb\x1b" not in said]  # W&B itself may say more
    assert line.startswith("W&B: ")
    assert "refused" in line
    assert line.endswith("; what is not there yet comes with the next sync")
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def trained(tiny_tokens, tmp_path_factory):
    """A training with tracker=wandb, on a machine without an account."""
    root = tmp_path_factory.mktemp("sync") / "artifacts"
    shutil.copytree(tiny_tokens.parent.parent, root, symlinks=True)
    words = [f"~tasks.{task}" for task in (*MODEL_TASKS[1:], "report")]
    run_pipeline("job=tiny", f"root={root}", *words, "tracker=wandb", "tracker.project=mine", **NO_ACCOUNT)
    return root


@pytest.fixture
def root(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "artifacts", symlinks=True)
    return tmp_path / "artifacts"


def sync(root, *words, status=0, **variables):
    """What the command prints, or the one line that it ends with."""
    command = [sys.executable, "-m", "pipeline", "sync", *words, f"root={root}"]
    done = subprocess.run(command, env={**os.environ, **variables}, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    assert done.stderr.count("\n") == (1 if status else 0), done.stderr
    return done.stderr if status else done.stdout


@pytest.mark.slow
def test_sync_sends_a_training_while_it_runs_and_when_it_is_done(root, server):
    directory = (root / "jobs/tiny/pretrain").resolve()
    recorded = (directory / METRICS).read_text().splitlines(keepends=True)
    last = json.loads(recorded[-1])["step"]
    (directory / "manifest.json").rename(directory / "manifest.away")
    (directory / METRICS).write_text("".join(recorded[:7]) + recorded[7][:9])  # a line that is being written
    assert "tiny.pretrain: 7 rows sent, up to step 7 (unfinished)" in sync(root, "tiny.pretrain")
    assert "tiny.pretrain: 0 rows sent, up to step 7 (unfinished)" in sync(root, "tiny")
    (directory / METRICS).write_text("".join(recorded))
    leave_result(directory, "", TrainingError("x"))
    assert f"tiny.pretrain: {len(recorded) - 7} rows sent, up to step {last} (failed)" in sync(root)
    (directory / "manifest.away").rename(directory / "manifest.json")
    assert f"tiny.pretrain: 0 rows sent, up to step {last} (finished)" in sync(root, str(directory))
    asked = len(server.requests)
    assert sync(root) == f"tiny.pretrain: W&B has all {last} steps\n"
    assert len(server.requests) == asked
    (run,) = server.runs.values()
    assert list(server.runs) == [directory.name]
    assert (run.project, run.title, run.ends, run.preempting) == ("mine", "tiny.pretrain", [1, 1, 1, 0], 2)
    task = json.loads((directory / "work/task.json").read_text())
    assert {key: run.config[key]["value"] for key in task["stage"]} == task["stage"]
    sent = [{k: v for k, v in row.items() if k[0] != "_"} for row in run.rows]
    kept = [{k: v for k, v in json.loads(line).items() if k not in ("step", "time")} for line in recorded]
    assert sent == kept
    assert run.steps == [json.loads(line)["step"] for line in recorded]


@pytest.mark.slow
def test_sync_takes_what_is_for_wandb_and_says_what_it_cannot(root, server):
    directory = (root / "jobs/tiny/pretrain").resolve()
    frozen = directory / "work/task.json"
    assert "error: tiny.nothing: job 'tiny' has no task called 'nothing'" in sync(root, "tiny.nothing", status=3)
    assert "error: tinny: no job of this name" in sync(root, "tinny", status=3)
    assert "error: sync: no word is called '--al'; did you mean '--all'?" in sync(root, "--al", status=2)
    assert "error: W&B: no account is set up here" in sync(root, status=2, **NO_ACCOUNT)
    assert "nothing to sync: no task of tiny.shard has numbers that are for W&B" in sync(root, "tiny.shard")
    task = json.loads(frozen.read_text())
    frozen.write_text(json.dumps({**task, "tracker": {"kind": "jsonl"}}))
    assert "nothing to sync" in sync(root, "tiny")
    assert server.runs == {}
    assert "(finished)" in sync(root, "--all")
    assert [run.project for run in server.runs.values()] == ["pipeline"]
    frozen.write_text("{")
    (directory / "work/synced.json").unlink()
    assert "work/task.json: damaged" in sync(root, status=3)


@pytest.mark.slow
def test_a_tracker_in_a_slurm_job_is_offline_unless_it_is_told_otherwise(server, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    for mode, known in ((None, []), ("online", [ID])):
        tracker = open_tracker(Wandb(mode=mode), tmp_path, ID, "job.pretrain", {}, 0)
        tracker.log(1, {"loss": 1.0})
        tracker.close()
        assert list(server.runs) == known
    monkeypatch.delenv("SLURM_JOB_ID")
    server.runs.clear()
    open_tracker(Wandb(), tmp_path, ID, "job.pretrain", {}, 0).close()
    assert list(server.runs) == [ID]
