"""Trains a frozen task on forked ranks while some of its batches are poisoned, and kills them when told to.

`python guard_ranks.py TASK.json WORLD POISON.json [CALLS]`: POISON.json says what is done to the batches of which
steps: {"labels": [steps], "nan": [steps]}. "labels" answers every token with a wrong one, whoever feeds it; "nan" makes
the loss not a number. With CALLS all ranks are killed after having taken so many steps, repeated ones counted. Each
rank leaves `fed-RANK.jsonl` beside the task: the steps that it computed, in their order.
"""

import json
import math
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401 (here, so that no rank has to)
import torch
from forking import start_ranks, wait_for_ranks

from pipeline import worker
from pipeline.env import STOP_SIGNALS, StopRequest
from pipeline.training import feed, loop
from pipeline.training.step import Batch, Step

STEPS_BY_BATCH: dict[int, int] = {}  # by the identity of the batch, which is kept alive
BATCHES: list[Batch] = []


def poison(told: dict[str, list[int]], calls: int | None, log: Path) -> None:
    """Change what this process feeds and what it makes of it."""
    read, take = feed.read_batch, loop.take_step
    taken = 0

    def reading(examples: Any, loader: Any, step: int, rank: int, shape: Any) -> Batch:
        batch = read(examples, loader, step, rank, shape)
        if step in told.get("labels", []):
            for microbatch in batch.microbatches:
                labels = microbatch["labels"]
                microbatch["labels"] = torch.where(labels < 0, labels, (labels * 37 + 11) % loader.vocab_size)
        BATCHES.append(batch)
        STEPS_BY_BATCH[id(batch)] = step
        return batch

    def taking(engine: Any, mesh: Any, batch: Batch, coefficients: Any, *more: Any) -> Step:
        nonlocal taken
        taken += 1
        if calls is not None and taken > calls:
            os.kill(os.getpid(), signal.SIGKILL)
        step = STEPS_BY_BATCH[id(batch)]
        with log.open("a") as file:
            file.write(f"{step}\n")
        if step in told.get("nan", []):
            coefficients = {"tokens": math.nan}
        return take(engine, mesh, batch, coefficients, *more)

    feed.read_batch, loop.take_step = reading, taking


def run_rank(task: Path, told: dict[str, list[int]], calls: int | None, rank: int) -> None:
    """Be one rank of a task."""
    poison(told, calls, task.parent / f"fed-{rank}.jsonl")
    sys.argv = ["rank.py", str(task)]
    with StopRequest().listening(*STOP_SIGNALS) as stop:
        worker.main(stop)


def main() -> None:
    """Run the ranks to their end and print their statuses."""
    task, world, told = Path(sys.argv[1]), int(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text())
    calls = int(sys.argv[4]) if len(sys.argv) > 4 else None
    ranks = start_ranks(world, partial(run_rank, task, told, calls), logs=task.parent)
    print(json.dumps(wait_for_ranks(ranks)), flush=True)


if __name__ == "__main__":
    main()
