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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

from pipeline import errors
from pipeline.artifact import WORK, atomic, write_json
from pipeline.env import ATTEMPT, LAUNCHER, StopRequest, cpus
from pipeline.errors import ArtifactError, ConfigError, LaunchError, PipelineError, Preempted
from pipeline.stage import ATTEMPT_FILE, HEARTBEATS, Run

REDRAW = b"\r\x1b[2K"  # how a progress line begins
PACKAGE = Path(__file__).resolve().parent.parent
GRACE_S = 10.0  # what the ranks that are left get to end after one has failed


class Local(Run):
    """Processes on this machine."""

    kind: Literal["local"] = "local"


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


def begin_attempt(directory: Path) -> int:
    """Return the number of a new try at the task in `directory`; those of earlier tries may no longer write there."""
    path = directory / WORK / ATTEMPT_FILE
    try:
        number = int(path.read_text("ascii")) + 1
    except FileNotFoundError:
        number = 1
    except ValueError as error:
        raise ArtifactError(f"{path}: damaged ({error}); delete it if nobody else works here") from None
    with atomic(path) as temporary:
        temporary.write_text(str(number), "ascii")
    return number


def launch(directory: Path, num_ranks: int, run: Run, lock: int, stop: StopRequest) -> None:
    """Run `num_ranks` ranks of the task frozen in `directory` and return when all have ended well.

    A stop is handed on to the ranks, which save their state; a second one ends them at once.

    Raises:
        PipelineError: What the first rank to fail left as its reason, of the same class.
        LaunchError: If a rank ended without a reason; with the last lines of its log.
        Preempted: If the ranks were asked to stop.
    """
    (directory / "logs").mkdir(exist_ok=True)
    for old in (directory / WORK).glob("failure-*.json"):
        old.unlink()
    threads = run.threads or max(1, cpus() // num_ranks)
    shared = {
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port() if num_ranks > 1 else 0),
        "OMP_NUM_THREADS": str(threads),
        "RAYON_NUM_THREADS": str(threads),
        ATTEMPT: str(begin_attempt(directory)),
    }
    ranks = [_start(directory, rank, shared, lock) for rank in range(num_ranks)]
    stop.hand_on = lambda: _signal_all(ranks, signal.SIGTERM if len(stop.came) == 1 else signal.SIGKILL)
    if stop:
        stop.hand_on()
    silence = Silence(directory, num_ranks, run.stall_timeout_s)
    failed = _wait(ranks, silence)
    stop.hand_on = lambda: None
    if failed is None:
        return
    status = ranks[failed].returncode
    if silence.was_too_long:
        raise LaunchError(
            f"{directory}: no rank gave a sign of life for {silence.limit_s:g} s, so they were ended; the same command "
            "continues"
        )
    reason = _left_reason(directory, failed)
    if stop and reason is None and -status in (signal.SIGTERM, signal.SIGKILL):
        raise stop.error(f"{directory}: what was done since the last checkpoint or unit will be done again")
    if isinstance(reason, Preempted):
        raise stop.error(str(reason)) if stop else reason
    raise reason or _guessed_reason(directory, failed, status)


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
    log = open(directory / "logs" / f"rank-{rank:05d}.log", "ab")  # noqa: SIM115 (closed by the thread)
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


class Silence:
    """Looks now and then whether the ranks of a group still run at all; what one of them waits for they see themselves.

    Where all of them are halted nobody else would notice.
    """

    def __init__(self, directory: Path, num_ranks: int, timeout_s: float) -> None:
        self._files = [directory / WORK / HEARTBEATS / f"{rank:05d}" for rank in range(num_ranks)]
        self.limit_s, self.was_too_long = 2 * timeout_s + 30, False
        self._next = 0.0

    def is_too_long(self) -> bool:
        """Return whether no rank's heartbeat has been written for too long, though none has come to its end."""
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + 5
        try:
            if any(b'"end"' in path.read_bytes()[:128] for path in self._files):
                return False
            newest = max(path.stat().st_mtime for path in self._files)
        except OSError:
            return False
        self.was_too_long = time.time() - newest > self.limit_s
        return self.was_too_long


def _first(statuses: Sequence[int | None]) -> int:
    """Return the rank to blame: one that a signal ended, before those that only lost their peer."""
    return min((i for i, status in enumerate(statuses) if status), key=lambda i: (statuses[i] or 0) > 0)


def _signal_all(ranks: "list[subprocess.Popen[bytes]]", number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)


def leave_reason(directory: Path, rank: int, error: PipelineError) -> None:
    """Leave the reason why this rank fails where `launch` finds it; on a full disk the exit status has to do."""
    problems = error.problems if isinstance(error, ConfigError) else [str(error)]
    with suppress(OSError, ArtifactError):
        data = {"class": type(error).__name__, "problems": list(problems)}
        write_json(directory / WORK / f"failure-{rank:05d}.json", data)


def _left_reason(directory: Path, rank: int) -> PipelineError | None:
    """Return the error that a rank left, if it left one."""
    try:
        data: Mapping[str, Any] = json.loads((directory / WORK / f"failure-{rank:05d}.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    kind: type[PipelineError] = getattr(errors, data["class"], PipelineError)
    return kind(*data["problems"])


def _guessed_reason(directory: Path, rank: int, status: int) -> PipelineError:
    """Say how a rank ended that left no reason, with the end of its log."""
    log = directory / "logs" / f"rank-{rank:05d}.log"
    last = "\n".join(log.read_text("utf-8", errors="replace").splitlines()[-15:])
    if status == ArtifactError.exit_status:
        return ArtifactError(f"{directory}: the disk is full; make room and run the same command again")
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
    end = f"; the end of {log}:\n{last}" if last else ""
    return LaunchError(f"{directory}: rank {rank} {how}; the same command continues{end}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
