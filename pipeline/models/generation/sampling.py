"""From logits to the next ids: penalties, temperature, what may be drawn, and the draw.

Letters of the shape suffixes: B rows, V ids of the vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.models.generation.settings import Greedy, Sample


def choose(logits_BV: Tensor, decoding: Greedy | Sample, uniforms: Sequence[float]) -> Tensor:
    """Return the next id of each row, (B,).

    Args:
        uniforms: For each row a number from [0, 1), which decides what is drawn.
    """
    if isinstance(decoding, Greedy):
        return logits_BV.argmax(-1)
    uniform_B = torch.tensor(uniforms, device=logits_BV.device)
    logits_BV = _cooled(logits_BV, decoding.temperature)
    return sample(logits_BV, uniform_B, decoding.top_k, decoding.top_p, decoding.min_p)


def sample(
    logits_BV: Tensor,
    uniform_B: Tensor,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """Return one id a row, (B,): where a number drawn uniformly from [0, 1) falls on the cumulated probabilities.

    The ids lie from the likeliest to the least likely; those that `top_k`, `top_p` and `min_p` leave out have no
    length. The likeliest is never left out.
    """
    probabilities_BV, ids_BV = logits_BV.softmax(-1).sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        probabilities_BV[:, top_k:] = 0.0
    if top_p is not None:
        mass_B1 = probabilities_BV.sum(-1, keepdim=True)
        before_BV = probabilities_BV.cumsum(-1) - probabilities_BV
        kept_BV = before_BV < top_p * mass_B1
        kept_BV[:, 0] = True  # though p times the mass may be no number above 0
        probabilities_BV = probabilities_BV.where(kept_BV, 0.0)
    if min_p is not None:
        probabilities_BV = probabilities_BV.where(probabilities_BV >= min_p * probabilities_BV[:, :1], 0.0)
    ends_BV = probabilities_BV.cumsum(-1)
    # Rounding can put the point at the very end; it then belongs to the last id that has a length.
    last_B1 = probabilities_BV.count_nonzero(-1).unsqueeze(1) - 1
    point_B1 = uniform_B.unsqueeze(1) * ends_BV[:, -1:]
    choice_B1 = torch.searchsorted(ends_BV, point_B1, right=True).minimum(last_B1)
    return ids_BV.gather(1, choice_B1).squeeze(1)


def _cooled(logits_BV: Tensor, temperature: float) -> Tensor:
    """Return the logits divided by `temperature`, less a number for each row that makes its largest 0.

    Their softmax is the same, and no temperature is so low that a logit overflows to infinity. What 32 bits cannot
    invert counts as the lowest that they can, at which anything but the largest logit already has probability 0.
    """
    peaks_B1 = logits_BV.amax(-1, keepdim=True)
    return (logits_BV - peaks_B1) / max(temperature, torch.finfo(torch.float32).tiny)


class Repetition:
    """Makes the ids that a row has already less likely; does nothing where the penalty is null."""

    def __init__(
        self, penalty: float | None, rows: Sequence[Sequence[int]], vocab_size: int, spared: int | None
    ) -> None:
        """Begin with the ids in `rows`; `spared` is never made less likely."""
        self.penalty, self.spared = penalty, spared
        self.seen_BV = torch.zeros(len(rows), vocab_size, dtype=torch.bool)
        if penalty is not None:
            for seen_V, row in zip(self.seen_BV, rows, strict=True):
                seen_V[list(row)] = True

    def apply(self, logits_BV: Tensor) -> Tensor:
        """Return the logits with the penalty."""
        if self.penalty is None:
            return logits_BV
        if self.spared is not None:
            self.seen_BV[:, self.spared] = False
        lower_BV = torch.where(logits_BV > 0, logits_BV / self.penalty, logits_BV * self.penalty)
        return torch.where(self.seen_BV.to(logits_BV.device), lower_BV, logits_BV)

    def add(self, ids: Sequence[int]) -> None:
        """Give each row its next id."""
        if self.penalty is not None:
            self.seen_BV[torch.arange(len(ids)), torch.tensor(ids)] = True

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows in this order."""
        self.seen_BV = self.seen_BV[list(rows)]
