"""Running a plan: one task after another, each frozen, launched, published and linked; and stopping when asked to."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from pipeline.artifact import MANIFEST, WORK, open_artifact, write_json
from pipeline.env import STOP_SIGNALS, Share, StopRequest
from pipeline.errors import ArtifactError, LaunchError
from pipeline.launch import AnyRun
from pipeline.launch.claim import live_claim
from pipeline.launch.lock import locked
from pipeline.launch.slurm import Slurm
from pipeline.launch.srun import allocated
from pipeline.perform import clear, perform, want
from pipeline.plan import Command, Task
from pipeline.record import TaskRecord, new_record, write_record
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
    root = Path(command.root)
    with StopRequest().listening(*STOP_SIGNALS, signal.SIGHUP, signal.SIGINT) as stop:
        if job is not None and any(task.done is None for task in tasks):
            made = [TaskRecord.of(task, task.run) for task in tasks]
            write_record(root, new_record(job, "local", made, commit()))
        for task in tasks:
            if task.done is None:
                if stop:
                    raise stop.error(f"before {task.name}; the tasks before it are done")
                _run(task, command, job, stop)
                report(task)
            assert task.done is not None
            if job is not None:
                link(root, job, task.name, task.done.path)


def _run(task: Task, command: Command, job: str | None, stop: StopRequest) -> None:
    check_disk(task, command)
    run = allocated(task.run, task.stage) if isinstance(task.run, Slurm) else task.run
    frozen = freeze(task, command, job, run)
    if frozen is not None:
        perform(frozen, Share(world=run.ranks, first=0, count=run.ranks), stop)
    task.done = open_artifact(task.directory, task.stage.produces)


def freeze(task: Task, command: Command, job: str | None, run: AnyRun) -> FrozenTask | None:
    """Write down a task for its ranks, and clear what a killed try left half-written; null if it has been made.

    Raises:
        LaunchError: If another run works in its directory, or a SLURM job is to.
    """
    frozen = FrozenTask(
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
        tracker=command.tracker,
    )
    with locked(task.directory):
        if (task.directory / MANIFEST).exists():  # another run has made it meanwhile
            return None
        if (claim := live_claim(task.directory)) is not None and claim.slurm != os.environ.get("SLURM_JOB_ID"):
            raise LaunchError(
                f"{task.directory}: SLURM job {claim.slurm} of {claim.job} is to work in it; cancel it first"
            )
        clear(task.directory)
        write_json(task.directory / WORK / "task.json", encode(frozen))
        if job is not None:
            want(task.directory, job, task.name)
    return frozen


def check_disk(task: Task, command: Command) -> None:
    """Look that there is room for the output. Raises ArtifactError with what is needed and what is free."""
    artifacts = [open_artifact(path) for path in task.inputs.values() if (path / MANIFEST).exists()]
    input_bytes = sum(record.bytes for artifact in artifacts for record in artifact.manifest.files.values())
    input_bytes += sum(int(size) for files in task.sources.values() for _, size, _ in files)
    need = task.stage.disk_bytes(input_bytes, command.run)
    root = Path(command.root)
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if need > free:
        raise ArtifactError(
            f"{task.where}: needs about {need / 1e6:,.3f} MB in {root}, which has {free / 1e6:,.3f} MB free; "
            "make room or choose another root=DIR"
        )


def link(root: Path, job: str, task: str, target: Path) -> None:
    """Lead `<root>/jobs/<job>/<task>` to an artifact in one step, whatever was there."""
    place = root / "jobs" / job / task
    relative = os.path.relpath(target.absolute(), place.parent.absolute())
    if place.is_symlink() and str(place.readlink()) == relative:
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f"{place.name}.{os.getpid()}.tmp")
    temporary.symlink_to(relative)
    temporary.replace(place)
