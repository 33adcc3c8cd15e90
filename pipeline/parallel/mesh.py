"""The arithmetic of ranks, and the `mpu` that tells DeepSpeed about it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist


@dataclass(frozen=True)
class BatchShape:
    """How one global batch is spread: rows = microbatch * accumulation * data-parallel ranks."""

    rows: int
    microbatch: int
    accumulation: int
    data_ranks: int

    @property
    def rows_per_rank(self) -> int:
        """Rows of the batch that one rank feeds."""
        return self.microbatch * self.accumulation

    def microbatches(self, rank: int) -> Iterator[slice]:
        """Yield the rows of the batch that a rank feeds, microbatch by microbatch."""
        first = rank * self.rows_per_rank
        for start in range(first, first + self.rows_per_rank, self.microbatch):
            yield slice(start, start + self.microbatch)


def shape_batch(rows: int, microbatch: int | None, data_ranks: int) -> BatchShape:
    """Spread a batch of `rows` over ranks and accumulation steps; a null `microbatch` needs no accumulation.

    Raises:
        ConfigError: If the numbers do not divide.
    """
    if rows % data_ranks:
        raise ConfigError(f"run.ranks: a batch of {rows} rows does not divide among {data_ranks} ranks")
    per_rank = rows // data_ranks
    microbatch = per_rank if microbatch is None else min(microbatch, per_rank)
    if per_rank % microbatch:
        raise ConfigError(
            f"run.microbatch_sequences: the {per_rank} rows of a rank do not divide into microbatches of {microbatch}"
        )
    return BatchShape(rows, microbatch, per_rank // microbatch, data_ranks)


class DataParallelUnit:
    """The `mpu` of a mesh without tensor parallelism: every rank is a data-parallel one.

    Note: handed to DeepSpeed even so, since the groups that it makes itself ignore the timeout, and a rank that
    hangs would go unnoticed for half an hour.
    """

    def __init__(self, timeout: timedelta) -> None:
        import torch.distributed as dist

        self.world: int = dist.get_world_size()
        self.rank: int = dist.get_rank()
        self.data_group: dist.ProcessGroup = dist.new_group(list(range(self.world)), timeout=timeout)
        alone = [dist.new_group([rank], timeout=timeout) for rank in range(self.world)]
        self.model_group: dist.ProcessGroup = alone[self.rank]

    def sum(self, numbers: Sequence[float], device: "torch.device") -> list[float]:
        """Sum each number over the data-parallel ranks, in fp64."""
        if self.world == 1:
            return list(numbers)
        import torch
        import torch.distributed as dist

        sums = torch.tensor(numbers, dtype=torch.float64, device=device)
        dist.all_reduce(sums, group=self.data_group)
        summed: list[float] = sums.tolist()
        return summed

    def get_data_parallel_group(self) -> "dist.ProcessGroup":
        """Return the group over which gradients are reduced."""
        return self.data_group

    def get_data_parallel_rank(self) -> int:
        """Return this rank's place in it."""
        return self.rank

    def get_data_parallel_world_size(self) -> int:
        """Return its size."""
        return self.world

    def get_model_parallel_group(self) -> "dist.ProcessGroup":
        """Return the group over which a layer is split: this rank alone."""
        return self.model_group

    def get_model_parallel_rank(self) -> int:
        """Return this rank's place in it."""
        return 0

    def get_model_parallel_world_size(self) -> int:
        """Return its size."""
        return 1

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_pipeline_model_parallel_world_size = get_model_parallel_world_size
