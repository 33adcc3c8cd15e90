"""Ranks as forks of a process that has imported torch and DeepSpeed: they start at once. For this folder."""

import os
import socket
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import torch


def start_ranks(world: int, run: Callable[[int], None], logs: Path | None = None) -> list[int]:
    """Fork ranks that call `run` with their number, each on one thread; return their process ids.

    Args:
        logs: A directory for `forked-RANK.log`, which what a rank prints is added to; null leaves it on the terminal.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [_start(rank, world, port, run, logs) for rank in range(world)]


def wait_for_ranks(ranks: Iterable[int]) -> list[int]:
    """Return the exit statuses of all ranks."""
    return [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]


def run_ranks(world: int, run: Callable[[int], None]) -> bool:
    """Run ranks to their end; return whether all ended well."""
    return not any(wait_for_ranks(start_ranks(world, run)))


def _start(rank: int, world: int, port: int, run: Callable[[int], None], logs: Path | None) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        if logs is not None:
            log = os.open(logs / f"forked-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.set_num_threads(1)
        run(rank)
        status = 0
    except SystemExit as error:
        status = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)
