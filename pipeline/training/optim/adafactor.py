"""Adafactor without momentum (Shazeer and Stern 2018, arXiv:1804.04235), algorithms 4 and 5."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.parallel.partitions import Cut, Layout
from pipeline.training.optim.flat import MatrixOptimizer
from pipeline.training.optim.groups import Group


class AdafactorOptimizer(MatrixOptimizer):
    """Divides the gradient by the root of its second moment, of which matrices keep only rows and columns.

    The state of matrices is `squares`: for each its rows' sums of squares, then its columns'. Every rank that shares
    a vector has those of all its matrices. A vector of norms and biases keeps `exp_avg_sq`.
    """

    def __init__(
        self,
        groups: list[Group],
        lr: float,
        decay_power: float,
        clip_threshold: float,
        eps: float,
        smallest_rms: float | None,
    ) -> None:
        super().__init__(groups, lr)
        self.decay_power, self.clip_threshold, self.eps = decay_power, clip_threshold, eps
        self.smallest_rms = smallest_rms  # null: a step does not depend on the size of the parameter

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: Group) -> None:
        """Update one parameter, or one vector of them."""
        layout = self.layout(parameter)
        is_factored = group["rule"] == "factored"
        units = layout.matrices() if is_factored else list(layout.cuts)
        state["count"] = state.get("count", 0) + 1
        decay = 1 - state["count"] ** -self.decay_power
        flat, update = parameter.view(-1), gradient.reshape(-1).clone()
        if is_factored:
            self._divide_factored(update, units, layout, state, decay)
        else:
            squares = update.square().add_(self.eps)
            state.setdefault("exp_avg_sq", squares.clone()).lerp_(squares, 1 - decay)
            update.div_(state["exp_avg_sq"].sqrt())
        sizes = [math.prod(unit.shape) for unit in units]
        pieces = [vector.narrow(0, unit.offset, unit.share(layout.rank)) for vector in (update, flat) for unit in units]
        sums = _over_ranks(torch.stack([piece.square().sum() for piece in pieces]), layout)
        update_rms, parameter_rms = (sums.view(2, -1) / sums.new_tensor(sizes)).sqrt()
        factors = 1 / (update_rms / self.clip_threshold).clamp(min=1)
        if self.smallest_rms is not None:
            factors *= parameter_rms.clamp(min=self.smallest_rms)
        for factor, piece in zip(factors, pieces[: len(units)], strict=True):
            piece.mul_(factor)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update.view(parameter.shape), alpha=-group["lr"])

    def _divide_factored(
        self, update: Tensor, matrices: list[Cut], layout: Layout, state: dict[str, Any], decay: float
    ) -> None:
        """Move the squares of rows and columns on, and divide the gradient by what they say of each element."""
        lengths = [length for cut in matrices for length in cut.shape]
        sums = update.new_zeros(sum(lengths))
        pieces = [Piece(update, cut, layout.rank) for cut in matrices]
        lines = torch.split(sums, lengths)
        for piece, rows, columns in zip(pieces, lines[::2], lines[1::2], strict=True):
            piece.add_squares(rows, columns, self.eps)
        sums = _over_ranks(sums, layout)
        lines = torch.split(state.setdefault("squares", sums.clone()).lerp_(sums, 1 - decay), lengths)
        for piece, rows, columns in zip(pieces, lines[::2], lines[1::2], strict=True):
            piece.divide(rows / rows.sum(), columns)


class Piece:
    """The elements of a matrix that lie on this rank: some whole rows, the first and the last perhaps in part."""

    def __init__(self, flat: Tensor, cut: Cut, rank: int) -> None:
        width, start, stop = cut.shape[1], cut.bounds[rank], cut.bounds[rank + 1]
        self.elements = flat.narrow(0, cut.offset, stop - start)
        self.rows = slice(start // width, -(-stop // width)) if stop > start else slice(0, 0)
        self.missing = (start - self.rows.start * width, self.rows.stop * width - stop) if stop > start else (0, 0)
        self.width = width

    def add_squares(self, rows: Tensor, columns: Tensor, eps: float) -> None:
        """Add the sums of its squares, each with `eps` added, to those of the whole matrix."""
        squares = torch.nn.functional.pad(self.elements.square().add_(eps), self.missing).view(-1, self.width)
        rows[self.rows] += squares.sum(1)
        columns += squares.sum(0)

    def divide(self, rows: Tensor, columns: Tensor) -> None:
        """Divide each element by the root of its row's number times its column's."""
        divisor = torch.outer(rows[self.rows].rsqrt(), columns.rsqrt()).view(-1)
        self.elements.mul_(divisor.narrow(0, self.missing[0], len(self.elements)))


def _over_ranks(sums: Tensor, layout: Layout) -> Tensor:
    """Return the sums over all ranks that share a vector."""
    if layout.group is not None:
        dist.all_reduce(sums, group=layout.group)
    return sums
