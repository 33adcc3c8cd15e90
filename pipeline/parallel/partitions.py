"""What lies where in the flat vectors that DeepSpeed hands an optimizer, and how whole matrices come out of them.

ZeRO joins many parameters into one vector and gives every data-parallel rank a piece of it, or of each parameter
(stage 3). An optimizer that works element by element need not know; one that looks at matrices does.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """How one parameter, or one matrix of it, lies in the flat partitions of all ranks.

    Attributes:
        shape: Of all that the data-parallel ranks hold together: with tensor parallelism a slice of the parameter.
        bounds: Data-parallel rank r holds its elements from bounds[r] up to bounds[r + 1], counted row by row.
        offset: Where this rank's elements begin in its partition.
        name: Of the parameter in the model.
        sliced: The dimension along which tensor-parallel ranks share the parameter; null where each has all of it.
    """

    shape: tuple[int, ...]
    bounds: tuple[int, ...]
    offset: int
    name: str = ""
    sliced: int | None = None

    def share(self, rank: int) -> int:
        """Return how many elements a rank holds."""
        return self.bounds[rank + 1] - self.bounds[rank]

    def matrices(self, rank: int) -> Iterator[Self]:
        """Yield the matrices along the last two dimensions: itself, or those of a stack (of experts).

        Args:
            rank: The rank whose partition `offset` is a place in.
        """
        size = math.prod(self.shape[-2:])
        for first in range(0, math.prod(self.shape), size):
            bounds = tuple(min(max(bound - first, 0), size) for bound in self.bounds)
            skipped = max(first - self.bounds[rank], 0)
            offset = self.offset + min(skipped, self.share(rank))
            sliced = None if self.sliced is None else self.sliced - (len(self.shape) - 2)
            yield type(self)(self.shape[-2:], bounds, offset, self.name, sliced)


@dataclass(frozen=True)
class Layout:
    """What lies in one flat partition, on this rank and on the others.

    Attributes:
        group: The ranks that share the vector; null is this process alone.
    """

    cuts: tuple[Cut, ...]
    rank: int = 0
    group: "dist.ProcessGroup | None" = None

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Self:
        """Return the layout of a parameter that is not cut."""
        return cls((Cut(tuple(shape), (0, math.prod(shape)), 0),))

    @property
    def world(self) -> int:
        """Return the number of ranks that share the vector."""
        return len(self.cuts[0].bounds) - 1

    def matrices(self) -> list[Cut]:
        """Return all matrices in it, those of stacks one by one."""
        return [matrix for cut in self.cuts for matrix in cut.matrices(self.rank)]


def flat_partitions(engine: Any) -> dict[Tensor, Layout]:
    """Return the fp32 vectors that a DeepSpeed engine's optimizer works on, each with what lies in it.

    Without ZeRO (stage 0) these are the parameters themselves, whole on every data-parallel rank.
    """
    zero = engine.optimizer
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        layouts = [_stage_3_layout(group, names) for group in zero.fp16_groups]
        return dict(zip(zero.fp32_partitioned_groups_flat, layouts, strict=True))
    if isinstance(zero, torch.optim.Optimizer):
        parameters = [parameter for group in zero.param_groups for parameter in group["params"]]
        return {p: Layout((_cut(p, p.shape, (0, p.numel()), 0, names),)) for p in parameters}
    if hasattr(zero, "single_partition_of_fp32_groups"):
        flats, groups, offsets = (
            zero.single_partition_of_fp32_groups,
            zero.round_robin_bit16_groups,  # the order in the vector, which is not always the group's
            zero.round_robin_bit16_offsets,
        )
    else:  # DeepSpeed's optimizer for bf16 with ZeRO stage 1
        flats, groups = zero.fp32_groups_flat_partition, zero.bf16_groups
        offsets = [list(accumulate((p.numel() for p in group), initial=0))[:-1] for group in groups]
    data_groups = zero.real_dp_process_group
    return {
        flat: _vector_layout(flat.numel(), parameters, starts, data_group, names)
        for flat, parameters, starts, data_group in zip(flats, groups, offsets, data_groups, strict=True)
    }


def _cut(
    parameter: Any, shape: Sequence[int], bounds: tuple[int, ...], offset: int, names: Mapping[Tensor, str]
) -> Cut:
    sliced = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
    return Cut(tuple(shape), bounds, offset, names[parameter], sliced)


def _vector_layout(
    size: int, parameters: Sequence[Tensor], starts: Sequence[int], group: Any, names: Mapping[Tensor, str]
) -> Layout:
    """Lay out a vector of all parameters of a group, of which each rank has a piece of `size` elements."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    cuts = []
    for parameter, start in zip(parameters, starts, strict=True):
        count = parameter.numel()
        bounds = tuple(min(max(other * size - start, 0), count) for other in range(world + 1))
        cuts.append(_cut(parameter, parameter.shape, bounds, min(max(start - rank * size, 0), size), names))
    return Layout(tuple(cuts), rank, group)


def _stage_3_layout(parameters: Sequence[Any], names: Mapping[Tensor, str]) -> Layout:
    """Lay out a vector of pieces of parameters: ZeRO stage 3 cuts each into as many as there are ranks."""
    group = parameters[0].ds_process_group
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    cuts, offset = [], 0
    for parameter in parameters:
        piece, count = parameter.partition_numel(), parameter.ds_numel
        bounds = tuple(min(other * piece, count) for other in range(world + 1))
        cuts.append(_cut(parameter, parameter.ds_shape, bounds, offset, names))
        offset += piece
    return Layout(tuple(cuts), rank, group)


class Exchange:
    """Brings the pieces of every matrix to one rank that owns it, and takes them back.

    This is the one place where matrices come together. Each rank sends and receives about as much as its partition
    holds, whatever the number of ranks; where no matrix is cut nothing is sent.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.matrices = layout.matrices()
        self.owners = owners(self.matrices)
        ranks = range(layout.world)
        self.mine = [matrix for matrix, owner in self._owned() if owner == layout.rank]
        self.sent = [sum(m.share(layout.rank) for m, owner in self._owned() if owner == rank) for rank in ranks]
        self.received = [sum(m.share(rank) for m in self.mine) for rank in ranks]
        self.is_cut = any(m.share(owner) < math.prod(m.shape) for m, owner in self._owned())
        self.travelling = [matrix for matrix, _ in sorted(self._owned(), key=lambda owned: owned[1])]  # by owner

    def gather(self, flat: Tensor) -> list[Tensor]:
        """Return the whole matrices that this rank owns, out of a vector laid out like the partition."""
        if not self.is_cut:
            return [self._piece(flat, matrix).view(matrix.shape) for matrix in self.mine]
        received = flat.new_empty(sum(self.received))
        outgoing = torch.cat([self._piece(flat, matrix) for matrix in self.travelling])
        dist.all_to_all_single(received, outgoing, self.received, self.sent, group=self.layout.group)
        pieces = [
            torch.split(block, [matrix.share(rank) for matrix in self.mine])
            for rank, block in enumerate(torch.split(received, self.received))
        ]
        return [torch.cat(parts).view(m.shape) for m, parts in zip(self.mine, zip(*pieces, strict=True), strict=True)]

    def scatter(self, matrices: Sequence[Tensor], flat: Tensor) -> None:
        """Write matrices, in the order of `gather`, back to where their pieces lie in the vector of each rank."""
        if not self.is_cut:
            for matrix, cut in zip(matrices, self.mine, strict=True):
                self._piece(flat, cut).copy_(matrix.reshape(-1))
            return
        parts: list[list[Tensor]] = [[] for _ in range(self.layout.world)]
        for matrix, cut in zip(matrices, self.mine, strict=True):
            for rank, (start, stop) in enumerate(pairwise(cut.bounds)):
                parts[rank].append(matrix.reshape(-1)[start:stop])
        outgoing = torch.cat([part for rank in parts for part in rank]) if matrices else flat.new_empty(0)
        incoming = flat.new_empty(sum(self.sent))
        dist.all_to_all_single(incoming, outgoing, self.sent, self.received, group=self.layout.group)
        shares = [matrix.share(self.layout.rank) for matrix in self.travelling]
        for cut, piece in zip(self.travelling, torch.split(incoming, shares), strict=True):
            self._piece(flat, cut).copy_(piece)

    def _owned(self) -> Iterator[tuple[Cut, int]]:
        return zip(self.matrices, self.owners, strict=True)

    def _piece(self, flat: Tensor, matrix: Cut) -> Tensor:
        return flat.narrow(0, matrix.offset, matrix.share(self.layout.rank))


def owners(matrices: Sequence[Cut]) -> list[int]:
    """Return the rank that owns each matrix: who holds all of it, else the one with the least work so far.

    The work is that of a product of the matrix with itself. Every rank comes to the same answer.
    """
    work = [0] * (len(matrices[0].bounds) - 1)
    found = [next((r for r in range(len(work)) if m.share(r) == math.prod(m.shape)), None) for m in matrices]
    costs = [math.prod(matrix.shape) * min(matrix.shape) for matrix in matrices]
    for owner, cost in zip(found, costs, strict=True):
        if owner is not None:
            work[owner] += cost
    for index in sorted(range(len(matrices)), key=lambda index: -costs[index]):
        if found[index] is None:
            found[index] = work.index(min(work))
            work[work.index(min(work))] += costs[index]
    return [owner for owner in found if owner is not None]
