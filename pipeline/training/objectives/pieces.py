"""The documents of a row, and arrays that are filled up to a length."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from pipeline.training.objectives.objective import IGNORED, PADDING, Row, SpecialIds

if TYPE_CHECKING:
    from pipeline.training.objectives.objective import Array, Example


def num_tokens(row: Row) -> int:
    """Return how many tokens a row has; what is behind them is empty."""
    return int(np.count_nonzero(row.tokens != IGNORED))


def mark_gaps(tokens: Array, documents: Array) -> Array:
    """Return documents that are padding where there is no token."""
    return np.where(tokens == IGNORED, np.int32(PADDING), documents)


def find_pieces(row: Row) -> list[tuple[int, int]]:
    """Return where each document, or the piece of one, begins and ends in a row."""
    count = num_tokens(row)
    edges = np.flatnonzero(np.diff(row.documents[:count])) + 1
    return list(pairwise([0, *edges.tolist(), count])) if count else []


def longest_text(row: Row, end_of_text: int) -> Array:
    """Return the tokens of the longest piece of a document in a row, without the end of the text; the first of equals.

    An empty row has none.
    """
    texts = [row.tokens[start : stop - (row.tokens[stop - 1] == end_of_text)] for start, stop in find_pieces(row)]
    return max(texts, key=len, default=row.tokens[:0])


def fill(values: Sequence[int] | Array, length: int, padding: int, dtype: type = np.int64) -> Array:
    """Return values, no more than `length`, with padding behind them."""
    filled: Array = np.full(length, padding, dtype)
    filled[: len(values)] = values
    return filled


def pad_text(values: Array, labels: Array, documents: Array, length: int, ids: SpecialIds) -> Example:
    """Return ids, labels and documents, padded."""
    return {
        "ids": fill(values, length, ids.end_of_text),
        "labels": fill(labels, length, IGNORED),
        "documents": fill(documents, length, PADDING, np.int32),
    }
