"""Which checkpoints stay, and how much room they need; imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import lcm

from pipeline.stage import Checkpoints


@dataclass(frozen=True)
class Summary:
    """What a checkpoint is judged by: whether it was saved between two regular ones, and its validation loss."""

    temporary: bool
    validation_loss: float | None


def superseded(found: Mapping[int, Summary], settings: Checkpoints) -> list[int]:
    """Return the steps of those of complete checkpoints that go."""
    if not found:
        return []
    permanent = sorted(step for step, summary in found.items() if not summary.temporary)
    kept = {max(found), *permanent[-settings.keep :]}
    if settings.keep_every_steps is not None:
        kept |= {step for step in permanent if step % settings.keep_every_steps == 0}
    losses = {step: s.validation_loss for step, s in found.items() if s.validation_loss is not None}
    if settings.keep_best and losses:
        kept.add(min(losses, key=lambda step: (losses[step], step)))
    return sorted(found.keys() - kept)


def most_at_once(settings: Checkpoints, steps: int) -> int:
    """Return how many checkpoints a training of `steps` steps has on the disk at most, with the one being written."""
    regular = -(-steps // settings.every_steps)  # the last step is saved too
    for_ever = 0
    if settings.keep_every_steps is not None:
        for_ever = steps // lcm(settings.every_steps, settings.keep_every_steps)
    kept = min(settings.keep + settings.keep_best + for_ever, regular)
    return kept + 1 + (settings.every_minutes is not None)


def checkpoint_bytes(params: int, state_copies: int) -> int:
    """Return the bytes of one checkpoint: every weight in fp32, and as many numbers of the optimizer beside it."""
    return 4 * params * (1 + state_copies)
