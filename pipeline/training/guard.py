"""The guard: looks at every step before it changes a weight, and says what to do about one that must not.

`Watch` judges a step by numbers that are the same on every rank, so that all say the same without asking one another;
`decide` turns what it found into an event of the ledger. Restoring a checkpoint is the loop's work.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from pipeline.errors import TrainingError
from pipeline.settings import Settings
from pipeline.training.ledger import Event

NORMAL = 1.4826  # standard deviations of a normal distribution in one median absolute deviation
LOSS_FLOOR = 0.02  # of the median or of a nat, whichever is more; a smaller spread of losses counts as this
NORM_FLOOR = 0.1  # of the logarithm: a tenth of the norm
MIN_SCALE = 1.0  # of the loss in fp16; an overflow at this one can no longer be helped by a smaller one


class Guard(Settings):
    """What is done about a step whose loss or gradient is not finite, or far above those before it.

    How far is a robust z-score: the distance from the median of the last `window` steps, in standard deviations as the
    median absolute deviation gives them (Iglewicz and Hoaglin 1993); of the gradient's norm the logarithm is taken,
    since it has a long tail. The default threshold lies above all that 51 undisturbed trainings showed: 4 in the loss,
    11 in the norm.

    Attributes:
        policy: "fail" ends the run; "skip" passes over the step; "rollback" goes back to the newest checkpoint too, and
            passes over `skip_batches` up to it, since the harm may have been done before it was seen (Chowdhery et al.
            2022, arXiv:2204.02311, section 5.1). Without a checkpoint a rollback is a skip.
        window: Steps that a step is compared with. Until there are so many a loss is compared with those that there
            are, and the norm of the gradient, which changes much at the beginning, with none.
        threshold: Largest z-score that is let through.
        skip_batches: How many batches a rollback passes over, the bad one included, but none that is in the checkpoint;
            with 1 the weights would come back to the same bits.
        max_in_a_row: How many events may follow one another before the run fails: skips without a trained step in
            between, rollbacks without one that is safe in a checkpoint.
    """

    policy: Literal["fail", "skip", "rollback"] = "rollback"
    window: int = Field(default=128, ge=8)
    threshold: float = Field(default=15.0, gt=0)
    skip_batches: int = Field(default=8, ge=1)
    max_in_a_row: int = Field(default=5, ge=1)


@dataclass(frozen=True)
class Finding:
    """Why a step must not change the weights.

    Attributes:
        reason: In words.
        z: Its robust z-score; null if something is not finite.
    """

    step: int
    reason: str
    loss: float
    grad_norm: float
    z: float | None = None


class Watch:
    """Compares every step with those before it. All that it knows goes into a checkpoint as `state`."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self._losses: deque[float] = deque(maxlen=guard.window)
        self._norms: deque[float] = deque(maxlen=guard.window)  # logarithms

    def judge(self, step: int, loss: float, grad_norm: float, loss_scale: float | None = None) -> Finding | None:
        """Return what is wrong with a step, or null; what is wrong is not remembered.

        Args:
            loss: Of the whole batch.
            grad_norm: Global norm of the gradient before clipping; infinite where it is not finite.
            loss_scale: What the loss was multiplied with in fp16. As long as it can still fall, a gradient that is not
                finite says only that it was too large: DeepSpeed halves it and updates nothing.
        """
        if not math.isfinite(loss):
            return Finding(step, f"the loss is {loss}", loss, grad_norm)
        if not math.isfinite(grad_norm):
            if loss_scale is not None and loss_scale > MIN_SCALE:
                return None
            return Finding(step, "the gradient is not finite", loss, grad_norm)
        norm = math.log(max(grad_norm, 1e-30))
        found = self._judge_height(step, loss, grad_norm, norm)
        if found is not None:
            return found
        self._losses.append(loss)
        self._norms.append(norm)
        return None

    def state(self) -> dict[str, list[float]]:
        """Return the losses and the logarithms of norms that it remembers, as plain data."""
        return {"losses": list(self._losses), "norms": list(self._norms)}

    def restore(self, state: Mapping[str, Sequence[float]]) -> None:
        """Remember what `state` returned, instead of all else; an empty mapping is a new beginning."""
        for name, memory in (("losses", self._losses), ("norms", self._norms)):
            memory.clear()
            memory.extend(state.get(name, ()))

    def _judge_height(self, step: int, loss: float, grad_norm: float, norm: float) -> Finding | None:
        """Return whether a loss or the logarithm of a norm lies too high."""
        if not self._losses:
            return None
        middle, z = _robust_z(loss, self._losses, LOSS_FLOOR)
        if z > self.guard.threshold:
            reason = f"the loss is {loss:.4g}, against {middle:.4g} before ({self._height(z)})"
            return Finding(step, reason, loss, grad_norm, z)
        if len(self._norms) < self.guard.window:
            return None
        middle, z = _robust_z(norm, self._norms, NORM_FLOOR, relative=False)
        if z > self.guard.threshold:
            reason = (
                f"the norm of the gradient is {grad_norm:.4g}, against {math.exp(middle):.4g} before "
                f"(of its logarithm {self._height(z)})"
            )
            return Finding(step, reason, loss, grad_norm, z)
        return None

    def _height(self, z: float) -> str:
        return f"{z:.1f} robust standard deviations, where guard.threshold allows {self.guard.threshold:g}"


def decide(guard: Guard, events: Sequence[Event], found: Finding, checkpoint: int | None, place: str = "") -> Event:
    """Return the event that follows from a finding: which steps to pass over, and whether to go back first.

    Args:
        events: Those of the ledger before it.
        checkpoint: The step of the newest complete checkpoint; null where there is none.
        place: What a message begins with.

    Raises:
        TrainingError: If the policy is to fail, or there were too many events in a row.
    """
    what = f"{place}step {found.step}: {found.reason}"
    if guard.policy == "fail":
        raise TrainingError(f"{what}; {_advise(found)}")
    goes_back = guard.policy == "rollback" and checkpoint is not None
    kept = checkpoint if goes_back and checkpoint is not None else found.step - 1  # the last step that stays as it was
    passed = {step for event in events for step in event.skipped}
    row = sum(all(step in passed for step in range(event.step + 1, kept + 1)) for event in events)
    if row >= guard.max_in_a_row:
        raise TrainingError(f"{what}; this after {row} such steps in a row (guard.max_in_a_row); {_advise(found)}")
    first = max(kept + 1, found.step - guard.skip_batches + 1) if goes_back else found.step
    return Event(
        step=found.step,
        reason=found.reason,
        loss=_finite(found.loss),
        grad_norm=_finite(found.grad_norm),
        z=found.z,
        policy="rollback" if goes_back else "skip",
        rolled_back_to=kept if goes_back else None,
        skipped=[step for step in range(first, found.step + 1) if step not in passed],
    )


def _advise(found: Finding) -> str:
    """Return the ways out of a run that ends because of a finding."""
    higher = "" if found.z is None else "; if training is well, a higher guard.threshold lets such a step through"
    return (
        "`python -m pipeline trace` says which documents were in it; a lower optimizer.lr or a clip_norm often helps: "
        f"that is another training, which may begin from a checkpoint of this one (init_from){higher}"
    )


def _robust_z(value: float, seen: Sequence[float], floor: float, relative: bool = True) -> tuple[float, float]:
    """Return the median of what was seen, and how many standard deviations a value lies above it.

    Args:
        floor: The least standard deviation, where `relative` as a share of the median or of 1, whichever is more.
    """
    middle = _median(seen)
    deviation = NORMAL * _median([abs(one - middle) for one in seen])
    least = floor * max(1.0, abs(middle)) if relative else floor
    return middle, (value - middle) / max(deviation, least)


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
