"""One W&B run through every requeue: offline on the nodes, brought to a server from the login node.

The server is tests/wandb_server.py, which the real client talks to; what W&B's own makes of it is not covered.
"""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from submitted import Submitted, wait_until
from support import MODEL_TASKS, PROJECT, run_pipeline
from trainings import RANK, only_process
from wandb_server import Server

STEPS = 300
TRAINING = [f"~tasks.{task}" for task in (*MODEL_TASKS[1:], "report")]
TRAINING += ["job=tiny", "run=slurm", "run.threads=1", "run.checkpoints.every_steps=5", "tracker=wandb"]


@pytest.fixture
def server():
    with Server().running() as server:
        yield server


def sync(cluster, root, server):
    words = [sys.executable, "-m", "pipeline", "sync", "tiny", f"root={root}"]
    done = subprocess.run(words, cwd=PROJECT, env=cluster.env | server.variables(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_training_that_is_requeued_is_one_run(cluster, tiny_tokens, tmp_path, server):
    root = tmp_path / "artifacts"
    shutil.copytree(tiny_tokens.parent.parent, root, symlinks=True)
    account = {"SLURM_CONF": cluster.env["SLURM_CONF"], **server.variables()}
    words = [f"tasks.pretrain.steps={STEPS}", f"root={root}"]
    run_pipeline(*TRAINING, *words, **account)
    job = Submitted(cluster, root)
    directory = job.directory("pretrain")
    wait_until(lambda: list(directory.glob("checkpoints/step-*[0-9]")), 120, job.what_is_there)
    rank = only_process(job.id("pretrain"), RANK)
    os.kill(rank, signal.SIGSTOP)  # however fast it is, it is requeued in its middle; SLURM wakes what it ends
    assert "(unfinished)" in sync(cluster, root, server)
    cluster.run("scontrol", "requeue", job.id("pretrain"))
    cluster.start_now(job.id("pretrain"))
    job.wait("pretrain")
    assert job.states("pretrain") == ["COMPLETED"], job.what_is_there()
    assert list(server.runs) == [directory.name]  # of the sync: the nodes had an account, and were offline all the same
    offline = sorted(path.name for path in directory.glob("wandb/offline-run-*/*.wandb"))
    assert len(offline) >= 2
    assert set(offline) == {f"run-{directory.name}.wandb"}
    assert "(finished)" in sync(cluster, root, server)
    (run,) = server.runs.values()
    recorded = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert run.steps == [row["step"] for row in recorded] == list(range(1, STEPS + 1))
    assert run.ends[-1] == 0
