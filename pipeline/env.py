"""Where a process runs: its rank, its threads, and whether somebody asked it to stop."""

import ctypes
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from pipeline.errors import Interrupted, Preempted

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)  # not SIGUSR1, which NCCL may catch
LAUNCHER = "PIPELINE_LAUNCHER"  # environment variable with the process id of a rank's launcher
ATTEMPT = "PIPELINE_ATTEMPT"  # environment variable with the number of the try that a rank belongs to
ATTEMPT_NAME = "PIPELINE_ATTEMPT_NAME"  # environment variable with the name of the file in work/ that counts the tries
FIRST_RANK = "PIPELINE_FIRST_RANK"  # environment variable of ranks that srun starts: what SLURM's task 0 is


@dataclass(frozen=True)
class Ranks:
    """Which process of its task a process is."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def read_ranks() -> Ranks:
    """Return the rank that the launcher put into RANK, WORLD_SIZE and LOCAL_RANK; alone where there is none."""
    env = os.environ
    rank, world = int(env.get("RANK", "0")), int(env.get("WORLD_SIZE", "1"))
    return Ranks(rank, world, int(env.get("LOCAL_RANK", str(rank))))


@dataclass(frozen=True)
class Share:
    """The ranks of a task that one launch starts: `count` of all `world`, from `first` on."""

    world: int
    first: int
    count: int

    @property
    def is_all(self) -> bool:
        """Whether no other launch starts ranks of this task."""
        return self.count == self.world


def adopt_slurm_rank() -> None:
    """Give a process that srun started its RANK and LOCAL_RANK; others are left as they are."""
    first = os.environ.get(FIRST_RANK)
    if first is not None:
        os.environ["RANK"] = str(int(first) + int(os.environ["SLURM_PROCID"]))
        os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]


@contextmanager
def reserved_port() -> Iterator[int]:
    """Give a free port that rank 0, started by this process on this machine, can listen on, and nobody else gets.

    A port that is bound but not listened on is given to no other process, and Linux lets one listen on it that asks
    for SO_REUSEADDR too, as torch's store does.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))
        yield holder.getsockname()[1]


def cpus() -> int:
    """Return the number of processors this process may use."""
    return len(os.sched_getaffinity(0))


def has_accelerator() -> bool:
    """Return whether this machine shows an accelerator that torch calls "cuda", by its device files."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    devices = Path("/dev")  # of NVIDIA, of NVIDIA in WSL, and of AMD
    return any(devices.glob("nvidia[0-9]*")) or any((devices / name).exists() for name in ("dxg", "kfd"))


def missing_compiler() -> str | None:
    """Return what is wrong with the C++ compiler that torch.compile needs on a processor; null if nothing is."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is not None:
        return None
    return (
        f"torch.compile needs a C++ compiler, and there is no '{compiler}' in the PATH; install one, let the variable "
        "CXX of the environment name one, or set run.compile to false"
    )


class StopRequest:
    """Becomes true when a signal asks this process to stop.

    Attributes:
        came: The signals that came, in order.
        hand_on: Called after each; a launcher hands them on to its ranks.
    """

    def __init__(self) -> None:
        self.came: list[int] = []
        self.hand_on: Callable[[], None] = lambda: None

    def __bool__(self) -> bool:
        return bool(self.came)

    def error(self, message: str) -> Preempted:
        """Return what to raise for the first signal that came."""
        return Interrupted(message) if self.came[:1] == [signal.SIGINT] else Preempted(message)

    @contextmanager
    def listening(self, *numbers: int) -> Iterator["StopRequest"]:
        """Catch these signals for the time of the block, but for those that are ignored (as nohup does)."""
        caught = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
        previous = {number: signal.signal(number, self._catch) for number in caught}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def ask(self, number: int) -> None:
        """Ask for a stop, as if this signal had come."""
        self.came.append(number)
        self.hand_on()

    def _catch(self, number: int, _frame: FrameType | None) -> None:
        self.ask(number)


def die_with_parent() -> None:
    """Ask Linux to kill this process when its launcher dies, so that a killed launcher leaves no rank behind."""
    launcher = os.environ.get(LAUNCHER)
    if not launcher:  # started by hand, or by srun
        return
    set_pdeathsig = 1  # PR_SET_PDEATHSIG of prctl(2)
    ctypes.CDLL(None).prctl(set_pdeathsig, signal.SIGKILL)
    if os.getppid() != int(launcher):  # the launcher was gone before the call
        os.kill(os.getpid(), signal.SIGKILL)
