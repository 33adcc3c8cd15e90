"""Runs the ranks of a task as processes on this machine: their signals, their output, and who failed first."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Literal

from pipeline.artifact import WORK
from pipeline.code import PACKAGE
from pipeline.env import ATTEMPT, LAUNCHER, Share, StopRequest, cpus, reserved_port
from pipeline.errors import Preempted
from pipeline.launch.failures import blame, forget_ranks, guessed_reason, left_reason
from pipeline.launch.output import begin_try, heading, rank_log
from pipeline.launch.silence import Silence
from pipeline.progress import drop_unwritten
from pipeline.stage import Run

REDRAW = b"\r\x1b[2K"  # how a progress line begins
GRACE_S = 10.0  # what the ranks that are left get to end after one has failed


class Local(Run):
    """Processes on this machine."""

    kind: Literal["local"] = "local"


def launch(directory: Path, run: Run, attempt: int, lock: int, stop: StopRequest) -> None:
    """Run all ranks of the task frozen in `directory` and return when all of them have ended well.

    A stop is handed on to the ranks, which save their state; a second one ends them at once.

    Args:
        attempt: Number of the try.
        lock: Descriptor of the task's lock, which the ranks inherit.

    Raises:
        PipelineError: What the first rank to fail left as its reason, of the same class.
        LaunchError: If a rank ended without a reason; with the last lines of its log.
        Preempted: If the ranks were asked to stop.
    """
    (directory / "logs").mkdir(exist_ok=True)
    share = Share(world=run.ranks, first=0, count=run.ranks)
    forget_ranks(directory, share)
    silence = Silence(directory, share, run.stall_timeout_s)
    with reserved_port() as port:
        ranks = _start_all(directory, run, {ATTEMPT: str(attempt), "MASTER_PORT": str(port)}, lock)
        failed = _watch(ranks, silence, stop)
    if failed is None:
        return
    status = ranks[failed].returncode
    if silence.was_too_long:
        raise silence.error()
    reason = left_reason(directory, failed)
    if stop and reason is None and -status in (signal.SIGTERM, signal.SIGKILL):
        raise stop.error(f"{directory}: what was done since the last checkpoint or unit will be done again")
    if isinstance(reason, Preempted):
        raise stop.error(str(reason)) if stop else reason
    raise reason or guessed_reason(directory, failed, status)


def _start_all(directory: Path, run: Run, shared: Mapping[str, str], lock: int) -> "list[subprocess.Popen[bytes]]":
    threads = str(run.threads or max(1, cpus() // run.ranks))
    shared = {
        **shared,
        "WORLD_SIZE": str(run.ranks),
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": threads,
        "RAYON_NUM_THREADS": threads,
    }
    return [_start(directory, rank, shared, lock) for rank in range(run.ranks)]


def _watch(ranks: "list[subprocess.Popen[bytes]]", silence: "Silence", stop: StopRequest) -> int | None:
    """Wait for all ranks, handing on what comes; return the first that failed, if one did."""
    stop.hand_on = lambda: _signal_all(ranks, signal.SIGTERM if len(stop.came) == 1 else signal.SIGKILL)
    if stop:
        stop.hand_on()
    try:
        return _wait(ranks, silence)
    finally:
        stop.hand_on = lambda: None


def _start(directory: Path, rank: int, shared: Mapping[str, str], lock: int) -> "subprocess.Popen[bytes]":
    environment = {
        **os.environ,
        **shared,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        # Note: threads that wait for one another spin; on busy processors that costs most of the speed
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "1000"),
        "PIPELINE_TERMINAL_WIDTH": _terminal_width() if rank == 0 else "",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")])),
        LAUNCHER: str(os.getpid()),
    }
    process = subprocess.Popen(
        # -P: not a folder called pipeline where the user happens to be
        [sys.executable, "-P", str(PACKAGE / "rank.py"), str(directory / WORK / "task.json")],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C goes to the launcher alone, which asks the ranks to stop
        pass_fds=[lock],
    )
    begin_try(rank_log(directory, rank), heading(int(shared[ATTEMPT])))
    log = open(rank_log(directory, rank), "ab")  # noqa: SIM115 (closed by the thread)
    process.pump = threading.Thread(target=_pump, args=(process.stdout, log, rank == 0), daemon=True)  # type: ignore[attr-defined]
    process.pump.start()  # type: ignore[attr-defined]
    return process


def _pump(stream: IO[bytes], log: IO[bytes], show: bool) -> None:
    """Copy a rank's output to its log, rank 0's to the terminal too; of a redrawn line only the end is logged.

    Reads to the end whatever happens, or the rank would wait for ever: without a terminal (it was closed) or room for
    the log, what cannot be written is dropped.
    """
    line = b""
    while block := os.read(stream.fileno(), 65536):
        show = show and _show(block)
        *whole, line = (line + block).split(b"\n")
        with suppress(OSError):
            log.writelines(text.rsplit(REDRAW, 1)[-1] + b"\n" for text in whole)
            log.flush()
    if show and REDRAW in line:  # ended in the middle of its progress
        _show(REDRAW)
    with suppress(OSError):
        log.write(line.rsplit(REDRAW, 1)[-1] + b"\n" if line else b"")
    with suppress(OSError):
        log.close()
    stream.close()


def _show(block: bytes) -> bool:
    """Write to the terminal; return whether there still is one."""
    try:
        sys.stdout.buffer.write(block)
        sys.stdout.buffer.flush()
    except (OSError, ValueError, AttributeError):
        drop_unwritten(sys.stdout)
        return False
    return True


def _terminal_width() -> str:
    """Return the width of the terminal, empty where standard output is none."""
    try:
        return str(os.get_terminal_size(1).columns) if os.isatty(1) else ""
    except OSError:
        return ""


def _wait(ranks: "list[subprocess.Popen[bytes]]", silence: "Silence") -> int | None:
    """Wait for all ranks; return the first that failed. Once one has, or all are silent, the others are ended."""
    failed: int | None = None
    deadline = float("inf")
    while None in (statuses := [rank.poll() for rank in ranks]):
        if failed is None and any(statuses):
            failed = _first(statuses)
            preempted = statuses[failed] == Preempted.exit_status
            deadline = time.monotonic() + GRACE_S * (12 if preempted else 1)
            _signal_all(ranks, signal.SIGTERM)
        if time.monotonic() > deadline or silence.is_too_long():
            _signal_all(ranks, signal.SIGKILL)
        time.sleep(0.01)
    for rank in ranks:
        rank.pump.join()  # type: ignore[attr-defined]
    return _first(statuses) if failed is None and any(statuses) else failed


def _first(statuses: Sequence[int | None]) -> int:
    """Return the rank to blame: one that says what is wrong, else that a signal ended, not one that lost its peer."""
    return min((i for i, status in enumerate(statuses) if status), key=lambda i: blame(statuses[i] or 0))


def _signal_all(ranks: "list[subprocess.Popen[bytes]]", number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)
