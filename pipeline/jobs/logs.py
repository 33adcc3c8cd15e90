"""`python -m pipeline logs JOB.TASK [--rank 3] [--job] [--follow] [--lines N] [root=DIR]`: what a rank has printed.

Rank 0 unless another is named; of an array of which an element has failed, that one. What the newest try has printed,
unless --lines says how many of the last lines, of whichever tries. --follow prints what comes, through every requeue,
until the task is over. --job shows the log of the SLURM job instead, in which is why it began or ended; it is shown too
where the rank has printed nothing, and that of the preflight where this has failed. The last line is how the task is,
and why: what it has made, what it waits for, how it or its last try ended.
"""

import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pipeline.errors import ArtifactError, ConfigError
from pipeline.jobs.look import look
from pipeline.jobs.notes import reason, why_waiting
from pipeline.jobs.record import read_record
from pipeline.jobs.states import DONE, FAILED, LOST, NEVER, RUNNING, TaskStatus, predicate
from pipeline.jobs.words import expand, find_task, parse
from pipeline.launch.output import TRY, newest_try, rank_log

FLAGS = {"--rank": int, "--job": bool, "--follow": bool, "--lines": int}
HEADER = f"\n{TRY}".encode()
BLOCK_BYTES = 1 << 20
PAUSE_S = 0.3  # before more is looked for
LOOK_S = 3.0  # before the state is looked at again


def logs(arguments: Sequence[str]) -> int:
    """Print the log of a rank; return the exit status.

    Raises:
        ConfigError: If a word is none of those above, or the task has no such rank.
        ArtifactError: If there is no such job or task, or it has no log.
    """
    words = parse("logs", arguments, "JOB.TASK", FLAGS)
    lines, (name, *others) = words.flags.get("--lines"), expand(words.root, words.names)
    if others:
        raise ConfigError(f"logs: {words.names[0]}: there are several; say which: {', '.join((name, *others))}")
    record, task = find_task(words.root, name)
    if (rank := words.flags.get("--rank")) is None:
        rank = (_state(words.root, record.name, task.name).element or 0) if task.is_array else 0
    if rank >= task.ranks:
        raise ConfigError(
            f"logs: --rank {rank}: {name} has {task.ranks} rank{'s, from 0 on' if task.ranks > 1 else ', number 0'}"
        )
    directory = Path(task.directory)
    job_log = directory / "logs" / (f"job-{rank:05d}.log" if task.is_array else "job.log")
    log = job_log if words.flags.get("--job") else rank_log(directory, rank)
    reader = Reader(log, lines)
    reader.print_new()
    if words.flags.get("--follow"):
        try:
            state = _follow(words.root, record.name, task.name, reader)
        except KeyboardInterrupt:
            return 0
    else:
        state = _state(words.root, record.name, task.name)
    is_refused, is_bare = state.state == NEVER and task.preflight is not None, not newest_try(log)
    if is_refused or is_bare:
        other = directory / "logs/preflight.log" if is_refused else job_log
        what = f"{name}: {'its SLURM job' if log == job_log else f'rank {rank}'}"
        _print_instead(log, what, other, lines, state)
    if is_bare or reason(state) or state.state not in (DONE, RUNNING):
        print(f"{name} {_how(state)}", file=sys.stderr)
    return 0


class Reader:
    """Prints what is in a file and what comes to it; a file that begins anew is printed anew."""

    def __init__(self, path: Path, lines: int | None = None) -> None:
        """Begin at the last lines; without a number, at the newest try."""
        self.path = path
        self._at = 0
        self._inode: int | None = None
        with suppress(OSError), open(path, "rb") as file:  # or it is not there yet: all of it is new
            number = file.fileno()
            self._inode = os.fstat(number).st_ino
            self._at = _newest_try_begins(number) if lines is None else _last_lines_begin(number, lines)

    def print_new(self) -> None:
        """Print what came since the last time."""
        try:
            with open(self.path, "rb") as file:
                status = os.fstat(file.fileno())
                if self._inode not in (None, status.st_ino) or status.st_size < self._at:
                    self._at = 0
                self._inode = status.st_ino
                file.seek(self._at)
                while block := file.read(BLOCK_BYTES):
                    sys.stdout.buffer.write(block)
                    self._at += len(block)
        except FileNotFoundError:
            return
        sys.stdout.flush()


def _newest_try_begins(descriptor: int) -> int:
    """Return where the line is that opens the newest try; it is read backwards, block by block."""
    end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - BLOCK_BYTES)
        at = os.pread(descriptor, end - start + len(HEADER), start).rfind(HEADER)
        if at >= 0:
            return start + at + 1
        end = start
    return 0


def _last_lines_begin(descriptor: int, lines: int) -> int:
    """Return where the last lines of a file begin; it is read backwards, block by block."""
    end = position = os.fstat(descriptor).st_size
    if lines == 0:
        return end
    left = lines
    while position > 0:
        start = max(0, position - BLOCK_BYTES)
        block = os.pread(descriptor, position - start, start)
        if position == end:
            block = block.removesuffix(b"\n")  # the end of the last line begins no other
        count = block.count(b"\n")
        if count >= left:
            at = len(block)
            for _ in range(left):
                at = block.rindex(b"\n", 0, at)
            return start + at + 1
        left -= count
        position = start
    return 0


def _follow(root: Path, job: str, task: str, reader: Reader) -> TaskStatus:
    """Print what comes until the task is over; return how it is then."""
    said, looked = "", 0.0
    while True:
        if time.monotonic() - looked > LOOK_S:
            looked = time.monotonic()
            state = _state(root, job, task)
            if not state.is_over and state.state != RUNNING and _how(state) != said:
                said = _how(state)
                print(f"{job}.{task} {said}", file=sys.stderr, flush=True)
            if state.is_over:  # read once more after that: it may have had last words
                reader.print_new()
                return state
        reader.print_new()
        time.sleep(PAUSE_S)


def _state(root: Path, job: str, task: str) -> TaskStatus:
    (found,) = look(root, [read_record(root, job)])
    return next(one for one in found.tasks if one.name == task)


def _print_instead(log: Path, what: str, other: Path, lines: int | None, state: TaskStatus) -> None:
    """Print another log than that which was asked for.

    Args:
        what: Whose log was asked for.

    Raises:
        ArtifactError: If neither has anything.
    """
    nothing = "" if newest_try(log) else f"{what} has printed nothing{' in this try' * log.is_file()}"
    if not log.is_file() and (state.state == DONE or (state.is_over and state.tries)):  # somebody has deleted it
        nothing = f"{log} is not there"
    if newest_try(other):
        print(f"{nothing}{'; ' * bool(nothing)}{other}:", file=sys.stderr, flush=True)
        Reader(other, lines).print_new()
    elif nothing and state.state not in (DONE, RUNNING, FAILED, LOST):
        raise ArtifactError(f"{nothing}; the task {_how(state)}")
    elif nothing:
        print(nothing, file=sys.stderr)


def _how(state: TaskStatus) -> str:
    """Return how a task is or has ended, where, and why."""
    place = " on ".join(filter(None, [f"SLURM job {state.job_id}" if state.job_id else "", state.nodes]))
    why = reason(state)
    how = f"{predicate(state.state)}{why_waiting(state)}"
    return f"{how}{f' ({place})' * bool(place and not why_waiting(state))}{f': {why}' * bool(why)}"
