"""Learning-rate schedules: pure functions of the step. Imports no heavy library."""

import math
from abc import abstractmethod
from typing import Annotated, Literal

from pydantic import Field

from pipeline.settings import Choice


class Schedule(Choice):
    """A factor of the peak rate at each step, after a linear warm-up.

    Attributes:
        warmup_fraction: Share of the steps in which the rate rises to its peak.
    """

    warmup_fraction: float = Field(default=0.05, ge=0, le=1)

    def factor(self, step: int, steps: int) -> float:
        """Return what the peak rate is multiplied with at step 1 … `steps`."""
        warmup = round(self.warmup_fraction * steps)
        return step / max(warmup, 1) if step <= warmup else self._after_warmup(step, warmup, steps)

    @abstractmethod
    def _after_warmup(self, step: int, warmup: int, steps: int) -> float:
        """Return the factor at a step after `warmup` steps."""


class Constant(Schedule):
    """Linear warm-up, then the peak until the end."""

    kind: Literal["constant"] = "constant"

    def _after_warmup(self, step: int, warmup: int, steps: int) -> float:
        return 1.0


class Linear(Schedule):
    """Linear warm-up, then a straight line down to `final_fraction` of the peak (as BERT: Devlin et al. 2019, A.2)."""

    kind: Literal["linear"] = "linear"
    final_fraction: float = Field(default=0.0, ge=0, le=1)

    def _after_warmup(self, step: int, warmup: int, steps: int) -> float:
        # one more than the length, so that the last step still learns where the line ends at zero
        progress = (step - warmup) / (steps - warmup + (self.final_fraction == 0))
        return 1 - (1 - self.final_fraction) * progress


class Cosine(Schedule):
    """Linear warm-up, then half a cosine down to `final_fraction` of the peak (Loshchilov and Hutter 2017)."""

    kind: Literal["cosine"] = "cosine"
    final_fraction: float = Field(default=0.1, ge=0, le=1)

    def _after_warmup(self, step: int, warmup: int, steps: int) -> float:
        progress = (step - warmup) / max(steps - warmup, 1)
        return self.final_fraction + (1 - self.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))


class WSD(Schedule):
    """Linear warm-up, a constant rate, then 1 - sqrt decay to zero (Hägele et al. 2024)."""

    kind: Literal["wsd"] = "wsd"
    decay_fraction: float = Field(default=0.2, ge=0, le=1)

    def _after_warmup(self, step: int, warmup: int, steps: int) -> float:
        decay = round(self.decay_fraction * steps)
        into_decay = step - (steps - decay)
        # one more than the length, so that the last step still learns
        return 1.0 if into_decay <= 0 else 1 - math.sqrt(into_decay / (decay + 1))


class InverseSqrt(Schedule):
    """Linear warm-up, then sqrt(warm-up / step) (Vaswani et al. 2017, section 5.3); without warm-up 1 / sqrt(step)."""

    kind: Literal["inverse_sqrt"] = "inverse_sqrt"

    def _after_warmup(self, step: int, warmup: int, steps: int) -> float:
        return math.sqrt(max(warmup, 1) / step)


AnySchedule = Annotated[Constant | Linear | Cosine | WSD | InverseSqrt, Field(discriminator="kind")]
