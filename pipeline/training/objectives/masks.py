"""Which tokens are masked, and what stands in their place; the arithmetic of masked language modelling."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pipeline.training.objectives.draws import Draws
from pipeline.training.objectives.objective import IGNORED, SpecialIds

if TYPE_CHECKING:
    from pipeline.training.objectives.masked import Masking
    from pipeline.training.objectives.objective import Array

UNMASKED = -1


def mask(values: Array, documents: Array, settings: Masking, ids: SpecialIds, draws: Draws) -> tuple[Array, Array]:
    """Return (ids with some of them masked, the labels: what stood there, elsewhere -100); special ids never are."""
    candidates = ~ids.special[values]
    if not candidates.any():
        return values.copy(), np.full_like(values, IGNORED)
    groups = choose(values, documents, candidates, settings, ids, draws)
    chosen = np.flatnonzero(groups != UNMASKED)
    masked, labels = values.copy(), np.full_like(values, IGNORED)
    labels[chosen] = values[chosen]
    fates = draws.uniform(int(groups.max()) + 1)[groups[chosen]]
    masked[chosen[fates < settings.mask_share]] = ids[settings.mask_token]
    random = chosen[(fates >= settings.mask_share) & (fates < settings.mask_share + settings.random_share)]
    masked[random] = ids.ordinary[draws.below(len(ids.ordinary), len(random))]
    return masked, labels


def choose(
    values: Array, documents: Array, candidates: Array, settings: Masking, ids: SpecialIds, draws: Draws
) -> Array:
    """Return a number for each token: -1 if it is not chosen; tokens of one number are all replaced alike."""
    budget = max(1, round(settings.rate * int(candidates.sum())))
    groups = np.full(len(values), UNMASKED, np.int64)
    if settings.unit == "token":
        places = np.flatnonzero(candidates)
        chosen = places[draws.order(len(places))[:budget]]
        groups[chosen] = np.arange(len(chosen))
        return groups
    starts, lengths, fences = find_words(values, documents, candidates, ids)
    if settings.unit == "span":
        _choose_spans(groups, starts, lengths, fences, budget, settings, draws)
        return groups
    chosen = np.zeros(len(values), np.bool_)
    for word in draws.order(len(starts)).tolist():
        if lengths[word] <= budget:  # a word that is too long is passed over, as in BERT
            chosen[starts[word] : starts[word] + lengths[word]] = True
            budget -= lengths[word]
        if not budget:
            break
    groups[chosen] = np.arange(int(chosen.sum()))
    return groups


def find_words(
    values: Array, documents: Array, candidates: Array, ids: SpecialIds
) -> tuple[list[int], list[int], list[bool]]:
    """Return of every word its first token, how many it has, and whether the word before it is not beside it."""
    before = np.concatenate([[False], candidates[:-1]])
    fences = candidates & ~(before & np.concatenate([[False], documents[1:] == documents[:-1]]))
    spaces = np.concatenate([[True], ids.breaks[values[:-1]]])
    begins = fences | (candidates & (spaces | ~ids.continues[values]))
    words = np.cumsum(begins)[candidates] - 1
    starts = np.flatnonzero(begins)
    return starts.tolist(), np.bincount(words, minlength=len(starts)).tolist(), fences[starts].tolist()


def _choose_spans(
    groups: Array,
    starts: list[int],
    lengths: list[int],
    fences: list[bool],
    budget: int,
    settings: Masking,
    draws: Draws,
) -> None:
    """Fill `groups` with spans of whole words until the budget is spent; the last may be cut."""
    order = draws.order(len(starts)).tolist()
    sizes = span_lengths(settings, draws, len(starts)).tolist()
    for number, (first, size) in enumerate(zip(order, sizes, strict=True)):
        if groups[starts[first]] != UNMASKED:
            continue
        for word in range(first, min(first + size, len(starts))):
            start = starts[word]
            if (word > first and fences[word]) or groups[start] != UNMASKED:
                break
            taken = min(lengths[word], budget)
            groups[start : start + taken] = number
            budget -= taken
            if not budget:
                return


def span_lengths(settings: Masking, draws: Draws, count: int) -> Array:
    """Return lengths of spans, geometric up to `max_span_words`."""
    shares = settings.span_stop * (1 - settings.span_stop) ** np.arange(settings.max_span_words)
    edges = np.cumsum(shares / shares.sum())[:-1]
    return 1 + np.searchsorted(edges, draws.uniform(count), side="right")
