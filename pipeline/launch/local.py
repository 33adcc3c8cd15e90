"""Runs the ranks of a task as processes on this machine: their signals, their output, and who failed first."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from pipeline import errors
from pipeline.artifact import WORK
from pipeline.env import STOP_SIGNALS, cpus
from pipeline.errors import ConfigError, LaunchError, PipelineError, Preempted
from pipeline.stage import Run

REDRAW = b"\r\x1b[2K"  # how a progress line begins
GRACE_S = 10.0  # what the ranks that are left get to end after one has failed


class Local(Run):
    """Processes on this machine."""

    kind: Literal["local"] = "local"


class Interrupted(Preempted):
    """Ctrl-C: state saved, the same command continues."""

    exit_status = 130


@contextmanager
def locked(directory: Path) -> Iterator[int]:
    """Hold the directory of a task, so that two runs never write one; give the descriptor that ranks inherit.

    The lock lives until the launcher and every rank that inherited it are gone, however they end.

    Raises:
        LaunchError: If another run holds it.
    """
    (directory / WORK).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory / WORK / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield descriptor
    except BlockingIOError:
        owner = (directory / WORK / "lock").read_text("utf-8") or "another process"
        raise LaunchError(f"{directory}: {owner} is working in it; wait for it or end it") from None
    finally:
        os.close(descriptor)


def launch(directory: Path, num_ranks: int, run: Run, lock: int) -> None:
    """Run `num_ranks` ranks of the task frozen in `directory` and return when all have ended well.

    Raises:
        PipelineError: What the first rank to fail left as its reason, of the same class.
        LaunchError: If a rank ended without a reason; with the last lines of its log.
        Preempted: If the ranks were asked to stop and saved their state.
    """
    (directory / "logs").mkdir(exist_ok=True)
    for old in (directory / WORK).glob("failure-*.json"):
        old.unlink()
    threads = run.threads or max(1, cpus() // num_ranks)
    port = _free_port() if num_ranks > 1 else 0
    ranks = [_start(directory, rank, num_ranks, threads, port, lock) for rank in range(num_ranks)]
    with _forwarded(ranks) as stopped:
        failed = _wait(ranks)
    if failed is None:
        return
    error = _reason(directory, failed, ranks[failed].returncode)
    if isinstance(error, Preempted) and stopped == [signal.SIGINT]:
        raise Interrupted(str(error))
    if stopped and not isinstance(error, Preempted):  # stopped before it could listen: nothing was lost
        error = Interrupted("stopped") if stopped == [signal.SIGINT] else Preempted("stopped")
    raise error


def _start(directory: Path, rank: int, num_ranks: int, threads: int, port: int, lock: int) -> "subprocess.Popen[bytes]":
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(threads),
        "RAYON_NUM_THREADS": str(threads),
        # Note: threads that wait for one another spin; on busy processors that costs most of the speed
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "1000"),
        "PIPELINE_TERMINAL_WIDTH": str(os.get_terminal_size(1).columns) if sys.stdout.isatty() and rank == 0 else "",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.worker", str(directory / WORK / "task.json")],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C goes to the launcher alone, which asks the ranks to stop
        pass_fds=[lock],
    )
    log = open(directory / "logs" / f"rank-{rank:05d}.log", "ab")  # noqa: SIM115 (closed by the thread)
    process.pump = threading.Thread(target=_pump, args=(process.stdout, log, rank == 0), daemon=True)  # type: ignore[attr-defined]
    process.pump.start()  # type: ignore[attr-defined]
    return process


def _pump(stream: IO[bytes], log: IO[bytes], show: bool) -> None:
    """Copy a rank's output to its log, rank 0's to the terminal too; of a redrawn line only the end is logged."""
    with log:
        line = b""
        while block := os.read(stream.fileno(), 65536):
            if show:
                sys.stdout.buffer.write(block)
                sys.stdout.buffer.flush()
            *whole, line = (line + block).split(b"\n")
            log.writelines(text.rsplit(REDRAW, 1)[-1] + b"\n" for text in whole)
            log.flush()
        log.write(line.rsplit(REDRAW, 1)[-1] + b"\n" if line else b"")
    if show and REDRAW in line:  # ended in the middle of its progress
        sys.stdout.buffer.write(REDRAW)
        sys.stdout.buffer.flush()


@contextmanager
def _forwarded(ranks: "list[subprocess.Popen[bytes]]") -> Iterator[list[int]]:
    """Ask the ranks to stop when this process is asked to; the second time, end them. Gives the signals that came."""
    came: list[int] = []

    def forward(number: int, _frame: object) -> None:
        came.append(number)
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(signal.SIGTERM if len(came) == 1 else signal.SIGKILL)

    previous = {number: signal.signal(number, forward) for number in (*STOP_SIGNALS, signal.SIGINT)}
    try:
        yield came
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(ranks: "list[subprocess.Popen[bytes]]") -> int | None:
    """Wait for all ranks; return the first that failed. Once one has, the others are ended."""
    failed: int | None = None
    deadline = float("inf")
    while None in (statuses := [rank.poll() for rank in ranks]):
        if failed is None and any(statuses):
            failed = _first(statuses)
            preempted = statuses[failed] == Preempted.exit_status
            deadline = time.monotonic() + GRACE_S * (12 if preempted else 1)
            _signal_all(ranks, signal.SIGTERM)
        if time.monotonic() > deadline:
            _signal_all(ranks, signal.SIGKILL)
        time.sleep(0.01)
    for rank in ranks:
        rank.pump.join()  # type: ignore[attr-defined]
    return _first(statuses) if failed is None and any(statuses) else failed


def _first(statuses: Sequence[int | None]) -> int:
    """Return the rank to blame: one that a signal ended, before those that only lost their peer."""
    return min((i for i, status in enumerate(statuses) if status), key=lambda i: (statuses[i] or 0) > 0)


def _signal_all(ranks: "list[subprocess.Popen[bytes]]", number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)


def leave_reason(directory: Path, rank: int, error: PipelineError) -> None:
    """Leave the reason why this rank fails where `launch` finds it."""
    problems = error.problems if isinstance(error, ConfigError) else [str(error)]
    data = {"class": type(error).__name__, "problems": list(problems)}
    (directory / WORK / f"failure-{rank:05d}.json").write_text(json.dumps(data))


def _reason(directory: Path, rank: int, status: int) -> PipelineError:
    note = directory / WORK / f"failure-{rank:05d}.json"
    if note.exists():
        data: Mapping[str, Any] = json.loads(note.read_text("utf-8"))
        kind: type[PipelineError] = getattr(errors, data["class"], PipelineError)
        return kind(*data["problems"])
    log = directory / "logs" / f"rank-{rank:05d}.log"
    last = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
    return LaunchError(f"{directory}: rank {rank} {how}; the same command continues; the end of {log}:\n{last}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
