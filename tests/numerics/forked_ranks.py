"""Starts ranks of a frozen task by forking a process that has imported everything, and kills them when told to.

`python forked_ranks.py TASK.json WORLD LEDGER STEP…`: once for each step the ranks are started, and one of them, chosen
at random, is killed some moments after that step was read, with the others behind it, as a launcher does; then they run
to their end. LEDGER gets a line of JSON for everything that the loader reads: the rank, the step and its sample ids.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401 (here, so that no rank has to)
import numpy as np
from forking import start_ranks, wait_for_ranks

from pipeline import worker
from pipeline.env import STOP_SIGNALS, StopRequest
from pipeline.text import loader


def keep_ledger(path: Path, rank: int) -> None:
    """Write down all that this rank's loader reads, each in one write."""
    read: Callable[..., Any] = loader.Loader.read
    ledger = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def reading(self: loader.Loader, step: int, mine: slice = slice(None), **how: bool) -> loader.Rows:
        samples = self.samples(step)
        ids = np.stack([samples.source, samples.epoch, samples.row], axis=1)[mine].tolist()
        os.write(ledger, json.dumps({"rank": rank, "step": step, "first": mine.start, "ids": ids}).encode() + b"\n")
        rows: loader.Rows = read(self, step, mine, **how)
        return rows

    loader.Loader.read = reading  # type: ignore[method-assign]


def run_rank(task: Path, ledger: Path, rank: int) -> None:
    """Be one rank of a task."""
    keep_ledger(ledger, rank)
    sys.argv = ["rank.py", str(task)]
    with StopRequest().listening(*STOP_SIGNALS) as stop:
        worker.main(stop)


def wait_for_step(ledger: Path, begin: int, step: int) -> None:
    """Wait until a step, or a later one, was read by a rank that wrote what is in the ledger after `begin`."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        lines = ledger.read_bytes()[begin:].split(b"\n")[:-1] if ledger.exists() else []
        if any(json.loads(line)["step"] >= step for line in lines):
            return
        time.sleep(0.001)
    raise AssertionError(f"step {step} was not read")


def run(task: Path, world: int, ledger: Path, step: int | None) -> list[int]:
    """Run the ranks, kill them after a step if that is not null, and return their exit statuses."""
    begin = ledger.stat().st_size if ledger.exists() else 0
    ranks = start_ranks(world, partial(run_rank, task, ledger), logs=task.parent)
    if step is not None:
        wait_for_step(ledger, begin, step)
        time.sleep(random.uniform(0, 0.03))
        for rank in random.sample(ranks, world):
            os.kill(rank, signal.SIGKILL)
    return wait_for_ranks(ranks)


def main() -> None:
    """Do what the command line says; end with an error if the ranks do not end well."""
    task, world, ledger = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    for step in map(int, sys.argv[4:]):
        statuses = run(task, world, ledger, step)
        print(json.dumps({"killed": all(status == -signal.SIGKILL for status in statuses)}), flush=True)
    statuses = run(task, world, ledger, None)
    print(json.dumps({"ended": statuses}), flush=True)
    sys.exit(any(statuses))


if __name__ == "__main__":
    main()
