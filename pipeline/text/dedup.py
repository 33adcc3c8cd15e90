"""Exact duplicates, found by 128-bit hashes, which take 16 bytes a text, and about 50 while they are sorted."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from pipeline.text.arrow import read_ids

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Digests = npt.NDArray[np.uint64]
    Positions = npt.NDArray[np.int64]


def digest(texts: Iterable[str]) -> Digests:
    """Return the xxh3_128 of each text in UTF-8, [texts, 2]."""
    import numpy as np

    raw = b"".join(xxhash.xxh3_128_digest(text.encode()) for text in texts)
    return np.frombuffer(raw, np.uint64).reshape(-1, 2)


def find_duplicates(digests: Digests) -> tuple[Positions, Positions]:
    """Return (positions of all repeats, ascending; for each the position of the first text that it repeats)."""
    import numpy as np

    order = np.lexsort((digests[:, 0], digests[:, 1]))  # stable: equal texts stay in their order
    ordered = digests[order]
    repeats = np.zeros(len(order), dtype=np.bool_)
    repeats[1:] = (ordered[1:] == ordered[:-1]).all(axis=1)
    first = order[~repeats][np.cumsum(~repeats)[repeats] - 1]
    repeated = order[repeats]
    by_position = np.argsort(repeated)
    return repeated[by_position], first[by_position]


def ids_at(parts: Iterable[Path], places: set[int]) -> dict[int, str]:
    """Return the ids of the documents at some places of a corpus, counted through all its parts."""
    ids = itertools.chain.from_iterable(map(read_ids, parts))
    return {place: identity for place, identity in enumerate(ids) if place in places} if places else {}
