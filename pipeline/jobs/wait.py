"""`python -m pipeline wait JOB ... [root=DIR]`: returns when jobs are over, with their exit status.

0 is done; else that of the first task that failed (2 settings, 3 an artifact, 4 a launch, 5 a training), 4 for one that
was lost or never started, 75 for one that was stopped or cancelled. Every change of a task's state is printed, and in
the end what a job has made.

Several jobs may be named; the name of a sweep stands for its points, NAME-0, NAME-1, … The exit status is then that of
the first job that failed, else of the first that was lost, cancelled, stopped or never started, in this order.
"""

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from pipeline.errors import LaunchError
from pipeline.jobs.look import look
from pipeline.jobs.notes import describe, made_by, note
from pipeline.jobs.record import read_record
from pipeline.jobs.states import DONE, GRAVEST, LOST, WAITING, JobStatus, TaskStatus
from pipeline.jobs.status import hints
from pipeline.jobs.words import expand, parse, say
from pipeline.operate import print_made

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 10.0
SURE_S = 3.0  # before a task that seems lost is taken for lost: files of another machine may come late


def wait(arguments: Sequence[str]) -> int:
    """Return the exit status of jobs once they are over.

    Raises:
        ConfigError: If a word is none of those above.
        ArtifactError: If there is no such job.
        LaunchError: If one is a job of SLURM, and there is none on this machine.
    """
    words = parse("wait", arguments, "JOB", most=len(arguments))
    over = follow(words.root, expand(words.root, words.names))
    return min(over, key=lambda job: GRAVEST.index(job.state)).exit_status or 0


def follow(root: Path, names: Sequence[str]) -> list[JobStatus]:
    """Print every change of a task's state until all jobs are over, and the end of each; return how they ended."""
    shown: dict[str, dict[str, tuple[str, str]]] = {name: {} for name in names}
    over: dict[str, JobStatus] = {}
    problems, sure, pause_s = set[str](), set[str](), FIRST_PAUSE_S
    while True:
        looked = look(root, [read_record(root, name) for name in names if name not in over])
        problems = _say_problems(looked, problems)
        lost = {job.record.name for job in looked if job.is_over and any(task.state == LOST for task in job.tasks)}
        for job in looked:
            name = job.record.name
            if name in lost - sure:
                continue
            if _say_news(job, shown[name], f"{name}." if len(names) > 1 else ""):
                pause_s = FIRST_PAUSE_S
            if job.is_over:
                over[name] = job
                _say_end(job, root, len(names) == 1)
        if len(over) == len(names):
            return [over[name] for name in names]
        time.sleep(SURE_S if lost - sure else pause_s)
        pause_s, sure = min(LONGEST_PAUSE_S, 1.2 * pause_s), sure | lost


def _say_problems(looked: Sequence[JobStatus], said: set[str]) -> set[str]:
    """Say why SLURM cannot be asked, if that is news; return it. Raises LaunchError if it never can be from here."""
    problems = {job.problem: job.record.name for job in looked if job.problem}
    for problem, name in problems.items():
        if shutil.which("squeue") is None:
            raise LaunchError(f"{name}: {problem}")
        if problem not in said:
            print(problem, file=sys.stderr, flush=True)
    return {*problems}


def _say_news(job: JobStatus, shown: dict[str, tuple[str, str]], prefix: str) -> bool:
    """Print what has changed since it was last shown; return whether anything has."""
    is_first, has_news = not shown, False
    for task in job.tasks:
        # no news: that one of several is done, which is that one's, how long it is silent, and that a day has ended
        same = replace(task, waits_for=[], begins="", silent_s=None if task.silent_s is None else 0.0)
        news = (_line(same), task.begins)
        if shown.get(task.name) != news:
            has_news = True
            if not is_first or task.state != DONE:  # what was done before is no news
                print(f"{datetime.now():%H:%M:%S}  {prefix}{_line(task)}", flush=True)
        shown[task.name] = news
    return has_news


def _say_end(job: JobStatus, root: Path, is_one: bool) -> None:
    """Print what a job has made and where that is, or how to go on."""
    name = job.record.name
    if job.state == DONE:
        print_made({task.name: made_by(task) for task in job.tasks}, [task.name for task in job.tasks])
    how = hints(job, root) if is_one or job.state == DONE else [f"how to go on: {say(f'status {name}', root)}"]
    print("\n".join([*how, f"{name}: {job.state}"]), flush=True)


def _line(task: TaskStatus) -> str:
    where = f" on {task.nodes}" if task.nodes and task.state not in (DONE, WAITING) else ""
    return f"{task.name}  {describe(task)}{where}{': ' * bool(note(task))}{note(task)}"
