"""Puts what a checkpoint holds into an engine, whatever the layout of either."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import TrainingError
from pipeline.parallel.engine import refresh_weights
from pipeline.parallel.mesh import Mesh
from pipeline.parallel.partitions import Layout
from pipeline.proof import Tick, hash_file
from pipeline.training.checkpoints.format import VECTOR, WEIGHTS, Index, Scalar
from pipeline.training.checkpoints.holdings import Holding, buffers, dynamic_scaler, learned, optimizer_of
from pipeline.training.checkpoints.reslice import WHOLE, Source
from pipeline.training.checkpoints.write import sum_of_squares
from pipeline.training.optim.flat import whole_parameter

# Sums in fp64 of the same numbers in another order: 1e-16 for each doubling of at most 2^40 of them, with room to spare
SQUARES_TOLERANCE = 1e-10


def damaged_files(checkpoint: Path, index: Index, mesh: Mesh, device: torch.device, tick: Tick) -> list[str]:
    """Read all files of a checkpoint, shared out among the ranks; return what is wrong with each, on every rank."""
    names = sorted(index.files, key=lambda name: (-index.files[name].bytes, name))
    found = [0.0] * len(names)
    for number in range(mesh.rank, len(names), mesh.place.world):
        record, path = index.files[names[number]], checkpoint / names[number]
        try:
            same = path.stat().st_size == record.bytes and hash_file(path, tick) == record.xxh128
        except OSError:
            same = False
        found[number] = float(not same)
    return [name for name, bad in zip(names, mesh.sum_all(found, device), strict=True) if bad]


@torch.no_grad()
def load(engine: Any, layouts: Mapping[Tensor, Layout], mesh: Mesh, checkpoint: Path, index: Index) -> None:
    """Read into an engine what lies on this rank; every rank must come here.

    Raises:
        TrainingError: If it is of another model or another optimizer, or not what was read is what was saved.
    """
    _check_model(engine, checkpoint, index, mesh)
    for flat, layout in layouts.items():
        _prepare(engine, flat, layout, checkpoint, index)
    source = Source(checkpoint, index)
    sums: dict[tuple[str, str], float] = {
        (name, state): 0.0 for name, record in sorted(index.tensors.items()) for state in record.squares
    }
    for holding in _wanted(engine, layouts, mesh):
        bounds = (holding.start, holding.stop)
        if holding.start == holding.stop:
            continue
        part = WHOLE if holding.sliced is None else (mesh.tensor_rank, mesh.tensor)
        for state, numbers in holding.states.items():
            source.fill(holding.name, state, numbers, bounds, part, holding.sliced)
            sums[holding.name, state] += sum_of_squares(numbers) / holding.copies
    _check_sums(engine, mesh, checkpoint, index, sums)
    scaler = dynamic_scaler(engine)
    for name, value in index.scaler.items() if scaler is not None else ():
        setattr(scaler, name, value)
    refresh_weights(engine)


def _wanted(engine: Any, layouts: Mapping[Tensor, Layout], mesh: Mesh) -> Iterator[Holding]:
    yield from learned(engine, layouts, mesh)
    yield from buffers(engine.module, mesh)


def _check_model(engine: Any, checkpoint: Path, index: Index, mesh: Mesh) -> None:
    """Look that the checkpoint is of this model, before anything is changed."""
    sizes = {name: math.prod(record.shape) for name, record in index.tensors.items() if "/" not in name}
    wanted = dict[str, int]()
    for name, parameter in engine.module.named_parameters():
        shared = mesh.tensor if getattr(parameter, "tensor_model_parallel", False) else 1
        wanted[name] = getattr(parameter, "ds_numel", parameter.numel()) * shared
    wanted |= {holding.name: holding.stop for holding in buffers(engine.module, mesh)}
    for name in sorted(wanted.keys() | sizes.keys()):
        if wanted.get(name) != sizes.get(name):
            raise TrainingError(
                f"{checkpoint}: of another model: '{name}' has {_count(sizes.get(name))}, the model wants "
                f"{_count(wanted.get(name))}; delete {checkpoint.parent} to start over"
            )


def _count(size: int | None) -> str:
    return "no numbers" if size is None else f"{size:,} numbers"


def _prepare(engine: Any, flat: Tensor, layout: Layout, checkpoint: Path, index: Index) -> None:
    """Give the optimizer the states of a vector that the checkpoint has, and no others."""
    optimizer = optimizer_of(engine)
    names = [cut.name for cut in layout.cuts]
    found = {frozenset(index.tensors[name].squares) - {WEIGHTS} for name in names}
    if len(found) != 1:
        _refuse(checkpoint, f"'{names[0]}' and others learn together here, but had different states")
    state = optimizer.state[flat]
    shapes = dict.fromkeys(found.pop(), flat.shape)
    shapes |= {
        name: torch.Size(record.shape)
        for name, record in index.tensors.items()
        if VECTOR in record.squares and whole_parameter(name) in names
    }
    scalars = {name: scalar for name, scalar in index.scalars.items() if names[0] in scalar.values}
    for name in state.keys() - shapes.keys() - scalars.keys():
        del state[name]
    for name, shape in shapes.items():
        if name not in state or state[name].shape != shape:
            state[name] = torch.zeros(shape, dtype=flat.dtype, device=flat.device)
    for name, scalar in scalars.items():
        values = {scalar.values.get(parameter) for parameter in names}
        if len(values) != 1:
            _refuse(checkpoint, f"'{name}' of '{names[0]}' and of others, which learn together here, differ")
        _set_scalar(optimizer, flat, name, scalar, values.pop())


def _refuse(checkpoint: Path, problem: str) -> None:
    raise TrainingError(f"{checkpoint}: {problem}; delete {checkpoint.parent} to start over")


def _set_scalar(optimizer: torch.optim.Optimizer, flat: Tensor, name: str, scalar: Scalar, value: Any) -> None:
    state = optimizer.state[flat]
    if scalar.dtype is None:
        state[name] = value
    elif isinstance(state.get(name), Tensor):
        state[name].fill_(value)
    else:
        # Note: torch keeps the number of steps where a fused kernel wants it, else on the host
        on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
        device = flat.device if on_device else torch.device("cpu")
        state[name] = torch.tensor(value, dtype=getattr(torch, scalar.dtype), device=device)


def _check_sums(engine: Any, mesh: Mesh, checkpoint: Path, index: Index, sums: Mapping[tuple[str, str], float]) -> None:
    """Look that all ranks together have what was saved, once."""
    learning = {name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    learning |= {holding.name for holding in buffers(engine.module, mesh)}
    for (name, state), found in zip(sums, mesh.sum_all(list(sums.values()), engine.device), strict=True):
        saved = index.tensors[name].squares[state]
        read = name in learning or state == VECTOR
        if read and not math.isclose(found, saved, rel_tol=SQUARES_TOLERANCE):
            raise TrainingError(
                f"{checkpoint}: '{state}' of '{name}' has the sum of squares {found} after it was read, wanted "
                f"{saved}; the files are as they were written, so this is a fault of the machine or of the program"
            )
