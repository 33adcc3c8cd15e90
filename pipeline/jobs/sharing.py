"""Tasks that several jobs have in common: one SLURM job makes such a task, and it runs as long as one of them wants it.

Every job that has a task leaves a mark in the task's directory, `work/wanted/JOB.TASK`. Cancelling a job takes its
marks away and ends the SLURM jobs that nobody else wants.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.artifact import WORK, write_json
from pipeline.errors import ArtifactError, LaunchError
from pipeline.jobs.evidence import launcher_runs
from pipeline.jobs.record import RECORD, JobRecord, TaskRecord, read_record
from pipeline.launch import scheduler
from pipeline.launch.claim import live_claim
from pipeline.launch.lock import locked
from pipeline.perform import WANTED, wanted
from pipeline.settings import encode

DECIDING = "lock-submit"  # in work/
PATIENCE_S = 60.0  # what a submission of one task takes at the most, with a SLURM that has to be asked again


@contextmanager
def deciding(directory: Path) -> Iterator[int]:
    """Let nobody else decide meanwhile who makes the task in `directory`: held from asking until SLURM has answered.

    Gives the descriptor of the lock: an sbatch that inherits it holds it on should the submission die.

    Raises:
        LaunchError: If somebody else takes too long.
    """
    with locked(directory, DECIDING, PATIENCE_S) as lock:
        yield lock


def who_else_wants(root: Path, job: str, directory: Path, slurm: str) -> list[str]:
    """Return the names of the other jobs that wait for what a SLURM job makes in `directory`.

    A job has given up waiting if it was cancelled, was submitted anew without this task, or waits for another SLURM
    job in this directory; and if all SLURM jobs of its own are over, but have not all ended well.

    Raises:
        LaunchError: If SLURM does not answer.
    """
    found = []
    for other in sorted({name for name, _ in wanted(directory)} - {job}):
        try:
            record = read_record(root, other)
        except ArtifactError:  # it was never submitted, or its record is gone
            continue
        waits = any(task.directory == str(directory.absolute()) and task.slurm == slurm for task in record.tasks)
        if waits and not _has_given_up(record):
            found.append(other)
    return found


def unwant(directory: Path, job: str) -> None:
    """Take away the marks that a job has left in the directory of a task."""
    for name, task in wanted(directory):
        if name == job:
            (directory / WORK / WANTED / f"{name}.{task}").unlink(missing_ok=True)


def complete(root: Path, record: JobRecord) -> JobRecord:
    """Return the record of a job whose submission died with the SLURM job that it was about to note, and leave it so.

    Raises:
        LaunchError: If the job is still being submitted, or SLURM does not answer.
    """
    if launcher_runs(record):
        raise LaunchError(
            f"{record.name}: process {record.pid} on {record.host} is submitting it; wait for that, or end it "
            f"(kill {record.pid}), which takes back what was submitted"
        )
    tasks = []
    for task in record.tasks:
        directory = Path(task.directory)
        if task.slurm is None and (directory / WORK).is_dir():
            with deciding(directory):  # an sbatch may have outlived it
                claim = live_claim(directory)
            if claim is not None and claim.job == record.name:
                task = task.model_copy(update={"slurm": claim.slurm})
        tasks.append(task)
    record = record.model_copy(update={"tasks": tasks, "host": None, "pid": None})
    write_json(root / "jobs" / record.name / RECORD, encode(record))
    return record


def own(record: JobRecord) -> list[TaskRecord]:
    """Return the tasks for which this job has submitted SLURM jobs, and which it has not been cancelled for since."""
    return [
        task
        for task in record.tasks
        if task.slurm and not task.shared_with and (record.name, task.name) in wanted(Path(task.directory))
    ]


def _has_given_up(record: JobRecord) -> bool:
    seen = scheduler.look([task.slurm for task in own(record) if task.slurm]).values()
    return all(one.is_over for one in seen) and any(one.state != "COMPLETED" for one in seen)
