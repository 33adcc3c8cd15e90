"""One rank of a run that stalls, in the place of `pipeline/rank.py`: the real launcher starts it.

The settings are in `work/stall.json`: which rank stalls in what way, and after what time that counts.
"""

import ctypes
import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.env import ATTEMPT, die_with_parent, read_ranks
from pipeline.launch.failures import leave_reason
from pipeline.training.heartbeat import Heart

STALL_STEP = 3


def halt(way: str) -> None:
    """Do what never ends."""
    if way == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif way == "hold":  # in C, with the interpreter's lock held: no thread of this process runs
        ctypes.PyDLL(None).sleep(1000)
    elif way == "hang":  # in C, without it
        ctypes.CDLL(None).sleep(1000)
    else:
        time.sleep(1000)


def main() -> None:
    """Do steps of a beat, a pause and a collective each; the chosen rank halts in one of them."""
    directory = Path(sys.argv[1]).parent.parent
    told = json.loads((directory / "work/stall.json").read_text())
    ranks = read_ranks()
    die_with_parent()
    torch.set_num_threads(1)
    (directory / f"pid-{ranks.rank}").write_text(str(os.getpid()))
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    heart = Heart(
        directory / "work/heartbeats",
        ranks.rank,
        ranks.world_size,
        told["timeout_s"],
        int(os.environ[ATTEMPT]),
        leave=lambda error: leave_reason(directory, ranks.rank, error),
    )
    with heart:
        for step in range(1, told["steps"] + 1):
            for phase in ("feed", "forward", "update"):
                heart.beat(phase, step)
                if (ranks.rank, step, phase) == (told["rank"], STALL_STEP, told["phase"]):
                    halt(told["way"])
                time.sleep(0.01)
                if phase != "feed":
                    dist.all_reduce(torch.ones(8))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
