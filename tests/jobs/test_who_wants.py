"""Who waits for a task, as far as no SLURM has to be asked; the rest is in tests/slurm/test_sharing.py."""

import sys

import pytest

from pipeline.jobs.record import TaskRecord, new_record
from pipeline.jobs.sharing import own, unwant, who_else_wants
from pipeline.perform import want, wanted


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "corpus/shard-0123456789abcdef"


def record(directory, job, slurm, shared_with="first"):
    """A job that wants one task, which another one's SLURM job makes."""
    root = directory.parent.parent
    want(directory, job, "shard")
    task = TaskRecord(
        name="shard",
        kind="shard",
        directory=str(directory),
        fingerprint=directory.name[-16:],
        needs=[],
        ranks=1,
        slurm=slurm,
        shared_with=shared_with,
    )
    made = new_record(job, "slurm", [task], None)
    (root / "jobs" / job).mkdir(parents=True)
    (root / "jobs" / job / "job.json").write_text(made.model_dump_json())
    return made


def test_a_job_waits_for_the_slurm_job_that_its_record_names(directory, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pipeline", "job=first"])
    record(directory, "first", "12", shared_with=None)
    record(directory, "second", "12")
    record(directory, "v1.5", "12")
    record(directory, "of-yesterday", "7")
    want(directory, "never-submitted", "shard")
    assert who_else_wants(tmp_path, "first", directory, "12") == ["second", "v1.5"]
    assert who_else_wants(tmp_path, "first", directory, "7") == ["of-yesterday"]
    unwant(directory, "v1.5")
    assert who_else_wants(tmp_path, "first", directory, "12") == ["second"]
    assert ("v1.5", "shard") not in wanted(directory)
    assert ("second", "shard") in wanted(directory)


def test_what_a_job_was_cancelled_for_is_not_its_own_any_more(directory):
    made, other = record(directory, "first", "12", shared_with=None), record(directory, "second", "12")
    assert [task.slurm for task in own(made)] == ["12"]
    assert own(other) == []
    unwant(directory, "first")
    assert own(made) == []
