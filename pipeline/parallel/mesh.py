"""The arithmetic of ranks, and the `mpu` that tells DeepSpeed about it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Self

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
        raise ConfigError(f"run.ranks: a batch of {rows} rows does not divide among {data_ranks} data-parallel ranks")
    per_rank = rows // data_ranks
    microbatch = per_rank if microbatch is None else min(microbatch, per_rank)
    if per_rank % microbatch:
        raise ConfigError(
            f"run.microbatch_sequences: the {per_rank} rows of a rank do not divide into microbatches of {microbatch}"
        )
    return BatchShape(rows, microbatch, per_rank // microbatch, data_ranks)


@dataclass(frozen=True)
class Place:
    """Where a rank lies in the mesh of data-parallel by tensor-parallel ranks.

    The ranks of a tensor-parallel group are neighbours, so that they are on one node: rank = data_rank * tensor +
    tensor_rank.

    Attributes:
        rank: Of all.
        world: How many there are.
        tensor: How many of them share every layer.
    """

    rank: int = 0
    world: int = 1
    tensor: int = 1

    @property
    def data(self) -> int:
        """Number of data-parallel ranks: those that feed different rows."""
        return self.world // self.tensor

    @property
    def data_rank(self) -> int:
        """This rank's place among them."""
        return self.rank // self.tensor

    @property
    def tensor_rank(self) -> int:
        """This rank's place among those that it shares layers with."""
        return self.rank % self.tensor


class Mesh:
    """The groups of ranks that talk to one another; it is the `mpu` that DeepSpeed is given.

    Note: handed to DeepSpeed even without tensor parallelism, since the groups that it makes itself ignore the timeout,
    and a rank that hangs would go unnoticed for half an hour.

    Attributes:
        place: Where this rank lies.
        data_group: The ranks that hold the same share of every layer and feed different rows.
        tensor_group: The ranks that share every layer and feed the same rows.
    """

    def __init__(self, tensor: int, timeout: timedelta) -> None:
        import torch.distributed as dist

        self.place = Place(dist.get_rank(), dist.get_world_size(), tensor)
        ranks = range(self.place.world)
        data = [dist.new_group(list(ranks[first::tensor]), timeout=timeout) for first in range(tensor)]
        shared = [dist.new_group(list(ranks[first : first + tensor]), timeout=timeout) for first in ranks[::tensor]]
        self.data_group: dist.ProcessGroup = data[self.place.tensor_rank]
        self.tensor_group: dist.ProcessGroup = shared[self.place.data_rank]

    def __deepcopy__(self, memo: object) -> Self:
        """Return itself: a copy of a model exchanges tensors with the same ranks."""
        return self

    @property
    def rank(self) -> int:
        """Number of this rank among all."""
        return self.place.rank

    @property
    def data_rank(self) -> int:
        """Number of this rank among those that feed different rows."""
        return self.place.data_rank

    @property
    def data(self) -> int:
        """Number of ranks that feed different rows."""
        return self.place.data

    @property
    def tensor_rank(self) -> int:
        """Number of this rank among those that share every layer."""
        return self.place.tensor_rank

    @property
    def tensor(self) -> int:
        """Number of ranks that share every layer."""
        return self.place.tensor

    def sum(self, numbers: Sequence[float], device: "torch.device") -> list[float]:
        """Sum each number over the data-parallel ranks, in fp64."""
        return self._sum(numbers, device, None if self.data == 1 else self.data_group)

    def sum_all(self, numbers: Sequence[float], device: "torch.device") -> list[float]:
        """Sum each number over all ranks, in fp64."""
        summed = self.sum(numbers, device)
        return self._sum(summed, device, None if self.tensor == 1 else self.tensor_group)

    def _sum(self, numbers: Sequence[float], device: "torch.device", group: "dist.ProcessGroup | None") -> list[float]:
        if group is None:
            return list(numbers)
        import torch
        import torch.distributed as dist

        sums = torch.tensor(numbers, dtype=torch.float64, device=device)
        dist.all_reduce(sums, group=group)
        summed: list[float] = sums.tolist()
        return summed

    def get_data_parallel_group(self) -> "dist.ProcessGroup":
        """Return the group over which gradients are reduced."""
        return self.data_group

    def get_data_parallel_rank(self) -> int:
        """Return this rank's place in it."""
        return self.data_rank

    def get_data_parallel_world_size(self) -> int:
        """Return its size."""
        return self.data

    def get_model_parallel_group(self) -> "dist.ProcessGroup":
        """Return the group over which a layer is split."""
        return self.tensor_group

    def get_model_parallel_rank(self) -> int:
        """Return this rank's place in it."""
        return self.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        """Return its size."""
        return self.tensor

    def get_pipeline_model_parallel_world_size(self) -> int:
        """Return into how many stages the layers are divided: one."""
        return 1

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
