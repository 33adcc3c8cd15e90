"""What a SLURM job does before its task begins. (The rest: tests/slurm.)"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline import allocation
from pipeline.artifact import write_json
from pipeline.env import StopRequest
from pipeline.errors import ConfigError, LaunchError
from pipeline.worker import FrozenTask


@pytest.fixture
def frozen(tmp_path):
    """A task frozen for run=local, which no SLURM job runs, with one input."""
    directory = tmp_path / "corpus/clean-0000000000000000"
    (directory / "work").mkdir(parents=True)
    write_json(
        directory / "work/task.json",
        {
            "name": "clean",
            "job": None,
            "stage": {"kind": "clean", "corpus": "corpus"},
            "inputs": {"corpus": str(tmp_path / "corpus/shard-0000000000000000")},
            "fingerprint": "0" * 16,
            "directory": str(directory),
            "run": {"kind": "local"},
            "tracker": {"kind": "jsonl"},
        },
    )
    return directory


@pytest.mark.parametrize("seen", [True, False])
def test_what_a_task_reads_may_show_late_on_a_disk_of_a_network(frozen, monkeypatch, seen):
    manifest = frozen.parent / "shard-0000000000000000/manifest.json"
    clock = iter(range(0, 1000, 20))
    waited = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if seen and len(waited) == 2:
            manifest.parent.mkdir()
            manifest.touch()

    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(allocation.time, "sleep", sleep)
    monkeypatch.setattr(allocation.time, "monotonic", lambda: next(clock))
    with pytest.raises(ConfigError, match="was frozen for run=local"):  # so far it came
        allocation.run_task([str(frozen)], StopRequest())
    assert len(waited) == (2 if seen else 3)


def test_nothing_is_waited_for_where_the_task_is_made(frozen, monkeypatch):
    (frozen / "manifest.json").touch()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(allocation.time, "sleep", lambda _: pytest.fail("waited"))
    with pytest.raises(ConfigError, match="was frozen for run=local"):
        allocation.run_task([str(frozen)], StopRequest())


@contextmanager
def standard_error_in(path: Path) -> Iterator[None]:
    """Let what this process complains of go to a file, as SLURM does."""
    kept = os.dup(2)
    with open(path, "ab") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@pytest.mark.parametrize(
    ("job", "why", "cancelled"),
    [("12", "", True), ("12", "DUE TO PREEMPTION ", False), ("1", "DUE TO PREEMPTION ", True)],
)
def test_a_job_that_slurm_ends_for_another_is_told_from_a_cancelled_one(monkeypatch, tmp_path, job, why, cancelled):
    log = tmp_path / "a job.log"
    log.write_text(f"slurmstepd: error: *** JOB 12 ON n1 CANCELLED AT 2026-11-22T20:00:10 {why}***\nmore\n")
    told = {"JobState": "COMPLETING", "Restarts": "0", "Reason": "None", "StdOut": str(log).partition(" ")[0]}
    monkeypatch.setenv("SLURM_JOB_ID", job)
    with standard_error_in(log):
        assert allocation.Comeback()._is_cancelled(told) == cancelled


def test_nodes_that_a_training_cannot_use_are_refused_with_the_reason(tmp_path):
    task = FrozenTask(
        name="pretrain",
        where="tasks.pretrain",
        job="tiny",
        stage={
            "kind": "pretrain",
            "tokens": "tokens",
            "model": {"kind": "decoder", "d_model": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 512},
            "seq_len": 64,
            "batch_tokens": 256,
            "steps": 2,
        },
        inputs={},
        fingerprint="0" * 16,
        directory=str(tmp_path),
        run={"kind": "slurm", "nodes": 4, "elastic": 3},
        tracker={"kind": "jsonl"},
    )
    with pytest.raises(LaunchError) as caught:
        allocation._shrink(task, task.run, 3)
    assert str(caught.value) == (
        "pretrain: cannot be spread over 3 nodes or fewer (run.ranks: a batch of 4 rows does not divide among 3 "
        "data-parallel ranks); see run.elastic and run.nodes"
    )
