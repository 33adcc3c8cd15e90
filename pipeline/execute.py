"""Running a plan: one task after another, each frozen, launched, published and linked; and stopping when asked to."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.artifact import MANIFEST, WORK, Artifact, open_artifact, write_json
from pipeline.env import STOP_SIGNALS, StopRequest
from pipeline.errors import ArtifactError
from pipeline.launch.local import launch, locked
from pipeline.plan import Command, Task, identify_sources
from pipeline.settings import encode
from pipeline.stage import CHECKPOINTS, SCRATCH
from pipeline.worker import FrozenTask, publish


def execute(tasks: list[Task], command: Command, job: str | None, report: Callable[[Task], None]) -> None:
    """Run what is not done, in order, and lead `<root>/jobs/<job>/<task>` to each artifact.

    Args:
        report: Called with every task that was run, when it has ended well.

    Raises:
        PipelineError: The first failure; the artifacts of the tasks before it stay.
        Preempted: If a signal asked for a stop; what is done stays.
    """
    with StopRequest().listening(*STOP_SIGNALS, signal.SIGHUP, signal.SIGINT) as stop:
        for task in tasks:
            if task.done is None:
                if stop:
                    raise stop.error(f"before {task.name}; the tasks before it are done")
                task.done = _run(task, command, job, stop)
                report(task)
            if job is not None:
                _link(Path(command.root) / "jobs" / job / task.name, task.done.path)


def _run(task: Task, command: Command, job: str | None, stop: StopRequest) -> Artifact:
    began = time.monotonic()
    num_ranks = 1 if task.stage.ranks == "one" else command.run.ranks
    _check_disk(task, command)
    with locked(task.directory) as lock:
        if not (task.directory / MANIFEST).exists():  # another run may have made it while this one waited
            frozen = _freeze(task, command, job)
            _check_sources(task)
            try:
                launch(task.directory, num_ranks, command.run, lock, stop)
            finally:
                _check_sources(task, undo=True)  # what was read is what the fingerprint says
            publish(frozen, time.monotonic() - began, num_ranks)
    return open_artifact(task.directory, task.stage.produces)


def _check_sources(task: Task, undo: bool = False) -> None:
    """Refuse raw files that are no longer those of the plan; `undo` drops the work that may be made of others."""
    for name, identity in identify_sources(task.stage).items():
        if identity != task.sources[name]:
            for unfinished in (WORK + "/units", CHECKPOINTS) if undo else ():
                shutil.rmtree(task.directory / unfinished, ignore_errors=True)
            raise ArtifactError(f"{task.where}.{name}: its files changed while the job ran; run it again")


def _freeze(task: Task, command: Command, job: str | None) -> FrozenTask:
    """Write down the task for its ranks, and clear what a killed try left half-written."""
    frozen = FrozenTask(
        name=task.name,
        job=job,
        stage=task.stage,
        inputs={name: str(path) for name, path in task.inputs.items()},
        fingerprint=task.fingerprint,
        directory=str(task.directory),
        run=command.run,
        tracker=command.tracker,
    )
    shutil.rmtree(task.directory / WORK / "ranks", ignore_errors=True)
    for directory in ("units", "ranks"):
        (task.directory / WORK / directory).mkdir(exist_ok=True)
    shutil.rmtree(task.directory / WORK / SCRATCH, ignore_errors=True)
    for path in task.directory.glob("*.tmp"):
        path.unlink()
    write_json(task.directory / WORK / "task.json", encode(frozen))
    return frozen


def _check_disk(task: Task, command: Command) -> None:
    artifacts = [open_artifact(path) for path in task.inputs.values()]
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


def _link(link: Path, target: Path) -> None:
    """Lead `link` to `target` in one step, whatever was there."""
    relative = os.path.relpath(target, link.parent)
    if link.is_symlink() and str(link.readlink()) == relative:
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    temporary = link.with_name(f"{link.name}.{os.getpid()}.tmp")
    temporary.symlink_to(relative)
    temporary.replace(link)
