"""What was started under a name: `<root>/jobs/NAME/job.json`, for `status`, `wait`, `logs`, `cancel` and `retry`.

It says which tasks the job has and where they are. How far they are is read from their directories, and what waits or
runs from SLURM: the record itself never claims success.
"""

import fcntl
import json
import os
import socket
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pipeline.artifact import write_json
from pipeline.errors import ArtifactError, ConfigError
from pipeline.launch import AnyRun
from pipeline.launch.lock import slurm_job
from pipeline.plan import Task
from pipeline.settings import Settings, decode, encode, nearest
from pipeline.worker import FrozenTask

FORMAT = 1
RECORD = "job.json"
BEGINNING = "job.lock"  # beside it: held by who begins a job of this name
FROZEN = "tasks.json"  # beside it: the tasks as they were when the job was started


class TaskRecord(Settings):
    """A task of a job.

    Attributes:
        directory: Of its artifact, absolute.
        needs: The tasks of this job whose output it reads.
        ranks: Its processes.
        is_array: Whether each is an element of an array of jobs.
        slurm: Id of its SLURM job; null before it was submitted, where it was done already, or without SLURM.
        preflight: Id of the SLURM job that tries its nodes first.
        shared_with: The job that submitted it, where another one did.
        cancelled: When `cancel` ended it, or no longer waited for what another job submitted; in UTC.
    """

    name: str
    kind: str
    directory: str
    fingerprint: str
    needs: list[str]
    ranks: int
    is_array: bool = False
    slurm: str | None = None
    preflight: str | None = None
    shared_with: str | None = None
    cancelled: str | None = None

    @classmethod
    def of(cls, task: Task, run: AnyRun) -> "TaskRecord":
        """Return the record of a planned task."""
        return cls(
            name=task.name,
            kind=task.stage.kind,
            directory=str(task.directory.absolute()),
            fingerprint=task.fingerprint,
            needs=list(dict.fromkeys(task.needs.values())),
            ranks=run.ranks,
        )


class JobRecord(Settings):
    """A job that was started.

    Attributes:
        launcher: What runs it.
        command: The words that started it, and
        directory: the directory in which they were said.
        commit: Of the code; null outside a checkout.
        code: Directory of the code that its SLURM jobs run; null where that is the caller's own.
        submitted: When, in UTC.
        host: Machine of the process that runs it, where it is run by one, and
        pid: the number of that process, and
        allocation: the SLURM job that this process is in.
        tasks: In the order in which they can run.
    """

    format: Literal[1] = 1
    name: str
    launcher: Literal["local", "slurm"]
    command: list[str]
    directory: str
    commit: str | None
    code: str | None = None
    submitted: str
    host: str | None = None
    pid: int | None = None
    allocation: str | None = None
    tasks: list[TaskRecord]


def new_record(
    name: str, launcher: Literal["local", "slurm"], tasks: list[TaskRecord], commit: str | None, code: str | None = None
) -> JobRecord:
    """Return the record of a job that this command line starts now."""
    return JobRecord(
        name=name,
        launcher=launcher,
        command=sys.argv[1:],
        directory=str(Path.cwd()),
        commit=commit,
        code=code,
        submitted=now(),
        **(launcher_here() if launcher == "local" else {}),
        tasks=tasks,
    )


def now() -> str:
    """Return the time in UTC, as a record has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def launcher_here() -> dict[str, Any]:
    """Return what a record says of this process as the one that runs the job."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "allocation": slurm_job()}


@contextmanager
def beginning(root: Path, name: str) -> Iterator[None]:
    """Let nobody else begin a job of this name meanwhile: from looking whether one is under way until that is noted."""
    directory = root / "jobs" / name
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / BEGINNING, "ab") as lock:
        with suppress(OSError):  # of a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_record(root: Path, record: JobRecord, tasks: Sequence[FrozenTask]) -> None:
    """Write a record and the frozen tasks of its job down, in the place of the last ones of its name."""
    directory = root / "jobs" / record.name
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / FROZEN, {"tasks": [encode(task) for task in tasks]})
    write_json(directory / RECORD, encode(record))


def mark_cancelled(root: Path, name: str, tasks: Collection[str]) -> None:
    """Note in the record of a job that `cancel` has ended these tasks of it: SLURM forgets that in minutes."""
    with beginning(root, name):
        record = read_record(root, name)
        marked = [task.model_copy(update={"cancelled": now()}) if task.name in tasks else task for task in record.tasks]
        write_json(root / "jobs" / name / RECORD, encode(record.model_copy(update={"tasks": marked})))


def read_frozen(root: Path, record: JobRecord) -> list[FrozenTask]:
    """Return the tasks of a job as they were frozen when it was started. Raises ArtifactError if they are not there."""
    path = root / "jobs" / record.name / FROZEN
    try:
        tasks = decode(_Frozen, json.loads(path.read_text("utf-8"))).tasks
    except (OSError, ValueError, ConfigError) as error:
        raise ArtifactError(f"{path}: cannot be read ({_first_line(error)}); start the job again") from None
    names, wanted = [task.name for task in tasks], [task.name for task in record.tasks]
    if names != wanted:
        found = ", ".join(names) or "none"
        raise ArtifactError(f"{path}: wanted the tasks {', '.join(wanted)}, found {found}; start the job again")
    if any(one.fingerprint != other.fingerprint for one, other in zip(tasks, record.tasks, strict=True)):
        raise ArtifactError(f"{path}: is of another start of the job than {RECORD} beside it; start the job again")
    return [_moved(task, Path(record.directory), root.absolute()) for task in tasks]


def _moved(task: FrozenTask, started: Path, root: Path) -> FrozenTask:
    """Return a task in the root in which it is found, which may have been moved or copied since.

    Args:
        started: The directory in which the job was started: what is relative is relative to that.
    """
    old = Path(os.path.normpath(started / task.directory)).parent.parent
    if old == Path(os.path.normpath(root)):
        return task
    within = {name: Path(os.path.normpath(started / path)) for name, path in task.inputs.items()}
    moved = {name: str(root / path.relative_to(old)) for name, path in within.items() if path.is_relative_to(old)}
    return task.model_copy(update={"directory": _place(root, task.directory), "inputs": {**task.inputs, **moved}})


def _place(root: Path, directory: str) -> str:
    """Return where the directory of a task is in this root: `<root>/KIND/NAME-FINGERPRINT`."""
    return str(root.absolute().joinpath(*Path(directory).parts[-2:]))


class _Frozen(Settings):
    tasks: list[FrozenTask]


def read_record(root: Path, name: str) -> JobRecord:
    """Return the record of a job, with its places in this root, also after that was moved or copied.

    Raises:
        ArtifactError: If none was started under this name, with the nearest, or it is damaged.
    """
    path = root / "jobs" / name / RECORD
    try:
        data = json.loads(path.read_text("utf-8"))
        if isinstance(data, dict) and data.get("format", FORMAT) != FORMAT:
            raise ConfigError(f"another version of the pipeline wrote it: format {data['format']}, wanted {FORMAT}")
        record = decode(JobRecord, data)
    except FileNotFoundError:
        known = [record.parent.name for record in (root / "jobs").glob(f"*/{RECORD}")]
        if (job := name.rpartition(".")[0]) in known:
            raise ArtifactError(f"{name}: wanted a job, and this is a task of one; say '{job}'") from None
        hint = nearest(name, known)
        where = "" if "did you mean" in hint else "; root=DIR says where"
        raise ArtifactError(f"{name}: no job of this name was started in {root}{hint}{where}") from None
    except (OSError, ValueError, ConfigError) as error:
        raise ArtifactError(
            f"{path}: damaged ({_first_line(error)}); look whether jobs of it are in the queue (squeue --me "
            f"--format '%i %j', those called {name}.*) and end them (scancel), then delete or move the file and start "
            "the job again"
        ) from None
    return _placed(record, root)


def _placed(record: JobRecord, root: Path) -> JobRecord:
    """Return a record with its places in this root; what waits or runs for a root that it is a copy of is not its own.

    A root that was moved keeps that: it can be cancelled.
    """
    recorded = Path(record.tasks[0].directory).parent.parent if record.tasks else root
    is_copy = recorded.is_dir() and not recorded.samefile(root)
    code = record.code if record.code is None else _place(root, record.code)  # `<root>/code/HASH`
    tasks = [task.model_copy(update={"directory": _place(root, task.directory)}) for task in record.tasks]
    if is_copy:
        tasks = [task.model_copy(update={"slurm": None, "preflight": None, "shared_with": None}) for task in tasks]
        record = record.model_copy(update={"host": None, "pid": None, "allocation": None})
    return record.model_copy(update={"tasks": tasks, "code": code})


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
