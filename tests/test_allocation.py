"""What a SLURM job does before its task begins. (The rest: tests/slurm.)"""

import pytest

from pipeline import allocation
from pipeline.artifact import write_json
from pipeline.env import StopRequest
from pipeline.errors import ConfigError


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
