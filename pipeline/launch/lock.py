"""Who works in the directory of a task: a lock with owner and heartbeat.

Two runs never write one directory. On one machine the kernel knows at once whether the owner of a lock is gone; across
machines, where a file system may not tell, its heartbeat does. And should an owner that was taken for dead come back
(a node that was cut off), the number of the try stops it (`tries.py`): every write of a training looks whether its try
is still the newest.
"""

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.artifact import WORK
from pipeline.errors import LaunchError
from pipeline.launch import scheduler

LOCK = "lock"
BEAT_S = 10.0
ASK_S = 5.0  # before SLURM is asked again
STALE_S = 60.0  # without a sign of life, after which an owner on another machine counts as gone
SETTLE_S = 0.5  # in which two that sign at the same moment, where no lock of the kernel parts them, see one another
SIGNATURE_BYTES = 4096  # more than one has
SIGNATURE = {
    **{"words": str, "host": str, "pid": int, "job": str | None},
    **{"since": int, "cluster": str | None, "restarts": int},  # which older ones lack
}


@contextmanager
def locked(directory: Path, name: str = LOCK, patience_s: float = 0.0) -> Iterator[int]:
    """Hold the directory of a task, so that two runs never write one; give the descriptor that ranks inherit.

    The lock lives until the launcher and every rank on this machine that inherited it are gone, however they end.

    Args:
        name: Of the lock, in work/.
        patience_s: How long to wait for an owner to come to its end.

    Raises:
        LaunchError: If another run holds it; who, and when it gave a sign of life.
    """
    path = directory / WORK / name
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience_s
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        gone_jobs = GoneJobs()
        while (owner := _take(descriptor, path, gone_jobs)) is not None:
            if time.monotonic() > deadline:
                raise LaunchError(f"{directory}: {owner} is working in it; wait for it or end it")
            time.sleep(0.2)
        signature = os.pread(descriptor, SIGNATURE_BYTES, 0)
        released = threading.Event()
        heart = threading.Thread(target=_beat, args=(descriptor, signature, released), name="lock", daemon=True)
        heart.start()
        try:
            yield descriptor
        finally:
            released.set()
            heart.join()
            if os.pread(descriptor, SIGNATURE_BYTES, 0) == signature:  # nobody took it over meanwhile
                os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def read_owner(directory: Path, name: str = LOCK) -> Mapping[str, Any] | None:
    """Return who signed a lock last and has not released it: "words", "host", "pid", "job"; null where nobody has."""
    try:
        owner = json.loads((directory / WORK / name).read_bytes())
    except (OSError, ValueError):
        return None
    known = owner if isinstance(owner, dict) else {}
    is_whole = all(isinstance(known[word], kind) for word, kind in SIGNATURE.items() if word in known)
    return known if is_whole and {"words", "host", "pid", "job"} <= known.keys() else None


def age_s(path: Path) -> float:
    """Return how long ago a file was written, by the clock of its file system."""
    probe = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.now")
    probe.touch()
    try:
        return probe.stat().st_mtime - path.stat().st_mtime
    finally:
        probe.unlink()


def place() -> str:
    """Say where this process runs, as people look for it."""
    process = f"process {os.getpid()} on {socket.gethostname()}"
    job = slurm_job()
    return f"SLURM job {job} ({process})" if job else process


def slurm_job() -> str | None:
    """Return the id of the SLURM job that this process is in, of an array's element as "12_3"; null outside of one."""
    env = os.environ
    if "SLURM_ARRAY_JOB_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env.get("SLURM_JOB_ID")


class GoneJobs:
    """Knows of which owners the SLURM job is over; SLURM is asked now and then, and of its own jobs only."""

    def __init__(self) -> None:
        self._next, self._gone = 0.0, ""

    def __contains__(self, owner: Mapping[str, Any]) -> bool:
        job: str = owner["job"]
        if job != self._gone and time.monotonic() > self._next:
            self._next = time.monotonic() + ASK_S
            with suppress(LaunchError):
                if owner.get("cluster") in (None, scheduler.cluster(pauses_s=())):
                    seen = scheduler.look([job], pauses_s=())
                    self._gone = job if all(one.is_over for one in seen.values()) else ""
        return job == self._gone


def _take(descriptor: int, path: Path, gone_jobs: GoneJobs) -> str | None:
    """Take the lock, sign it and return null, or say who holds it."""
    kernel_knows = True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = read_owner(path.parent.parent, path.name)
        if owner is None or owner["host"] == socket.gethostname() or not _is_gone(owner, kernel_knows, gone_jobs):
            return str(owner["words"]) if owner else "another process"
        kernel_knows = False  # a node that was cut off still holds it, but SLURM has begun its job again
    except OSError:  # a file system without: the heartbeat has to do
        kernel_knows = False
    owner = read_owner(path.parent.parent, path.name)
    if owner is not None and not _is_gone(owner, kernel_knows, gone_jobs) and (quiet_s := age_s(path)) <= STALE_S:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        return f"{owner['words']}, whose last sign of life came {quiet_s:.0f} s ago,"
    signature = _sign(descriptor)
    if slurm_job() or not kernel_knows:  # and a kernel may know only of its own node (localflock, nolock)
        time.sleep(SETTLE_S)  # of two that take it at the same moment the later signature stands
        if os.pread(descriptor, SIGNATURE_BYTES, 0) != signature:
            return "another process"
    return None


def _is_gone(owner: Mapping[str, Any], kernel_knows: bool, gone_jobs: GoneJobs) -> bool:
    """Return whether an owner that has not released its lock is known to have ended, whatever its heartbeat says."""
    if owner["host"] == socket.gethostname():
        return kernel_knows or not Path(f"/proc/{owner['pid']}").exists()
    if owner["job"] is None:
        return False
    own = _own_job()
    if owner["job"] == own["job"] and owner.get("cluster") in (None, own["cluster"]):
        return bool(owner.get("restarts", -1) < own["restarts"])  # SLURM ended it before it began this job again
    return owner in gone_jobs


def _own_job() -> dict[str, Any]:
    """Return what a signature says of the SLURM job that this process is in."""
    cluster, restarts = (os.environ.get(f"SLURM_{name}") for name in ("CLUSTER_NAME", "RESTART_COUNT"))
    return {"job": slurm_job(), "cluster": cluster, "restarts": int(restarts or 0)}


def _sign(descriptor: int) -> bytes:
    owner = {"words": place(), "host": socket.gethostname(), "pid": os.getpid(), **_own_job()}
    signature = json.dumps({**owner, "since": time.time_ns()}).encode()
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, signature, 0)
    return signature


def _beat(descriptor: int, signature: bytes, released: threading.Event) -> None:
    """Give signs of life until the lock is released, or somebody has taken it over."""
    while not released.wait(BEAT_S):
        with suppress(OSError):
            if os.pread(descriptor, SIGNATURE_BYTES, 0) != signature:
                return
            os.utime(descriptor)
