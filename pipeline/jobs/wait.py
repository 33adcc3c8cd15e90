"""`python -m pipeline wait JOB [root=DIR]`: returns when a job is over, with its exit status.

0 is done; else that of the first task that failed (2 settings, 3 an artifact, 4 a launch, 5 a training), 4 for one that
was lost or never started, 75 for one that was stopped or cancelled. Every change of a task's state is printed.
"""

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from pipeline.errors import LaunchError
from pipeline.jobs.look import look
from pipeline.jobs.record import read_record
from pipeline.jobs.states import DONE, LOST, WAITING, JobStatus, TaskStatus
from pipeline.jobs.status import describe, hints, note
from pipeline.jobs.words import parse

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 10.0
SURE_S = 3.0  # before a task that seems lost is taken for lost: files of another machine may come late


def wait(arguments: Sequence[str]) -> int:
    """Return the exit status of a job once it is over.

    Raises:
        ConfigError: If a word is none of those above.
        ArtifactError: If there is no such job.
        LaunchError: If it is a job of SLURM, and there is none on this machine.
    """
    words = parse("wait", arguments, "JOB")
    for found in follow(words.root, words.names[0]):
        last = found
    print("\n".join([*hints(last, words.root), f"{words.names[0]}: {last.state}"]), flush=True)
    return last.exit_status or 0


def follow(root: Path, name: str) -> Iterator[JobStatus]:
    """Print every change of a task's state until the job is over; yield how far it is each time it was looked at."""
    shown: dict[str, str] = {}
    problem, pause_s, is_sure = "", FIRST_PAUSE_S, False
    while True:
        (found,) = look(root, [read_record(root, name)])
        if found.problem and shutil.which("squeue") is None:
            raise LaunchError(f"{name}: {found.problem}")
        if found.problem and found.problem != problem:
            print(found.problem, file=sys.stderr, flush=True)
        problem = found.problem
        if found.is_over and not is_sure and any(task.state == LOST for task in found.tasks):
            is_sure = True
            time.sleep(SURE_S)
            continue
        is_first = not shown
        for task in found.tasks:
            news = _line(replace(task, waits_for=[]))  # that one of several is done is that one's news
            if shown.get(task.name) != news:
                if not is_first or task.state != DONE:  # what was done before is no news
                    print(f"{datetime.now():%H:%M:%S}  {_line(task)}", flush=True)
                pause_s = FIRST_PAUSE_S
            shown[task.name] = news
        yield found
        if found.is_over:
            return
        time.sleep(pause_s)
        pause_s = min(LONGEST_PAUSE_S, 1.2 * pause_s)


def _line(task: TaskStatus) -> str:
    where = f" on {task.nodes}" if task.nodes and task.state not in (DONE, WAITING) else ""
    return f"{task.name}  {describe(task)}{where}{': ' * bool(note(task))}{note(task)}"
