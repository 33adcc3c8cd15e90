"""What lies where in the flat vectors that DeepSpeed hands an optimizer.

ZeRO joins many parameters into one vector and gives every data-parallel rank a piece of it, or of each parameter
(stage 3). An optimizer that works element by element need not know; one that looks at matrices does.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
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
        sliced: The dimension along which tensor-parallel ranks share the parameter, each the same number of rows of it;
            null where each has all of it.
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
        leading = len(self.shape) - 2
        assert self.sliced is None or self.sliced >= leading  # a stack is not shared matrix by matrix
        size = math.prod(self.shape[-2:])
        for first in range(0, math.prod(self.shape), size):
            bounds = tuple(min(max(bound - first, 0), size) for bound in self.bounds)
            skipped = max(first - self.bounds[rank], 0)
            offset = self.offset + min(skipped, self.share(rank))
            sliced = None if self.sliced is None else self.sliced - leading
            yield type(self)(self.shape[-2:], bounds, offset, self.name, sliced)


@dataclass(frozen=True)
class Layout:
    """What lies in one flat partition, on this rank and on the others.

    Attributes:
        group: The data-parallel ranks that share the vector; null where this process has all of it.
        tensor: How many tensor-parallel ranks share the parameters that are sliced; each has such a vector.
        tensor_group: Those ranks; null is this process alone.
    """

    cuts: tuple[Cut, ...]
    rank: int = 0
    group: "dist.ProcessGroup | None" = None
    tensor: int = 1
    tensor_rank: int = 0
    tensor_group: "dist.ProcessGroup | None" = None

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

    def whole_shape(self, cut: Cut) -> tuple[int, ...]:
        """Return the shape of all that the tensor-parallel ranks hold of a cut together."""
        return tuple(size * self.tensor if dim == cut.sliced else size for dim, size in enumerate(cut.shape))


def join(layouts: Sequence[Layout], sizes: Sequence[int]) -> Layout:
    """Return the layout of vectors of these sizes put one after another, which the same ranks share."""
    starts = accumulate(sizes, initial=0)
    cuts = [
        replace(cut, offset=start + cut.offset)
        for layout, start in zip(layouts, starts, strict=False)
        for cut in layout.cuts
    ]
    return replace(layouts[0], cuts=tuple(cuts))


def flat_partitions(engine: Any) -> dict[Tensor, Layout]:
    """Return the fp32 vectors that a DeepSpeed engine's optimizer works on, each with what lies in it.

    Without ZeRO (stage 0) these are the parameters themselves, whole on every data-parallel rank.
    """
    place, group = engine.mpu.place, engine.mpu.tensor_group
    return {
        flat: replace(layout, tensor=place.tensor, tensor_rank=place.tensor_rank, tensor_group=group)
        for flat, layout in _data_partitions(engine).items()
    }


def _data_partitions(engine: Any) -> dict[Tensor, Layout]:
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
