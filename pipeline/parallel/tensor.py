"""Tensor and sequence parallelism, applied to a plain model from outside.

Tensor parallelism (Shoeybi et al. 2019, arXiv:1909.08053): the ranks of a group share the weights of every layer, each
with its heads, its part of the feed-forward layers' width and its ids of the vocabulary. Sequence parallelism
(Korthikanti et al. 2022, arXiv:2205.05198): between the products of a layer each of them has only its part of the
positions.

The model has seams where something passes between what all ranks have and what each has of its own. `split` puts there
what exchanges it, and keeps of every weight the slice that the plan names.

Letters of the shape suffixes: B rows, T positions, D d_model, X anything.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.parallel.mesh import Mesh

Exchange = Callable[[Tensor, Mesh], Tensor]
POSITIONS = 1  # the dimension of positions in the residual stream, (B, T, D)
SEED_FACTOR = 1_000_003  # a prime, so that neighbouring ranks draw other numbers
_collectives = torch.ops._c10d_functional  # out of place, and known to torch.compile and selective checkpointing


class Planned(Protocol):
    """What must be known of a weight; see `models.weights.Weight`."""

    @property
    def name(self) -> str:
        """Return its name in the model."""

    @property
    def cut(self) -> int | None:
        """Return the dimension along which ranks share it; null where each has all of it."""

    @property
    def summed(self) -> str | None:
        """Return when each rank's gradient is only a part of it: "heads" always, "sequence" with such parallelism."""


def split(model: Any, plan: Iterable[Planned], mesh: Mesh, sequence: bool = False) -> None:
    """Keep of a Transformer what is this rank's; with a single tensor-parallel rank nothing changes.

    A weight that ranks share gets the attributes `tensor_model_parallel` and `model_parallel`, by which DeepSpeed knows
    it, and `partition_dim`.

    Args:
        model: It may be on the device "meta"; see `materialize`.
        plan: All of its weights.
        sequence: Whether ranks share the positions too.
    """
    if mesh.tensor == 1:
        return
    for weight in plan:
        owner, name = _find(model, weight.name)
        if weight.cut is not None:
            part = nn.Parameter(_part(getattr(owner, name).detach(), weight.cut, mesh))
            part.requires_grad_(getattr(owner, name).requires_grad)
            part.tensor_model_parallel = part.model_parallel = True  # type: ignore[attr-defined]
            part.partition_dim = weight.cut  # type: ignore[attr-defined]
            setattr(owner, name, part)
        elif weight.summed == "heads" or (weight.summed == "sequence" and sequence):
            _sum_gradient(getattr(owner, name), mesh)
    for name, module in list(model.named_modules()):
        _install(name, module, mesh, sequence and ".blocks." in name)
    if sequence:
        model.length_multiple = mesh.tensor
        for stack in (model.encoder, model.decoder):
            if stack is not None:
                stack.scatter, stack.gather = (
                    Seam(_take_positions, _gather_positions, mesh),
                    Seam(_gather_positions, _take_positions, mesh),
                )
    _share_vocabulary(model, mesh)


def materialize(
    model: nn.Module,
    value: Callable[[str], Tensor],
    mesh: Mesh,
    settle: Callable[[nn.Parameter], None] | None = None,
) -> None:
    """Give a model on the device "meta" its weights, one by one, so that never more than one of them is here whole.

    Args:
        value: From the name of a parameter, or of a buffer that is saved with the model, to all of it; what is kept is
            this rank's part.
        settle: Called with each parameter before the next one is asked for.
    """
    device = torch.device("cpu")
    for name, empty in list(model.named_parameters()):
        dim = getattr(empty, "partition_dim", None)
        whole = value(name).to(empty.dtype)
        parameter = nn.Parameter(whole if dim is None else _part(whole, dim, mesh), empty.requires_grad)
        del whole  # before the next one is made
        parameter.__dict__.update(empty.__dict__)
        if getattr(parameter, "is_summed", False):
            _sum_gradient(parameter, mesh)
        _put(model, name, parameter)
        if settle is not None:
            settle(parameter)
        device = parameter.device
    for name, buffer in list(model.named_buffers()):
        _put(model, name, value(name).to(device, buffer.dtype))


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, last = _find(model, name)
    setattr(owner, last, tensor)


def _find(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, last = name.rpartition(".")
    return model.get_submodule(path), last


def _sum_gradient(parameter: Any, mesh: Mesh) -> None:
    """Let a gradient be summed over the ranks before anybody sees it."""
    if parameter.requires_grad:
        parameter.is_summed = True
        parameter.register_hook(partial(_sum, mesh=mesh))


def _install(name: str, module: Any, mesh: Mesh, shares_positions: bool) -> None:
    """Put what exchanges tensors into the seams of one module.

    Args:
        shares_positions: Whether this rank has only some of the positions between the products of a layer.
    """
    if name.endswith((".shared", ".shared.down")):  # lies with the experts between their seams
        return
    there, back = (_gather_positions, _sum_positions) if shares_positions else (None, _sum)
    if hasattr(module, "look"):
        if shares_positions:
            module.look = Seam(_gather_positions, _take_positions, mesh)
        module.enter, module.leave = Seam(None, _sum, mesh), Seam(back, there, mesh)
    elif hasattr(module, "enter"):
        module.enter = Seam(there, back, mesh)
    elif hasattr(module, "leave"):
        module.leave = Seam(back, there, mesh)
    if hasattr(module, "enter_memory"):
        module.enter_memory = Seam(None, _sum, mesh)
    if hasattr(module, "branch"):
        module.branch = partial(own_random_numbers, mesh)
    elif shares_positions and isinstance(getattr(module, "dropout", None), nn.Dropout) and module.dropout.p:
        module.dropout = OwnDropout(module.dropout, mesh)


def _share_vocabulary(model: Any, mesh: Mesh) -> None:
    first_id = mesh.tensor_rank * len(model.embedding.weight)
    model.embedding = SharedEmbedding(model.embedding.weight, first_id, mesh)
    model.first_id, model.vocabulary_group = first_id, mesh.tensor_group
    model.enter_output, model.leave_output = Seam(None, _sum, mesh), Seam(_gather_last, _take_last, mesh)


class SharedEmbedding(nn.Module):
    """An embedding of which each rank has the rows of some ids.

    Attributes:
        weight: (V, D), those from `first_id` on.
    """

    def __init__(self, weight: nn.Parameter, first_id: int, mesh: Mesh) -> None:
        super().__init__()
        self.weight, self.first_id = weight, first_id
        self.leave = Seam(_sum, None, mesh)

    def forward(self, ids_X: Tensor) -> Tensor:
        """Return (..., D) for any ids."""
        rows_X = ids_X - self.first_id
        is_here_X = (rows_X >= 0) & (rows_X < len(self.weight))
        found_XD = F.embedding(rows_X.where(is_here_X, 0), self.weight)
        return self.leave(found_XD.masked_fill(~is_here_X.unsqueeze(-1), 0.0))


class OwnDropout(nn.Module):
    """Dropout of what each rank has of its own."""

    def __init__(self, dropout: nn.Dropout, mesh: Mesh) -> None:
        super().__init__()
        self.dropout, self._mesh = dropout, mesh

    def forward(self, x_X: Tensor) -> Tensor:
        """Return what is left."""
        with own_random_numbers(self._mesh) if self.training else nullcontext():
            left_X: Tensor = self.dropout(x_X)
        return left_X


@contextmanager
def own_random_numbers(mesh: Mesh) -> Iterator[None]:
    """Draw other numbers on each tensor-parallel rank within the block, and the same ones again after it.

    They depend on the numbers that all ranks draw, so that recomputation, which begins with the same, draws the same.
    """
    number = int(torch.randint(2**62, ()))
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed((number + mesh.tensor_rank * SEED_FACTOR) % 2**63)
        yield


class Seam:
    """Where a tensor passes between what all ranks have and what each has of its own, and its gradient passes back."""

    def __init__(self, there: Exchange | None, back: Exchange | None, mesh: Mesh) -> None:
        """Take what is done on either way; null is nothing."""
        self._there, self._back, self._mesh = there or _keep, back or _keep, mesh

    def __call__(self, x_X: Tensor) -> Tensor:
        """Return what is on the other side."""
        y_X: Tensor = _Passage.apply(x_X, self._there, self._back, self._mesh)  # type: ignore[no-untyped-call]
        return y_X


class _Passage(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_X: Tensor, there: Exchange, back: Exchange, mesh: Mesh) -> Tensor:
        ctx.back, ctx.mesh = back, mesh
        return there(x_X, mesh)

    @staticmethod
    def backward(ctx: Any, dy_X: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.back(dy_X, ctx.mesh), None, None, None


def _keep(x_X: Tensor, mesh: Mesh) -> Tensor:
    return x_X.view_as(x_X)


def _sum(x_X: Tensor, mesh: Mesh) -> Tensor:
    """Return the sum of what all ranks have, on each."""
    group = mesh.tensor_group.group_name
    summed_X: Tensor = _collectives.wait_tensor(_collectives.all_reduce(x_X.contiguous(), "sum", group))
    return summed_X


def _gather(x_X: Tensor, dim: int, mesh: Mesh) -> Tensor:
    """Return the parts of all ranks, one after another along a dimension."""
    group = mesh.tensor_group.group_name
    gathered = _collectives.all_gather_into_tensor(x_X.contiguous(), mesh.tensor, group)
    parts_X: Tensor = _collectives.wait_tensor(gathered)
    return torch.cat(parts_X.chunk(mesh.tensor), dim)


def _part(x_X: Tensor, dim: int, mesh: Mesh) -> Tensor:
    """Return a copy of this rank's part of a tensor."""
    size = x_X.shape[dim] // mesh.tensor
    return x_X.narrow(dim, mesh.tensor_rank * size, size).clone(memory_format=torch.contiguous_format)


def _gather_positions(x_BTD: Tensor, mesh: Mesh) -> Tensor:
    return _gather(x_BTD, POSITIONS, mesh)


def _take_positions(x_BTD: Tensor, mesh: Mesh) -> Tensor:
    if x_BTD.shape[POSITIONS] % mesh.tensor:
        raise ConfigError(
            f"run.parallel.sequence: {x_BTD.shape[POSITIONS]} positions cannot be divided among {mesh.tensor} ranks; "
            "take lengths that divide, or set it to false"
        )
    return _part(x_BTD, POSITIONS, mesh)


def _sum_positions(x_BTD: Tensor, mesh: Mesh) -> Tensor:
    """Return this rank's positions of the sum of what all ranks have."""
    stacked = torch.cat(x_BTD.chunk(mesh.tensor, POSITIONS))
    group = mesh.tensor_group.group_name
    scattered = _collectives.reduce_scatter_tensor(stacked, "sum", mesh.tensor, group)
    summed_BTD: Tensor = _collectives.wait_tensor(scattered)
    return summed_BTD


def _gather_last(x_X: Tensor, mesh: Mesh) -> Tensor:
    return _gather(x_X, -1, mesh)


def _take_last(x_X: Tensor, mesh: Mesh) -> Tensor:
    return _part(x_X, -1, mesh)
