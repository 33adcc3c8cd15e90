"""Where a process runs: its rank, its threads, and whether somebody asked it to stop."""

import ctypes
import os
import signal
from dataclasses import dataclass, field
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)  # not SIGUSR1, which NCCL may catch


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


def cpus() -> int:
    """Return the number of processors this process may use."""
    return len(os.sched_getaffinity(0))


@dataclass
class StopRequest:
    """Becomes true when a signal asks for a stop; a second one ends the process the usual way."""

    asked: bool = False
    _previous: dict[int, object] = field(default_factory=dict)

    def listen(self) -> "StopRequest":
        """Start to catch SIGTERM and SIGUSR2; leave SIGINT (Ctrl-C reaches the whole terminal) to the launcher."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._catch)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return self

    def _catch(self, number: int, _frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(number, signal.SIG_DFL)

    def __bool__(self) -> bool:
        return self.asked


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies, so that a killed launcher leaves no rank behind."""
    set_pdeathsig = 1  # PR_SET_PDEATHSIG of prctl(2)
    ctypes.CDLL(None).prctl(set_pdeathsig, signal.SIGKILL)
    if os.getppid() == 1:  # the parent was gone before the call
        os.kill(os.getpid(), signal.SIGKILL)
