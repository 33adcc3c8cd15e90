"""Looks how far jobs are: SLURM is asked once for all of them, then their directories are read."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pipeline.artifact import MANIFEST
from pipeline.errors import LaunchError
from pipeline.jobs.evidence import Evidence, launcher_runs, read_evidence
from pipeline.jobs.record import JobRecord, TaskRecord
from pipeline.jobs.states import JobStatus, judge
from pipeline.launch import scheduler
from pipeline.launch.claim import read_claim
from pipeline.launch.scheduler import Seen


def look(root: Path, records: Sequence[JobRecord]) -> list[JobStatus]:
    """Return how far jobs are; where SLURM does not answer, as far as their directories say."""
    seen, problem = _ask(records)
    found = []
    for record in records:
        # after SLURM was asked, so that what has just ended is not taken for lost
        evidence = {task.name: _read(root / "jobs" / record.name / task.name, task) for task in record.tasks}
        asks = any(task.slurm for task in record.tasks)
        found.append(JobStatus(record, judge(record, evidence, seen, _runs(record, seen)), problem if asks else ""))
    return found


def _read(link: Path, task: TaskRecord) -> Evidence:
    """Return what the directory of a task says, to which this link leads once it was made."""
    directory = Path(task.directory)
    if directory.is_dir():
        return read_evidence(directory, task)
    return Evidence(is_gone=task.slurm is not None or link.is_symlink())


def _ask(records: Iterable[JobRecord]) -> tuple[Mapping[str, Seen] | None, str]:
    """Return what SLURM says of all tasks that are not done, or null and why it cannot be asked."""
    ids = set()
    for record in records:
        for task in record.tasks:
            directory = Path(task.directory)
            if task.slurm and not (directory / MANIFEST).exists():
                claim = read_claim(directory)
                ids |= {task.slurm} | ({claim.slurm} if claim and claim.slurm else set())
        if record.allocation and any(not (Path(task.directory) / MANIFEST).exists() for task in record.tasks):
            ids.add(record.allocation.partition("_")[0])
    try:
        return scheduler.look(ids, pauses_s=()), ""
    except LaunchError as error:
        return None, f"SLURM does not answer: {error}"


def _runs(record: JobRecord, seen: Mapping[str, Seen] | None) -> bool:
    """Return whether the process that runs a job lives: in a SLURM job of its own, SLURM says so."""
    if record.allocation is not None:
        return seen is not None and any(
            not one.is_over for id, one in seen.items() if record.allocation in (id, id.partition("_")[0])
        )
    return launcher_runs(record)
