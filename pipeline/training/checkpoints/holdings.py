"""What of each tensor of a training lies on this rank: weights, states of the optimizer, buffers."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.parallel.mesh import Mesh
from pipeline.parallel.partitions import Layout
from pipeline.training.checkpoints.format import VECTOR, WEIGHTS, Scalar
from pipeline.training.optim.flat import whole_parameter

SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of DeepSpeed's DynamicLossScaler


@dataclass(frozen=True)
class Holding:
    """A range of a tensor that lies on this rank, and of all that lies like it.

    Attributes:
        name: Of a parameter or buffer, or of what the optimizer keeps of a parameter as a whole.
        shape: Of the whole tensor.
        sliced: The dimension along which tensor-parallel ranks share it; null where each has all of it.
        tensor_rank: Which of their slices the range is of; 0 where it is not sliced.
        start: Its first element, of the slice, counted row by row; `stop` is after its last.
        copies: How many ranks hold the same range; this one is the `copy`-th.
        states: One-dimensional views of the range: of the weights, or of the states of the optimizer.
    """

    name: str
    shape: tuple[int, ...]
    sliced: int | None
    tensor_rank: int
    start: int
    stop: int
    copies: int
    copy: int
    states: Mapping[str, Tensor]

    @property
    def share(self) -> slice:
        """The part of the range that this rank writes: those who hold the same divide it evenly."""
        size = self.stop - self.start
        return slice(size * self.copy // self.copies, size * (self.copy + 1) // self.copies)


def optimizer_of(engine: Any) -> torch.optim.Optimizer:
    """Return the optimizer that DeepSpeed has wrapped; without ZeRO it is the engine's own."""
    outer = engine.optimizer
    inner: torch.optim.Optimizer = outer if isinstance(outer, torch.optim.Optimizer) else outer.optimizer
    return inner


def learned(engine: Any, layouts: Mapping[Tensor, Layout], mesh: Mesh) -> Iterator[Holding]:
    """Yield what lies on this rank of the weights that learn, with the states of the optimizer."""
    optimizer = optimizer_of(engine)
    for flat, layout in layouts.items():
        states = {WEIGHTS: flat}
        for name, value in optimizer.state.get(flat, {}).items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                continue
            if whole_parameter(name) is not None:
                yield _everywhere(name, value, mesh, VECTOR)
                continue
            assert value.numel() == flat.numel(), f"{name}: {value.numel()} numbers for a vector of {flat.numel()}"
            states[name] = value
        for cut in layout.cuts:
            bounds = cut.bounds[layout.rank], cut.bounds[layout.rank + 1]
            views = {n: _numbers(t).narrow(0, cut.offset, bounds[1] - bounds[0]) for n, t in states.items()}
            yield _shared(cut.name, layout.whole_shape(cut), cut.sliced, bounds, layout.world, mesh, views)


def frozen(engine: Any, mesh: Mesh) -> Iterator[Holding]:
    """Yield what lies on this rank of the weights that do not learn; stage 3 cuts them too."""
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            continue
        sliced = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
        if hasattr(parameter, "ds_tensor"):
            piece, shape, world = parameter.partition_numel(), parameter.ds_shape, mesh.data
            first = min(mesh.data_rank * piece, parameter.ds_numel)
            bounds, held = (first, min(first + piece, parameter.ds_numel)), parameter.ds_tensor
        else:
            shape, world, bounds, held = parameter.shape, 1, (0, parameter.numel()), parameter
        whole = tuple(size * mesh.tensor if dim == sliced else size for dim, size in enumerate(shape))
        views = {WEIGHTS: _numbers(held).narrow(0, 0, bounds[1] - bounds[0])}
        yield _shared(name, whole, sliced, bounds, world, mesh, views)


def buffers(module: torch.nn.Module, mesh: Mesh) -> Iterator[Holding]:
    """Yield the buffers that belong to a model: every rank has the same."""
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for name, value in module.state_dict().items():
        if name not in parameters:
            yield _everywhere(name, value, mesh, WEIGHTS)


def scalars(engine: Any, layouts: Mapping[Tensor, Layout]) -> dict[str, Scalar]:
    """Return the numbers that the optimizer keeps for every parameter, by state; the same on all ranks."""
    found: dict[str, Scalar] = {}
    for flat, layout in layouts.items():
        for name, value in optimizer_of(engine).state.get(flat, {}).items():
            if isinstance(value, Tensor) and value.dim():
                continue
            dtype = str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else None
            number = value.item() if isinstance(value, Tensor) else value
            known = found.setdefault(name, Scalar(dtype=dtype, values={}))
            known.values.update({cut.name: number for cut in layout.cuts})
    return found


def dynamic_scaler(engine: Any) -> Any:
    """Return the loss scaler of training with fp16, or null."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return scaler if getattr(scaler, "dynamic", False) else None


def scaler_numbers(engine: Any) -> dict[str, float | int]:
    """Return what moves in the loss scaler, if there is one; the same on all ranks."""
    scaler = dynamic_scaler(engine)
    return {} if scaler is None else {name: getattr(scaler, name) for name in SCALER_STATE}


def _numbers(tensor: Tensor) -> Tensor:
    """Return the numbers of a tensor in one row; never a copy, which would not be what training changes."""
    return tensor.detach().view(-1)


def _shared(
    name: str,
    shape: tuple[int, ...],
    sliced: int | None,
    bounds: tuple[int, int],
    world: int,
    mesh: Mesh,
    states: Mapping[str, Tensor],
) -> Holding:
    """Return what lies on this rank of a tensor that `world` data-parallel ranks share: all of them, or one."""
    copies, copy = (1, 0) if world > 1 else (mesh.data, mesh.data_rank)
    if sliced is None:
        copies, copy = copies * mesh.tensor, copy * mesh.tensor + mesh.tensor_rank
    tensor_rank = 0 if sliced is None else mesh.tensor_rank
    return Holding(name, shape, sliced, tensor_rank, *bounds, copies, copy, states)


def _everywhere(name: str, value: Tensor, mesh: Mesh, state: str) -> Holding:
    views = {state: _numbers(value)}
    return Holding(name, tuple(value.shape), None, 0, 0, math.prod(value.shape), mesh.place.world, mesh.rank, views)
