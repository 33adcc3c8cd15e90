"""`python -m pipeline cancel JOB[.TASK] ... [root=DIR]`: ends what waits or runs of jobs; what is done or saved stays.

A task that another job waits for too goes on. A job that runs without SLURM ends as a whole: its launcher is asked to
stop, on the machine where it runs.

Several jobs may be named; the name of a sweep stands for its points, NAME-0, NAME-1, … Each is cancelled, and the exit
status is that of the first that could not be.
"""

import os
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import LaunchError
from pipeline.jobs.look import look
from pipeline.jobs.record import JobRecord, TaskRecord, mark_cancelled, read_record
from pipeline.jobs.sharing import complete, deciding, unwant, who_else_wants
from pipeline.jobs.states import UNKNOWN, JobStatus, TaskStatus
from pipeline.jobs.words import expand, find, for_each, parse, say
from pipeline.launch import scheduler

PATIENCE_S = 120.0  # until what was cancelled has ended: it saves its state first
PAUSE_S = 0.5


def cancel(arguments: Sequence[str]) -> int:
    """Cancel a job, or one task of it; return the exit status.

    Raises:
        ConfigError: If a word is none of those above.
        ArtifactError: If there is no such job or task.
        LaunchError: If it runs on another machine, or SLURM does not answer.
    """
    words = parse("cancel", arguments, "JOB[.TASK]", most=len(arguments))
    cancelled: dict[str, list[str]] = {}
    status = for_each(expand(words.root, words.names), lambda name: _cancel(words.root, name, cancelled))
    deadline = time.monotonic() + PATIENCE_S
    for job, tasks in cancelled.items():
        _wait_for_end(words.root, job, tasks, deadline)
    return status


def _cancel(root: Path, name: str, cancelled: dict[str, list[str]]) -> None:
    """Cancel a job, or one task of it; note under the job's name what ends."""
    record, task = find(root, name)
    if record.launcher == "slurm" and record.pid is not None:
        record = complete(root, record)
    (found,) = look(root, [record])
    if found.problem:
        raise LaunchError(f"{record.name}: nothing was cancelled: {found.problem}")
    live = [one for one in found.tasks if not one.is_over and (task is None or one.name == task.name)]
    if not live:
        print(f"{name}: nothing of it waits or runs", flush=True)
        return
    by_slurm = record.launcher == "slurm"
    ended = _cancel_tasks(root, record, live) if by_slurm else _stop_launcher(record, live)
    if by_slurm:
        mark_cancelled(root, record.name, [one.name for one in live])
    cancelled.setdefault(record.name, []).extend(ended)


def _cancel_tasks(root: Path, record: JobRecord, live: Sequence[TaskStatus]) -> list[str]:
    """Cancel SLURM jobs, from the last task to the first; return the names of those that end."""
    cancelled = []
    by_name = {task.name: task for task in record.tasks}
    for one in reversed(live):
        name = f"{record.name}.{one.name}"
        if one.job_id is not None and (others := _cancel_task(root, record, by_name[one.name], one.job_id)):
            wants = "waits" if len(others) == 1 else "wait"
            print(f"{name}: SLURM job {one.job_id} goes on: {', '.join(others)} {wants} for it too", flush=True)
        elif one.job_id is not None:
            print(f"{name}: cancelled, SLURM job {one.job_id}", flush=True)
            cancelled.append(one.name)
    kept = {task.preflight for task in record.tasks if task.name not in cancelled}
    scheduler.cancel(sorted({by_name[name].preflight or "" for name in cancelled} - {"", *kept}))
    return cancelled


def _cancel_task(root: Path, record: JobRecord, task: TaskRecord, job_id: str) -> list[str]:
    """Cancel the SLURM job of a task, unless other jobs want it; return those."""
    directory = Path(task.directory)
    if not directory.is_dir():
        scheduler.cancel([job_id])
        return []
    with deciding(directory):
        unwant(directory, record.name)
        others = who_else_wants(root, record.name, directory, job_id)
        if not others:
            scheduler.cancel([job_id])
    return others


def _stop_launcher(record: JobRecord, live: Sequence[TaskStatus]) -> list[str]:
    """Ask the process that runs a job to stop; return the names of the tasks that end."""
    if record.allocation is not None:
        scheduler.cancel([record.allocation])
        print(f"{record.name}: cancelled, SLURM job {record.allocation}")
    elif record.host != socket.gethostname() or record.pid is None:
        raise LaunchError(
            f"{record.name}: runs on {record.host}, not on this machine; say there: kill {record.pid}, which lets it "
            "save its state"
        )
    else:
        try:
            os.kill(record.pid, signal.SIGTERM)
        except (ProcessLookupError, PermissionError) as error:
            raise LaunchError(f"{record.name}: process {record.pid} cannot be asked to stop: {error}") from None
        print(f"{record.name}: process {record.pid} was asked to stop", flush=True)
    return [one.name for one in live]


def _wait_for_end(root: Path, name: str, cancelled: Sequence[str], deadline: float) -> None:
    """Wait until those tasks are over, so that they can be started again at once; say which are not."""
    while left := _not_over(look(root, [read_record(root, name)])[0], cancelled):
        if time.monotonic() > deadline:
            print(f"{', '.join(left)}: still saving; {say(f'wait {name}', root)} returns when that is over")
            return
        time.sleep(PAUSE_S)


def _not_over(found: JobStatus, names: Sequence[str]) -> list[str]:
    return [one.name for one in found.tasks if one.name in names and not one.is_over and one.state != UNKNOWN]
