"""Adafactor without momentum (Shazeer and Stern 2018, arXiv:1804.04235), algorithms 4 and 5."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.parallel.partitions import Cut, Layout
from pipeline.training.optim.flat import MatrixOptimizer
from pipeline.training.optim.groups import Group


class AdafactorOptimizer(MatrixOptimizer):
    """Divides the gradient by the root of its second moment, of which matrices keep only rows and columns.

    The state of matrices is "squares/<parameter>": of each matrix its rows' sums of squares, then its columns', shaped
    (rows + columns) or of a stack (experts, rows + columns); of the whole parameter, on every rank. A vector of norms
    and biases keeps `exp_avg_sq`.
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
        self._plans: dict[Tensor, Plan] = {}

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: Group) -> None:
        """Update one parameter, or one vector of them."""
        if parameter not in self._plans:
            self._plans[parameter] = Plan(self.layout(parameter), group["rule"] == "factored")
        plan = self._plans[parameter]
        state["count"] = state.get("count", 0) + 1
        decay = 1 - state["count"] ** -self.decay_power
        update = gradient.reshape(-1).clone()
        pieces = plan.pieces(update)
        if plan.is_factored:
            self._divide_factored(pieces, plan, state, decay)
        else:
            squares = update.square().add_(self.eps).view(parameter.shape)
            state.setdefault("exp_avg_sq", squares.clone()).lerp_(squares, 1 - decay)
            update.div_(state["exp_avg_sq"].view(-1).sqrt())
        sums = [
            piece.square().sum() for both in zip(pieces, plan.pieces(parameter.view(-1)), strict=True) for piece in both
        ]
        means = plan.sum_units(torch.stack(sums).view(-1, 2)) / update.new_tensor(plan.sizes).unsqueeze(1)
        update_rms, parameter_rms = means.sqrt_().unbind(1)
        factors = 1 / (update_rms / self.clip_threshold).clamp(min=1)
        if self.smallest_rms is not None:
            factors *= parameter_rms.clamp(min=self.smallest_rms)
        for factor, piece in zip(factors, pieces, strict=True):
            piece.mul_(factor)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update.view(parameter.shape), alpha=-group["lr"])

    def _divide_factored(self, pieces: list[Tensor], plan: "Plan", state: dict[str, Any], decay: float) -> None:
        """Move the squares of rows and columns on, and divide the gradient by what they say of each element."""
        sums = pieces[0].new_zeros(plan.num_squares)
        squares = plan.squares(sums)
        for place, piece, lines in zip(plan.places, pieces, _lines(squares), strict=True):
            place.add_squares(piece, lines, self.eps)
        plan.sum_squares(sums)
        kept = [
            state.setdefault(f"squares/{cut.name}", new.clone()) for cut, new in zip(plan.cuts, squares, strict=True)
        ]
        torch._foreach_lerp_(kept, squares, 1 - decay)
        for place, piece, lines in zip(plan.places, pieces, _lines(kept), strict=True):
            place.divide(piece, lines)


class Plan:
    """What does not change from step to step: which units lie where in a vector, and over which ranks they are summed.

    A unit is a matrix, those of stacks one by one, or where nothing is factored a parameter. What tensor-parallel ranks
    share comes first, so that its sums are in one piece.

    Attributes:
        cuts: The parameters.
        places: Where the elements of each matrix are in the matrix.
        sizes: Number of elements of each unit, of the whole.
        num_squares: Number of all sums of rows and columns.
    """

    def __init__(self, layout: Layout, is_factored: bool) -> None:
        self.layout, self.is_factored = layout, is_factored
        self.cuts = sorted(layout.cuts, key=lambda cut: cut.sliced is None)
        units = [m for cut in self.cuts for m in cut.matrices(layout.rank)] if is_factored else self.cuts
        self._slots = [(unit.offset, unit.share(layout.rank)) for unit in units]
        self.places = [Place(unit, layout) for unit in units] if is_factored else []
        self.sizes = [math.prod(layout.whole_shape(unit)) for unit in units]
        wholes = [layout.whole_shape(cut) for cut in self.cuts]
        self._shapes = [(*shape[:-2], sum(shape[-2:])) for shape in wholes]
        self._lengths = [math.prod(shape) for shape in self._shapes]
        self.num_squares = sum(self._lengths)
        self._num_shared = sum(unit.sliced is not None for unit in units)
        self._num_shared_squares = sum(
            length for cut, length in zip(self.cuts, self._lengths, strict=True) if cut.sliced is not None
        )

    def pieces(self, flat: Tensor) -> list[Tensor]:
        """Return this rank's elements of each unit in a vector laid out like the parameters."""
        return [flat.narrow(0, *slot) for slot in self._slots]

    def squares(self, sums: Tensor) -> list[Tensor]:
        """Return the part of each parameter in a vector of `num_squares`."""
        parts = torch.split(sums, self._lengths)
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def sum_squares(self, sums: Tensor) -> None:
        """Sum what ranks have of rows and columns, in place."""
        self._sum(sums, self._num_shared_squares)

    def sum_units(self, sums: Tensor) -> Tensor:
        """Sum what ranks have of each unit (units, …), in place."""
        self._sum(sums, self._num_shared)
        return sums

    def _sum(self, sums: Tensor, num_shared: int) -> None:
        if self.layout.group is not None:
            dist.all_reduce(sums, group=self.layout.group)
        if self.layout.tensor > 1 and num_shared:
            dist.all_reduce(sums[:num_shared], group=self.layout.tensor_group)


class Place:
    """Where this rank's elements of a matrix are in it.

    Of what its tensor-parallel rank has of the matrix, some rows or some columns, they are some whole rows, the first
    and the last perhaps in part.
    """

    def __init__(self, cut: Cut, layout: Layout) -> None:
        (height, width), start, stop = cut.shape, cut.bounds[layout.rank], cut.bounds[layout.rank + 1]
        first, last = (start // width, -(-stop // width)) if stop > start else (0, 0)
        self._width = width
        self._missing = (start - first * width, last * width - stop) if stop > start else (0, 0)
        above = layout.tensor_rank * height if cut.sliced == 0 else 0
        left = layout.tensor_rank * width if cut.sliced == 1 else 0
        num_rows = layout.whole_shape(cut)[0]
        # Where the sums of its rows and of its columns are, among those of the whole matrix
        self._rows, self._columns = slice(above + first, above + last), slice(num_rows + left, num_rows + left + width)
        self._all_rows = slice(0, num_rows)

    def add_squares(self, elements: Tensor, lines: Tensor, eps: float) -> None:
        """Add the sums of their squares, each with `eps` added, to those of the whole matrix: rows', then columns'."""
        squares = torch.nn.functional.pad(elements.square().add_(eps), self._missing).view(-1, self._width)
        lines[self._rows] += squares.sum(1)
        lines[self._columns] += squares.sum(0)

    def divide(self, elements: Tensor, lines: Tensor) -> None:
        """Divide each element by the root of its row's share of all rows times its column's number."""
        rows = lines[self._rows] / lines[self._all_rows].sum()
        divisor = torch.outer(rows.rsqrt(), lines[self._columns].rsqrt()).view(-1)
        elements.mul_(divisor.narrow(0, self._missing[0], len(elements)))


def _lines(squares: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the sums of each matrix, of its rows and then of its columns."""
    for of_parameter in squares:
        yield from of_parameter.view(-1, of_parameter.shape[-1])
