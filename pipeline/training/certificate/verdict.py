"""What a certificate says of a layout: how far it ended from one process, and whether that is rounding."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.training.certificate.layouts import Layout, Precision

if TYPE_CHECKING:
    from pipeline.training.certificate.trial import Trace


ERRORS = ("loss", "grad_norm", "weights")


@dataclass(frozen=True)
class Bound:
    """How far a training may end from the one in a single process, in fp64.

    Attributes:
        loss: Largest difference of a step's loss, by the loss.
        grad_norm: Largest difference of a step's global gradient norm, by the norm.
        weights: Of a parameter, the norm of the difference by the norm of what it, or an average one, has learned.
    """

    loss: float
    grad_norm: float
    weights: float


# What rounding alone does, measured with the default settings over all layouts of 1, 2 and 4 ranks, and room for other
# processors and libraries, which add in another order. What a fault does is in tests/numerics/test_prove_faults.py.
BOUNDS: Mapping[Precision, Bound] = {
    # A sum in fp64 is off by some 1e-16; measured 4e-16, 5e-15 and 1e-14. The room is for larger models and more steps:
    # no fault is known that stays below.
    "fp64": Bound(loss=1e-12, grad_norm=1e-12, weights=1e-10),
    # The same with 6e-8; measured 2e-7, 2e-6 and 2e-5, times about 10. Weights of norms are the worst: their gradients
    # are small differences of large sums.
    "fp32": Bound(loss=3e-6, grad_norm=2e-5, weights=2e-4),
    # Products and activations have 8 bits, so are off by 4e-3; measured 8e-4, 8e-3 and 9e-2. Some first steps of single
    # weights go the other way, and that is as far off as weights can be, so there is less room.
    "bf16": Bound(loss=5e-3, grad_norm=5e-2, weights=0.3),
}


@dataclass(frozen=True)
class Row:
    """One line of the certificate.

    Attributes:
        loss: The largest relative error of a step's loss; null in a row about random numbers, as the next two.
        worst: The parameter whose error is the largest.
        problems: Why it is not what one process does, the worst first; none where it is.
        excess: How many times as large as its bound the worst error is.
    """

    name: str
    seconds: float
    precision: Precision | None = None
    loss: float | None = None
    grad_norm: float | None = None
    weights: float | None = None
    worst: str = ""
    problems: tuple[str, ...] = ()
    excess: float = 0.0

    @property
    def errors(self) -> tuple[float | None, ...]:
        """Return the three errors."""
        return self.loss, self.grad_norm, self.weights

    @property
    def json(self) -> dict[str, Any]:
        """Return it as plain data; an error that is not finite is null, and its problem says so."""
        named = zip(ERRORS, self.errors, strict=True)
        finite = {name: n if n is not None and math.isfinite(n) else None for name, n in named}
        said = {"worst": self.worst, "problems": list(self.problems), "seconds": round(self.seconds, 3)}
        return {"layout": self.name, "precision": self.precision, **finite, **said}


def judge(layout: Layout, trace: "Trace", reference: "Trace", first: "Trace", seconds: float) -> Row:
    """Compare what came of a layout with what came of one process.

    Args:
        first: What there was before the first step.
    """
    bound = BOUNDS[layout.precision]
    loss, loss_at = _worst_step(trace.losses, reference.losses)
    norm, norm_at = _worst_step(trace.grad_norms, reference.grad_norms)
    errors = dict(_errors(trace.weights, reference.weights, first.weights))
    worst = max(errors, key=lambda name: errors[name])
    off, most = errors[worst], bound.weights
    found = [
        (loss / bound.loss, f"the loss of step {loss_at} is off by {loss:.1e}, wanted at most {bound.loss:.0e}"),
        (
            norm / bound.grad_norm,
            f"the norm of step {norm_at} is off by {norm:.1e}, wanted at most {bound.grad_norm:.0e}",
        ),
        (off / most, f"'{worst}' is off by {off:.1e} of what it learned, wanted at most {most:.0e}"),
    ]
    if trace.apart:
        more = f" and {len(trace.apart) - 1} more" if len(trace.apart) > 1 else ""
        found.append((1.01, f"the ranks' copies of '{trace.apart[0]}'{more} are not the same"))
    found.sort(key=lambda problem: -problem[0])
    problems = tuple(problem for excess, problem in found if excess > 1)
    return Row(layout.name, seconds, layout.precision, loss, norm, errors[worst], worst, problems, found[0][0])


def _worst_step(found: Sequence[float], wanted: Sequence[float]) -> tuple[float, int]:
    """Return the largest relative error of a step, infinite where there is no number, and which one it was, from 1."""
    errors = [_finite(abs(a - b) / abs(b)) for a, b in zip(found, wanted, strict=True)]
    return max(errors), errors.index(max(errors)) + 1


def _errors(
    found: Mapping[str, Any], wanted: Mapping[str, Any], first: Mapping[str, Any]
) -> Iterator[tuple[str, float]]:
    """Yield of every parameter how far it ended from where it should, by how far it should have come.

    That is at least what parameters of its size come on average: the bias of keys has no gradient but what rounding
    makes, since it changes no difference of scores, and so nothing of its own to be measured by.
    """
    learned = {name: float((right - first[name]).norm()) for name, right in wanted.items()}
    mean_square = sum(norm**2 for norm in learned.values()) / sum(right.numel() for right in wanted.values())
    for name, right in wanted.items():
        off = float((found[name].to(right.dtype) - right).norm()) if found[name].shape == right.shape else math.inf
        come = max(learned[name], math.sqrt(mean_square * right.numel()))
        yield name, _finite(off / come if come else (off and math.inf))


def _finite(error: float) -> float:
    return math.inf if math.isnan(error) else error


def worst_first(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with problems, those that are furthest off first."""
    return sorted((row for row in rows if row.problems), key=lambda row: -row.excess)


def table(rows: Sequence[Row]) -> list[str]:
    """Return the rows as lines of a table, headings first."""
    width = max(len(row.name) for row in rows)
    return [heading(width), *(line(row, width) for row in rows)]


def heading(width: int) -> str:
    """Return the line above a table whose first column is so wide."""
    return f"{'layout':<{width}}  {'  '.join(f'{name:>8}' for name in ('loss', 'norm', 'weights'))}  worst tensor"


def line(row: Row, width: int) -> str:
    """Return one line of a table, and what is wrong below it."""
    numbers = (f"{n:8.1e}" if n is not None else " " * 8 for n in row.errors)
    wrong = "".join(f"\n    WRONG: {problem}" for problem in row.problems)
    said = row.worst or ("" if row.problems else "as they must be")
    return f"{row.name:<{width}}  {'  '.join(numbers)}  {said}{wrong}"
