"""`python -m pipeline retry JOB ... [root=DIR]`: starts again what of jobs did not end well, exactly as it was.

The settings are those of the time when the job was started, whatever its YAML files say now, and on SLURM so is the
code. What is done is not made again; units of work and checkpoints that are there are continued from.

Several jobs may be named; the name of a sweep stands for its points, NAME-0, NAME-1, … Each is tried, and the exit
status is that of the first that could not be started again, or that failed this time where it ran without SLURM.
"""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipeline.artifact import MANIFEST, Artifact
from pipeline.env import STOP_SIGNALS, StopRequest
from pipeline.errors import ConfigError, LaunchError
from pipeline.execute import execute_frozen, refuse_running
from pipeline.jobs.look import look
from pipeline.jobs.notes import describe, way_out
from pipeline.jobs.record import JobRecord, beginning, launcher_here, now, read_frozen, read_record, write_record
from pipeline.jobs.states import RUNNING, JobStatus
from pipeline.jobs.submit import submit_frozen
from pipeline.jobs.words import expand, for_each, parse, say, say_again
from pipeline.launch.local import Local
from pipeline.operate import made_line, print_submitted
from pipeline.perform import changed_sources
from pipeline.worker import FrozenTask, commit

PATIENCE_S = 120.0
ENDING = "COMPLETING"  # SLURM's state of a job whose processes are being ended


def retry(arguments: Sequence[str]) -> int:
    """Start again what did not end well; return the exit status.

    Raises:
        ConfigError: If a word is none of those above, or raw files are no longer those of the job.
        ArtifactError: If there is no such job, or it was not kept how it was started.
        LaunchError: If it is under way, or cannot be started again here.
        PipelineError: For a job without SLURM, why it failed this time.
    """
    words = parse("retry", arguments, "JOB", most=len(arguments))
    root = words.root.absolute()
    return for_each(expand(root, words.names), lambda name: _retry(root, name))


def _retry(root: Path, name: str) -> None:
    record = read_record(root, name)
    _refuse(root, _look_after_ending(root, record))
    tasks, again = read_frozen(root, record), say_again(record, root)
    with _entered(record):
        left = [task for task in tasks if not (Path(task.directory) / MANIFEST).exists()]
        if not left:
            print(f"{name}: all {len(tasks)} tasks are done; there is nothing to do again")
            return
        _check_sources(left, again)
        if record.launcher == "slurm":
            fresh = {"slurm": None, "preflight": None, "shared_with": None, "cancelled": None}
            planned = {"tasks": [task.model_copy(update=fresh) for task in record.tasks], "submitted": now()}
            record = submit_frozen(root, record.model_copy(update=planned), tasks)
        else:
            _run_here(root, record, tasks)
    if record.launcher == "slurm":
        print_submitted(root, record, tasks)
    else:
        print(f"{name}: done; {say(f'status {name}', root)} shows it")


def _refuse(root: Path, found: JobStatus) -> None:
    """Refuse to start a job again that is under way, where there is more to say of that than that it is."""
    record = found.record
    end = f"end it: {say(f'cancel {record.name}', root)}"
    if record.launcher == "local" and any(task.state == RUNNING for task in found.tasks):
        where = f"process {record.pid} on {record.host}"
        raise LaunchError(f"{record.name}: is under way ({where}); wait for it, or {end}")
    for task in found.tasks:
        if task.shared_with is None and way_out(task):
            raise LaunchError(f"{record.name}: {task.name} is {describe(task)}; say that, or {end}")


def _look_after_ending(root: Path, record: JobRecord) -> JobStatus:
    """Return how far a job is, once SLURM has ended what it is about to end: as after a cancel."""
    deadline, said = time.monotonic() + PATIENCE_S, False
    while True:
        (found,) = look(root, [record])
        if all(task.reason != ENDING for task in found.tasks) or time.monotonic() > deadline:
            return found
        if not said:
            print(f"{record.name}: waits until SLURM has ended what runs", flush=True)
        said = True
        time.sleep(1)


@contextmanager
def _entered(record: JobRecord) -> Iterator[None]:
    """Be where the job was started, for paths that are relative to that. Raises LaunchError if it is gone."""
    here = Path.cwd()
    try:
        os.chdir(record.directory)
    except OSError as error:
        raise LaunchError(
            f"{record.name}: was started in {record.directory}, which cannot be entered ({error.strerror}); start the "
            "job anew"
        ) from None
    try:
        yield
    finally:
        os.chdir(here)


def _check_sources(tasks: Sequence[FrozenTask], again: str) -> None:
    """Refuse raw files that have changed. Raises ConfigError with each setting that names some."""
    problems = [
        f"{setting}: its files have changed since the job was started, so that it would be another job; "
        f"start that: {again}"
        for task in tasks
        for setting in changed_sources(task)
    ]
    if problems:
        raise ConfigError(*problems)


def _run_here(root: Path, record: JobRecord, tasks: Sequence[FrozenTask]) -> None:
    """Run a job again that ran on a machine, with the code that is there now.

    Raises:
        LaunchError: If it ran in an allocation of SLURM.
    """
    if not all(isinstance(task.run, Local) for task in tasks):
        raise LaunchError(
            f"{record.name}: ran inside SLURM job {record.allocation}, which sbatch began by hand; submit that again"
        )
    code = commit()
    tasks = [task.model_copy(update={"commit": code}) for task in tasks]
    record = record.model_copy(update={"commit": code, "submitted": now(), **launcher_here()})
    with StopRequest().listening(*STOP_SIGNALS, signal.SIGHUP, signal.SIGINT) as stop:
        with beginning(root, record.name):
            refuse_running(root, record.name, tasks)
            write_record(root, record, tasks)
        execute_frozen(root, tasks, record.name, stop, _say)


def _say(task: FrozenTask, made: Artifact) -> None:
    print(made_line(task.name, task.stage, made), flush=True)
