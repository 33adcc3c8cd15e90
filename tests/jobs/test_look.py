"""Which SLURM is believed about a job: on a disk that two clusters share, each has jobs of the same numbers."""

import json

import pytest

from pipeline.errors import LaunchError
from pipeline.jobs.cancel import cancel
from pipeline.jobs.look import look
from pipeline.jobs.record import TaskRecord, new_record
from pipeline.jobs.refusals import live_jobs
from pipeline.launch import scheduler
from pipeline.launch.scheduler import Seen
from pipeline.perform import want

SIGNATURE = {"words": "SLURM job 12", "host": "n1", "pid": 5, "job": "12"}
THERE = "its SLURM jobs are of cluster alps, and this is andes; ask there"


@pytest.fixture(autouse=True)
def cancelled(monkeypatch):
    """On the cluster andes, which runs a job 12; gives what is cancelled there."""
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "andes")
    seen = {"12": Seen("12", "RUNNING", "None", "b7")}
    monkeypatch.setattr(scheduler, "look", lambda ids, pauses_s=(): {id: seen[id] for id in ids if id in seen})
    found: list[str] = []
    monkeypatch.setattr(scheduler, "cancel", found.extend)
    return found


def job(root, name, cluster=None, allocation=None):
    """A job of one task that SLURM job 12 of a cluster makes, or runs by hand."""
    directory = root / f"model/{name}-0123456789abcdef"
    (directory / "work").mkdir(parents=True)
    want(directory, name, "task")
    file, said = ("lock", {**SIGNATURE, "cluster": cluster}) if allocation else ("claim.json", claim(name, cluster))
    (directory / "work" / file).write_text(json.dumps(said))
    task = TaskRecord(
        name="task",
        kind="pretrain",
        directory=str(directory),
        fingerprint="0123456789abcdef",
        needs=[],
        ranks=1,
        slurm=None if allocation else "12",
    )
    record = new_record(name, "local" if allocation else "slurm", [task], None)
    record = record.model_copy(update={"host": "n1", "allocation": allocation})
    (root / "jobs" / name).mkdir(parents=True)
    (root / "jobs" / name / "job.json").write_text(record.model_dump_json())
    return record


def claim(name, cluster):
    return {"slurm": "12", "job": name, "cluster": cluster}


def states(root, *records):
    return [(found.tasks[0].state, found.tasks[0].nodes, found.problem) for found in look(root, records)]


def test_of_several_jobs_those_of_this_cluster_are_looked_at_and_the_others_are_unknown(tmp_path):
    away, here, before = job(tmp_path, "a", "alps"), job(tmp_path, "b", "andes"), job(tmp_path, "c")
    known = ("running", "b7", "")
    assert states(tmp_path, away, here, before) == [("unknown", "", THERE), known, known]


@pytest.mark.parametrize("allocation", [None, "12"])
def test_a_job_of_the_same_number_on_another_cluster_is_neither_shown_nor_cancelled(tmp_path, cancelled, allocation):
    away = job(tmp_path, "a", "alps", allocation)
    ((_, nodes, problem),) = states(tmp_path, away)
    assert ("b7" in nodes, problem) == (False, THERE)
    with pytest.raises(LaunchError, match=f"^a: nothing was cancelled: {THERE}$"):
        cancel(["a", f"root={tmp_path}"])
    assert live_jobs(tmp_path, "a") == []
    assert cancelled == []


def test_a_slurm_that_does_not_say_what_it_is_called_is_not_believed(tmp_path, monkeypatch):
    def silent(pauses_s):
        raise LaunchError("scontrol: no answer")

    monkeypatch.setattr(scheduler, "cluster", silent)
    assert states(tmp_path, job(tmp_path, "a", "alps")) == [
        ("unknown", "", "SLURM does not answer: scontrol: no answer")
    ]
