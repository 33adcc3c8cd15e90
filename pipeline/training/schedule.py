"""Learning-rate schedules: pure functions of the step. Imports no heavy library."""

import math
from typing import Annotated, Literal

from pydantic import Field

from pipeline.settings import Choice


class Cosine(Choice):
    """Linear warm-up, then half a cosine down to `final_fraction` of the peak (Loshchilov and Hutter 2017)."""

    kind: Literal["cosine"] = "cosine"
    warmup_fraction: float = Field(default=0.05, ge=0, le=1)
    final_fraction: float = Field(default=0.1, ge=0, le=1)

    def factor(self, step: int, steps: int) -> float:
        """Return what the peak rate is multiplied with at step 1 … `steps`."""
        warmup = round(self.warmup_fraction * steps)
        if step <= warmup:
            return step / max(warmup, 1)
        progress = (step - warmup) / max(steps - warmup, 1)
        return self.final_fraction + (1 - self.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))


class WSD(Choice):
    """Linear warm-up, a constant rate, then 1 - sqrt decay to zero (Hägele et al. 2024)."""

    kind: Literal["wsd"] = "wsd"
    warmup_fraction: float = Field(default=0.05, ge=0, le=1)
    decay_fraction: float = Field(default=0.2, ge=0, le=1)

    def factor(self, step: int, steps: int) -> float:
        """Return what the peak rate is multiplied with at step 1 … `steps`."""
        warmup, decay = round(self.warmup_fraction * steps), round(self.decay_fraction * steps)
        if step <= warmup:
            return step / max(warmup, 1)
        into_decay = step - (steps - decay)
        # one more than the length, so that the last step still learns
        return 1.0 if into_decay <= 0 else 1 - math.sqrt(into_decay / (decay + 1))


AnySchedule = Annotated[Cosine | WSD, Field(discriminator="kind")]
