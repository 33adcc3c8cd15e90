"""`python -m pipeline logs JOB.TASK [--rank 3] [--follow] [--lines N] [root=DIR]`: what a rank of a task has printed.

Rank 0 unless another is named; the whole log unless --lines says how many of the last ones. --follow prints what comes,
through every requeue, until the task is over. Where the rank has printed nothing, the log of the SLURM job is shown.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import ArtifactError, ConfigError
from pipeline.jobs.evidence import directory_of, tail
from pipeline.jobs.look import look
from pipeline.jobs.record import TaskRecord, read_record
from pipeline.jobs.states import DONE, RUNNING, TaskStatus
from pipeline.jobs.words import find_task, parse
from pipeline.launch.failures import rank_log

FLAGS = {"--rank": int, "--follow": bool, "--lines": int}
BLOCK_BYTES = 1 << 20
PAUSE_S = 0.3  # before more is looked for
LOOK_S = 3.0  # before the state is looked at again
JOB_LOG_BYTES = 8192


def logs(arguments: Sequence[str]) -> int:
    """Print the log of a rank; return the exit status.

    Raises:
        ConfigError: If a word is none of those above, or the task has no such rank.
        ArtifactError: If there is no such job or task, or it has no log.
    """
    words = parse("logs", arguments, "JOB.TASK", FLAGS)
    name, rank = words.names[0], int(words.flags.get("--rank", 0))
    record, task = find_task(words.root, name)
    if rank >= task.ranks:
        raise ConfigError(
            f"logs: --rank {rank}: {name} has {task.ranks} rank{'s, from 0 on' if task.ranks > 1 else ', number 0'}"
        )
    directory = directory_of(words.root, task)
    log = rank_log(directory, rank)
    reader = Reader(log)
    if "--lines" in words.flags:
        reader.skip_to_last(int(words.flags["--lines"]))
    is_shown = reader.print_new()
    if words.flags.get("--follow"):
        try:
            is_shown = _follow(words.root, record.name, task.name, reader) or is_shown
        except KeyboardInterrupt:
            return 0
    if not is_shown and (not log.exists() or log.stat().st_size == 0):  # srun makes the file before the rank begins
        _print_job_log(words.root, record.name, directory, task, rank)
    return 0


class Reader:
    """Prints what is in a file and what comes to it; a file that begins anew is printed anew."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at = 0
        self._inode: int | None = None

    def skip_to_last(self, lines: int) -> None:
        """Leave out what is before the last lines."""
        try:
            with open(self.path, "rb") as file:
                self._inode = os.fstat(file.fileno()).st_ino
                self._at = _last_lines_begin(file.fileno(), lines)
        except OSError:
            pass  # not there yet: all of it is new

    def print_new(self) -> bool:
        """Print what came since the last time; return whether there was any."""
        came = False
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
                    came = True
        except FileNotFoundError:
            return False
        sys.stdout.flush()
        return came


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


def _follow(root: Path, job: str, task: str, reader: Reader) -> bool:
    """Print what comes until the task is over; return whether anything came."""
    came, said, looked = False, "", 0.0
    while True:
        if time.monotonic() - looked > LOOK_S:
            looked = time.monotonic()
            state = _state(root, job, task)
            if not state.is_over and state.state != "running" and state.state + state.reason != said:
                said = state.state + state.reason
                print(f"{job}.{task}: {state.state} {state.reason}".rstrip(), file=sys.stderr, flush=True)
            if state.is_over:  # read once more after that: it may have had last words
                came = reader.print_new() or came
                if state.state != DONE:
                    error = f": {state.error}" if state.error else ""
                    print(f"{job}.{task}: {state.state}{error}", file=sys.stderr, flush=True)
                return came
        came = reader.print_new() or came
        time.sleep(PAUSE_S)


def _state(root: Path, job: str, task: str) -> TaskStatus:
    (found,) = look(root, [read_record(root, job)])
    return next(one for one in found.tasks if one.name == task)


def _print_job_log(root: Path, job: str, directory: Path, task: TaskRecord, rank: int) -> None:
    """Print the end of what the SLURM job of a task has printed, where the rank has printed nothing.

    Raises:
        ArtifactError: If it has printed nothing either.
    """
    log = directory / "logs" / (f"job-{rank:05d}.log" if task.is_array else "job.log")
    if text := tail(log, JOB_LOG_BYTES):
        print(f"rank {rank} has printed nothing; the end of {log}:", file=sys.stderr, flush=True)
        print(text, end="" if text.endswith("\n") else "\n")
        return
    state = _state(root, job, task.name)
    if state.state in (DONE, RUNNING):
        print(f"{job}.{task.name}: rank {rank} has printed nothing; the task is {state.state}", file=sys.stderr)
        return
    why = f"; {state.error}" if state.error else ""
    raise ArtifactError(f"{job}.{task.name}: there is no log of rank {rank}: the task is {state.state}{why}")
