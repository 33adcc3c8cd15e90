"""Spans of a text that are taken out of it, and put behind markers; the arithmetic of span corruption."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from pipeline.training.objectives.draws import Draws
from pipeline.training.objectives.objective import IGNORED, PADDING, SpecialIds
from pipeline.training.objectives.pieces import fill

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.training.objectives.objective import Array, Example

Span = tuple[int, int]


def count_spans(num_tokens: int, density: float, mean_span: float | None) -> tuple[int, int]:
    """Return (how many tokens are taken out of a text, in how many spans), as T5 counts them (Raffel et al. 2020).

    A text of fewer than two tokens has none; every span has at least one token before it that stays.

    Args:
        mean_span: Tokens of a span; null is a single one.
    """
    if num_tokens < 2:
        return 0, 0
    noise = min(max(round(num_tokens * density), 1), num_tokens - 1)
    spans = 1 if mean_span is None else max(round(noise / mean_span), 1)
    return noise, min(spans, noise, num_tokens - noise)


@lru_cache
def longest_input(room: int, density: float, mean_span: float | None, markers: bool, targets: bool = False) -> int:
    """Return how many tokens a text may have so that what is left of it fits into `room` positions.

    Args:
        markers: Whether each span leaves a marker.
        targets: Whether the spans, each behind its marker, and an end of text have to fit too.
    """
    num_tokens = 0
    while True:
        noise, spans = count_spans(num_tokens + 1, density, mean_span)
        size = num_tokens + 1 - noise + spans * markers
        if size + targets * (noise + spans * markers + 1) > room:
            return num_tokens
        num_tokens += 1


def draw_spans(num_tokens: int, density: float, mean_span: float | None, draws: Draws) -> list[Span]:
    """Return (start, stop) of every span: all ways to divide the tokens among spans and gaps are equally likely."""
    noise, count = count_spans(num_tokens, density, mean_span)
    if not count:
        return []
    sizes = np.stack([_divide(num_tokens - noise, count, draws), _divide(noise, count, draws)], axis=1)
    edges = np.cumsum(sizes).reshape(count, 2)
    return [(start, stop) for start, stop in edges.tolist()]


def keep_inside(spans: Sequence[Span], documents: Array) -> tuple[list[Span], Array]:
    """Return spans and documents such that no span goes over the end of a document.

    A span that does is moved, by as little as possible, into one of the two. Where it finds no room the two documents
    become one for this example; so the numbers of tokens and of spans stay what they are.
    """
    moved, merged = list(spans), documents.copy()
    for number, (start, stop) in enumerate(spans):
        if documents[start] == documents[stop - 1]:
            continue
        size = stop - start
        first = moved[number - 1][1] + 1 if number else 1
        last = spans[number + 1][0] - 1 if number + 1 < len(spans) else len(documents)
        edges = start + 1 + np.flatnonzero(np.diff(documents[start:stop]))
        places = [place for edge in edges.tolist() for place in (edge - size, edge)]
        places = [
            place
            for place in places
            if first <= place and place + size <= last and documents[place] == documents[place + size - 1]
        ]
        if places:
            place = min(places, key=lambda place: abs(place - start))
            moved[number] = place, place + size
        else:
            merged[(merged >= merged[start]) & (merged <= merged[stop - 1])] = merged[start]
    return moved, merged


def take_out(
    values: Array, documents: Array, spans: Sequence[Span], markers: Sequence[int]
) -> tuple[Array, Array, Array, Array]:
    """Return (what is left, its documents, what is taken out, its documents).

    Args:
        markers: The ids that stand in place of each span, and before it among what is taken out; none for no markers.
    """
    left, taken = [values[:0]], [values[:0]]
    left_of, taken_of = [documents[:0]], [documents[:0]]
    before = 0
    for number, (start, stop) in enumerate(spans):
        marker, marked = [values[:0]], [documents[:0]]
        if markers:
            marker, marked = [np.array([markers[number]], np.int64)], [documents[start : start + 1]]
        left += [values[before:start], *marker]
        left_of += [documents[before:start], *marked]
        taken += [*marker, values[start:stop]]
        taken_of += [*marked, documents[start:stop]]
        before = stop
    left, left_of = [*left, values[before:]], [*left_of, documents[before:]]
    return np.concatenate(left), np.concatenate(left_of), np.concatenate(taken), np.concatenate(taken_of)


def close(values: Array, documents: Array, end_of_text: int) -> tuple[Array, Array]:
    """Return a text with its end behind it."""
    return np.append(values, end_of_text), np.append(documents, documents[-1] if len(documents) else 0)


def encode_decode(
    inputs: Array, inputs_of: Array, targets: Array, targets_of: Array, lengths: tuple[int, int], ids: SpecialIds
) -> Example:
    """Return an example: ids and documents for the encoder; ids, documents and labels for the decoder.

    The decoder reads each document's labels one place later, the id that it starts with first.

    Args:
        lengths: Positions of the encoder and of the decoder.
    """
    seq_len, target_len = lengths
    start = ids.end_of_text if ids.decoder_start is None else ids.decoder_start
    shifted = np.concatenate([[start], targets[:-1]])[: len(targets)]
    shifted[1:][np.diff(targets_of) != 0] = start
    return {
        "ids": fill(inputs, seq_len, ids.end_of_text),
        "documents": fill(inputs_of, seq_len, PADDING, np.int32),
        "decoder_ids": fill(shifted, target_len, ids.end_of_text),
        "decoder_documents": fill(targets_of, target_len, PADDING, np.int32),
        "labels": fill(targets, target_len, IGNORED),
    }


def _divide(total: int, parts: int, draws: Draws) -> Array:
    """Return the sizes of `parts` parts of at least one, all ways equally likely."""
    edges = np.sort(draws.order(total - 1)[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], edges, [total]]))
