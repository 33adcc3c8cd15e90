"""Looks how far jobs are: SLURM is asked once for all of them, then their directories are read."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pipeline.artifact import MANIFEST, WORK
from pipeline.errors import LaunchError
from pipeline.jobs.evidence import Evidence, launcher_runs, parts_of, read_evidence
from pipeline.jobs.record import JobRecord, TaskRecord
from pipeline.jobs.states import JobStatus, judge
from pipeline.launch import scheduler
from pipeline.launch.claim import read_claim
from pipeline.launch.lock import read_owner
from pipeline.launch.scheduler import Seen
from pipeline.perform import RESULT


def look(root: Path, records: Sequence[JobRecord]) -> list[JobStatus]:
    """Return how far jobs are; where SLURM does not answer, as far as their directories say."""
    clusters = [cluster_of(record) for record in records]
    seen, here, problem = _ask(records, clusters)
    found = []
    for record, cluster in zip(records, clusters, strict=True):
        # after SLURM was asked, so that what has just ended is not taken for lost
        evidence = {task.name: _read(root / "jobs" / record.name / task.name, task) for task in record.tasks}
        known, why = seen, problem if any(task.slurm for task in record.tasks) else ""
        if cluster and here and cluster != here:
            known, why = None, f"its SLURM jobs are of cluster {cluster}, and this is {here}; ask there"
        found.append(JobStatus(record, judge(record, evidence, known, _runs(record, known)), why))
    return found


def cluster_of(record: JobRecord) -> str | None:
    """Return the cluster that has the SLURM jobs of a job's tasks that are not done; null where nothing says so."""
    for task in record.tasks:
        directory = Path(task.directory)
        if not (directory / MANIFEST).exists():
            claim = read_claim(directory) if task.slurm else None
            owner = read_owner(directory) if record.allocation else None
            if cluster := (claim and claim.cluster) or (owner and owner.get("cluster")):
                return str(cluster)
    return None


def _read(link: Path, task: TaskRecord) -> Evidence:
    """Return what the directory of a task says, to which this link leads once it was made."""
    directory = Path(task.directory)
    if directory.is_dir():
        return read_evidence(directory, task)
    return Evidence(is_gone=task.slurm is not None or link.is_symlink())


def _ask(
    records: Sequence[JobRecord], clusters: Sequence[str | None]
) -> tuple[Mapping[str, Seen] | None, str | None, str]:
    """Return what SLURM says of all tasks of this cluster that are not done, or null; its name; why it cannot be asked.

    Args:
        clusters: Of each job, where that is known.
    """
    try:
        here = scheduler.cluster(pauses_s=()) if any(clusters) else None
        own = [record for record, cluster in zip(records, clusters, strict=True) if cluster in (None, here)]
        return scheduler.look(_ids(own), pauses_s=()), here, ""
    except LaunchError as error:
        return None, None, f"SLURM does not answer: {error}"


def _ids(records: Iterable[JobRecord]) -> set[str]:
    ids = set()
    for record in records:
        for task in record.tasks:
            directory = Path(task.directory)
            if task.slurm and not (directory / MANIFEST).exists():
                claim = read_claim(directory)
                jobs = {task.slurm} | ({claim.slurm} if claim and claim.slurm else set())
                ids |= jobs | {f"{job}_{number}" for job in jobs for number in _silent(directory, task)}
        if record.allocation and any(not (Path(task.directory) / MANIFEST).exists() for task in record.tasks):
            ids.add(scheduler.array_of(record.allocation))
    return ids


def _silent(directory: Path, task: TaskRecord) -> list[int]:
    """Return which elements of an array have not said how they ended."""
    parts = parts_of(task) if task.is_array else []
    return [int(part[1:]) for part in parts if not (directory / WORK / f"{RESULT}{part}.json").exists()]


def _runs(record: JobRecord, seen: Mapping[str, Seen] | None) -> bool:
    """Return whether the process that runs a job lives: in a SLURM job of its own, SLURM says so."""
    if record.allocation is not None:
        return seen is not None and any(
            not one.is_over for id, one in seen.items() if record.allocation in (id, scheduler.array_of(id))
        )
    return launcher_runs(record)
