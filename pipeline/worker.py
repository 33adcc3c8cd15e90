"""One rank of one task, from the frozen file that every rank reads.

`publish` makes the directory an artifact, called once by one process after all ranks have ended well.
"""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import pipeline
from pipeline.artifact import WORK, InputRecord, Made, Manifest, is_disk_full, open_artifact, write_manifest
from pipeline.env import ATTEMPT, ATTEMPT_NAME, Ranks, StopRequest, read_ranks
from pipeline.errors import ArtifactError, PipelineError, TrainingError
from pipeline.launch import AnyRun
from pipeline.launch.failures import leave_reason, short_of_memory
from pipeline.settings import Settings, decode, encode
from pipeline.stage import ATTEMPT_FILE, HEARTBEATS, PARTIAL, PROGRESS, SCRATCH, Context, read_outputs
from pipeline.stages import AnyStage
from pipeline.track import AnyTracker, open_tracker


class FrozenTask(Settings):
    """A task as it was when it was submitted: all that its ranks need to know.

    Attributes:
        where: Dotted path of its settings, for messages.
        inputs: Directory of each input artifact, by the dotted path of the setting that names it.
        sources: Identity of its raw files at planning, by the same.
        commit: Commit of the code at submission, with a + if it was edited since; null outside a checkout.
        memory_bytes: What each rank needs at the least, as `Stage.memory_bytes` estimates it.
    """

    name: str
    where: str = "stage"
    job: str | None
    stage: AnyStage
    inputs: dict[str, str]
    sources: dict[str, Any] = {}
    commit: str | None = None
    fingerprint: str
    directory: str
    run: AnyRun
    memory_bytes: int | None = None
    tracker: AnyTracker

    @property
    def title(self) -> str:
        """What people call it: JOB.TASK."""
        return f"{self.job}.{self.name}" if self.job else self.name


def read_task(path: Path) -> FrozenTask:
    """Read a frozen task. Raises ArtifactError if it is damaged, ConfigError if it is of another version."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{path}: damaged ({error}); run the same command again") from None
    return decode(FrozenTask, data, where=str(path))


def context(task: FrozenTask, ranks: Ranks) -> Context:
    """Open the inputs of a task for one of its ranks."""
    directory = Path(task.directory)
    inputs = {name: open_artifact(Path(path), where=f"{task.name}.{name}") for name, path in task.inputs.items()}
    run_id = directory.name  # TASK-FINGERPRINT, whatever another job that continues it calls the task
    return Context(
        task=task.name,
        directory=directory,
        inputs=inputs,
        settings=task.run,
        ranks=ranks,
        attempt=int(os.environ.get(ATTEMPT, "0")),
        attempt_name=os.environ.get(ATTEMPT_NAME, ATTEMPT_FILE),
        leave_reason=lambda error: leave_reason(directory, ranks.rank, error),
        open_tracker=lambda step: open_tracker(task.tracker, directory, run_id, task.title, encode(task.stage), step),
    )


def work(task: FrozenTask, stop: StopRequest) -> None:
    """Do this rank's share of a task and leave a note of its output."""
    ctx = context(task, read_ranks())
    ctx.should_stop = lambda: bool(stop)
    failed = True
    try:
        task.stage.run(ctx)
        failed = False
    finally:
        ctx.close_tracker(failed)
    ctx.check_attempt()
    ctx.output.save(ctx.directory / WORK / "ranks" / f"{ctx.rank:05d}.json")


def publish(task: FrozenTask, seconds: float, num_ranks: int) -> Manifest:
    """Turn the finished work of all ranks into an artifact and return its manifest."""
    ctx = context(task, Ranks())
    files, stats = read_outputs(ctx.directory)
    ctx.output.files.update(files)
    manifest = Manifest(
        kind=task.stage.produces,
        name=task.name,
        fingerprint=task.fingerprint,
        stage=encode(task.stage),
        inputs={
            name: InputRecord(
                path=artifact.url or os.path.relpath(artifact.path.resolve(), ctx.directory.resolve()),
                fingerprint=artifact.manifest.fingerprint,
            )
            for name, artifact in ctx.inputs.items()
        },
        stats=task.stage.finish(ctx, stats),
        files=dict(sorted(ctx.output.files.items())),
        made=Made(
            version=pipeline.__version__,
            commit=task.commit,
            python=platform.python_version(),
            host=platform.node(),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(seconds, 3),
            ranks=num_ranks,
        ),
    )
    write_manifest(ctx.directory, manifest)
    for notes in ("units", "ranks", HEARTBEATS, PARTIAL, PROGRESS, SCRATCH):
        shutil.rmtree(ctx.directory / WORK / notes, ignore_errors=True)
    return manifest


def main(stop: StopRequest) -> None:
    """Run this process's rank; leave the reason of a failure for the launcher and exit with its status."""
    directory = Path(sys.argv[1]).parent.parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the launcher's
    try:
        work(read_task(Path(sys.argv[1])), stop)
    except PipelineError as error:
        _fail(directory, error)
    except Exception as error:
        if isinstance(error, OSError) and is_disk_full(error):
            full = ArtifactError(f"{directory}: the disk is full; make room and run the same command again")
            _fail(directory, full)
        if not is_out_of_memory(error):
            raise
        where = f"{directory}: rank {read_ranks().rank} on {platform.node()} ran out of memory"
        said = (str(error) or type(error).__name__).splitlines()[0]
        _fail(directory, TrainingError(f"{where}: {short_of_memory(directory)} ({said})"))


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory was asked for and not given: by Python, the machine or, as torch says it, a GPU."""
    words = ("can't allocate memory", "out of memory", "Cannot allocate memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | OSError) and any(word in str(error) for word in words)
    )


def _fail(directory: Path, error: PipelineError) -> NoReturn:
    leave_reason(directory, read_ranks().rank, error)
    sys.exit(error.exit_status)


@cache  # of this process: a plan of many tasks asks for each
def commit() -> str | None:
    """Return the commit of the code that runs, with a + if it was edited since; null outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    whose = [*git, "ls-files", "--error-unmatch", Path(__file__).name]  # it may be installed in another's checkout
    command = [*git, "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        subprocess.run(whose, capture_output=True, check=True)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
