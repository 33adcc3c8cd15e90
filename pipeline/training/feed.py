"""Batches of examples, made ready ahead of their step, in a thread, so that training does not wait for its data."""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Generic, Self, TypeVar

if TYPE_CHECKING:
    from pipeline.parallel.mesh import BatchShape
    from pipeline.text.loader import Loader
    from pipeline.training.objectives.batch import Examples
    from pipeline.training.step import Batch

STEPS_AHEAD = 2

BatchT = TypeVar("BatchT")


class Feeder(Generic[BatchT]):
    """Gives the batches of steps [first, last] in their order; `STEPS_AHEAD` of them are being made ready.

    Each batch is a function of its step alone, so what was made ahead and never taken is simply dropped.
    """

    def __init__(self, feed: Callable[[int], BatchT], first: int, last: int) -> None:
        self._feed, self._next, self._last = feed, first, last
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed")
        self._ahead: deque[Future[BatchT]] = deque()
        while self._next <= last and len(self._ahead) < STEPS_AHEAD:
            self._begin()

    def take(self) -> tuple[BatchT, float]:
        """Return the next step's batch and how many seconds it had to be waited for. Raises what `feed` raised."""
        began = time.perf_counter()
        batch = self._ahead.popleft().result()
        waited_s = time.perf_counter() - began
        if self._next <= self._last:
            self._begin()
        return batch, waited_s

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _begin(self) -> None:
        self._ahead.append(self._pool.submit(self._feed, self._next))
        self._next += 1


def read_batch(examples: "Examples", loader: "Loader", step: int, rank: int, shape: "BatchShape") -> "Batch":
    """Return a rank's part of the batch of a step (from 1), in as many microbatches as the shape says."""
    import torch

    from pipeline.training.objectives.batch import count_terms
    from pipeline.training.step import Batch

    first = rank * shape.rows_per_rank
    example = examples.read(loader, step, slice(first, first + shape.rows_per_rank))
    rows = len(example["ids"])
    size = rows // shape.accumulation  # while the length warms up, several rows for each sample
    microbatches = [
        {name: torch.from_numpy(array[start : start + size]) for name, array in example.items()}
        for start in range(0, rows, size)
    ]
    return Batch(microbatches, count_terms(example), tokens=example["ids"].size)
