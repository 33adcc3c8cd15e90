"""Running a plan: one task after another, each frozen, launched, published and linked; and stopping when asked to."""

import os
import shutil
import signal
import sys
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from pipeline.artifact import MANIFEST, WORK, Artifact, open_artifact, write_json
from pipeline.env import STOP_SIGNALS, Share, StopRequest
from pipeline.errors import ArtifactError, LaunchError
from pipeline.jobs.evidence import launcher_runs
from pipeline.jobs.record import TaskRecord, beginning, new_record, read_record, write_record
from pipeline.jobs.refusals import refuse_elements, refuse_live, refuse_working, under_way
from pipeline.jobs.sharing import deciding
from pipeline.launch import AnyRun
from pipeline.launch.claim import live_claim
from pipeline.launch.lock import locked
from pipeline.launch.scheduler import NoSlurm
from pipeline.launch.slurm import Slurm
from pipeline.launch.srun import allocated
from pipeline.perform import clear, leave_result, perform, want
from pipeline.plan import Command, Task
from pipeline.progress import drop_unwritten
from pipeline.settings import encode
from pipeline.worker import FrozenTask, commit


def execute(tasks: list[Task], command: Command, job: str | None, report: Callable[[Task], None]) -> None:
    """Run what is not done, in order, and lead `<root>/jobs/<job>/<task>` to each artifact.

    Args:
        report: Called with every task that was run, when it has ended well.

    Raises:
        PipelineError: The first failure; the artifacts of the tasks before it stay.
        Preempted: If a signal asked for a stop; what is done stays.
    """
    root, planned = Path(command.root), {task.name: task for task in tasks}
    frozen = [
        freeze(task, command, job, allocated(task.run, task.stage) if isinstance(task.run, Slurm) else task.run)
        for task in tasks
    ]

    def note(task: FrozenTask, made: Artifact) -> None:
        planned[task.name].done = made
        report(planned[task.name])

    with StopRequest().listening(*STOP_SIGNALS, signal.SIGHUP, signal.SIGINT) as stop:
        if job is not None and any(task.done is None for task in tasks):
            made = [TaskRecord.of(task, one.run) for task, one in zip(tasks, frozen, strict=True)]
            with beginning(root, job):
                refuse_running(root, job, frozen)
                write_record(root, new_record(job, "local", made, commit()), frozen)
        execute_frozen(root, frozen, job, stop, note)


def refuse_running(root: Path, job: str, tasks: Sequence[FrozenTask]) -> None:
    """Refuse to start a job anew that is under way, or of whose tasks one is. Raises LaunchError with where it is."""
    with suppress(ArtifactError):  # a new name
        record = read_record(root, job)
        if launcher_runs(record) and record.pid != os.getpid():  # a sweep runs several jobs of one name
            raise under_way(root, job, f"process {record.pid} on {record.host}")
        if record.launcher == "slurm":
            with suppress(NoSlurm):  # brought here from a cluster
                refuse_live(root, job)
    refuse_working([task for task in tasks if not (Path(task.directory) / MANIFEST).exists()])


def execute_frozen(
    root: Path,
    tasks: Sequence[FrozenTask],
    job: str | None,
    stop: StopRequest,
    report: Callable[[FrozenTask, Artifact], None],
) -> None:
    """Run what is not done of frozen tasks, as `execute` does.

    Args:
        report: Called with every task that was run, and what it made.
    """
    for task in tasks:
        directory = Path(task.directory)
        if not (directory / MANIFEST).exists():
            if stop:
                raise stop.error(f"before {task.name}; the tasks before it are done")
            with deciding(directory):
                begun = begin(task)
            if begun:
                _check_disk_of(task, root)
                perform(task, Share(world=task.run.ranks, first=0, count=task.run.ranks), stop)
            made = open_artifact(directory, task.stage.produces)
            try:
                report(task, made)
            except OSError:  # the disk with the log is full, or the terminal was closed: no reason to end the job
                drop_unwritten(sys.stdout)
        if job is not None:
            link(root, job, task.name, directory)


def freeze(task: Task, command: Command, job: str | None, run: AnyRun) -> FrozenTask:
    """Return all that the ranks of a planned task need to know."""
    return FrozenTask(
        name=task.name,
        where=task.where,
        job=job,
        stage=task.stage,
        inputs={name: str(path) for name, path in task.inputs.items()},
        sources=task.sources,
        commit=commit(),
        fingerprint=task.fingerprint,
        directory=str(task.directory),
        run=run,
        memory_bytes=task.memory_bytes,
        tracker=command.tracker,
    )


def begin(task: FrozenTask) -> bool:
    """Write a task down for its ranks, and clear what a killed try left half-written; false if it has been made.

    Raises:
        LaunchError: If another run works in its directory, or a SLURM job is to.
    """
    directory = Path(task.directory)
    with locked(directory):
        if (directory / MANIFEST).exists():  # another run has made it meanwhile
            return False
        refuse_elements(directory)
        if (claim := live_claim(directory)) is not None:
            raise LaunchError(f"{directory}: SLURM job {claim.slurm} of {claim.job} is to work in it; cancel it first")
        clear(directory)
        write_json(directory / WORK / "task.json", encode(task))
        if task.job is not None:
            want(directory, task.job, task.name)
    return True


def needed_bytes(task: FrozenTask) -> tuple[int, bool]:
    """Return an estimate of the disk space that the output of a task needs, and whether all of its inputs are there."""
    inputs = [Path(path) for path in task.inputs.values()]
    artifacts = [open_artifact(path) for path in inputs if (path / MANIFEST).exists()]
    input_bytes = sum(record.bytes for artifact in artifacts for record in artifact.manifest.files.values())
    input_bytes += sum(int(size) for files in task.sources.values() for _, size, _ in files)
    return task.stage.disk_bytes(input_bytes, task.run), len(artifacts) == len(inputs)


def check_disk(task: FrozenTask, root: Path) -> None:
    """Look that there is room for the output. Raises ArtifactError with what is needed and what is free."""
    need, _ = needed_bytes(task)
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if need > free:
        raise ArtifactError(
            f"{task.where}: needs about {need / 1e6:,.3f} MB in {root}, which has {free / 1e6:,.3f} MB free; "
            "make room or choose another root=DIR"
        )


def _check_disk_of(task: FrozenTask, root: Path) -> None:
    """Look that there is room for the output of a task that has been begun; that there is none is its result."""
    try:
        check_disk(task, root)
    except ArtifactError as error:
        leave_result(Path(task.directory), "", error)
        raise


def link(root: Path, job: str, task: str, target: Path) -> None:
    """Lead `<root>/jobs/<job>/<task>` to an artifact in one step, whatever was there."""
    place = root / "jobs" / job / task
    relative = os.path.relpath(target.absolute(), place.parent.absolute())
    if place.is_symlink() and str(place.readlink()) == relative:
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f"{place.name}.{uuid.uuid4().hex}.tmp")
    temporary.symlink_to(relative)
    temporary.replace(place)
