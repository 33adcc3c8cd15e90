"""How a tokenizer fares on a corpus: counts of every token, of sources and languages, and a sample read back."""

import base64
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from pipeline.text.arrow import TextBatch

Counts = npt.NDArray[np.int64]
Groups = dict[str, list[int]]  # name → documents, bytes, tokens
OTHER = "(other)"
MAX_NAMES = 1000  # sources and languages that a tally tells apart
SHOWN_NAMES, SHOWN_TOKENS = 50, 20
SAMPLE_TOKENS = 1024  # of a sampled document, from its start: what is read back
COUNTED_AT_ONCE = 1 << 17  # tokens: with fewer, adding up the counts costs more than counting; more leave the cache
LANGUAGE_KEYS = ("lang", "language")


class Tally:
    """Counts over documents and their tokens, exact but for the sample; tallies of two parts can be added up.

    Attributes:
        counts: How often each id occurs; int64 [vocabulary].
        sources: Documents, bytes and tokens by source: of the first `MAX_NAMES`, the others are counted as one.
        languages: The same by language, of the documents whose meta has one.
        sampled: Documents, tokens and whitespace-separated words of the sample, and how many came back exactly.
    """

    def __init__(self, vocab_size: int) -> None:
        self.counts: Counts = np.zeros(vocab_size, np.int64)
        self.sources: Groups = {}
        self.languages: Groups = {}
        self.sampled = {"documents": 0, "exact": 0, "tokens": 0, "words": 0}

    def add(self, batch: TextBatch, values: npt.NDArray[Any], lengths: Counts) -> None:
        """Count documents: `values` are all their tokens, `lengths` how many each has.

        Raises:
            IndexError: If an id is not in the vocabulary.
        """
        for begin in range(0, len(values), COUNTED_AT_ONCE):
            found = np.bincount(values[begin : begin + COUNTED_AT_ONCE], minlength=len(self.counts))
            if len(found) > len(self.counts):
                raise IndexError(f"id {len(found) - 1} is not in a vocabulary of {len(self.counts)}")
            self.counts += found
        names, numbers = batch.distinct("source")
        _add_groups(self.sources, names, numbers, batch.texts.sizes, lengths)
        metas, numbers = batch.distinct("meta")
        _add_groups(self.languages, [_language(meta) for meta in metas], numbers, batch.texts.sizes, lengths)

    def sample(self, text: str, ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> None:
        """Count the words of a document, and read back its first `SAMPLE_TOKENS`; `ids` are without the end of text."""
        read = decode(ids[:SAMPLE_TOKENS])
        whole = len(ids) <= SAMPLE_TOKENS
        # where it was cut, the last character may be half
        exact = read == text if whole else text.startswith(read.rstrip("\N{REPLACEMENT CHARACTER}"))
        self.sampled["documents"] += 1
        self.sampled["exact"] += exact
        self.sampled["tokens"] += len(ids)
        self.sampled["words"] += len(text.split())

    def merge(self, other: Self) -> None:
        """Add what another tally counted."""
        self.counts += other.counts
        for mine, theirs in ((self.sources, other.sources), (self.languages, other.languages)):
            for name, numbers in theirs.items():
                _add(mine, name, numbers)
        for name, number in other.sampled.items():
            self.sampled[name] += number

    def plain(self) -> dict[str, Any]:
        """Return what `from_plain` reads: JSON, the counts packed into a string."""
        packed = base64.b64encode(zlib.compress(self.counts.astype("<i8").tobytes(), 1)).decode()
        return {"counts": packed, "sources": self.sources, "languages": self.languages, "sampled": self.sampled}

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Self:
        """Return the tally that `plain` was called on."""
        tally = cls(0)
        tally.counts = np.frombuffer(zlib.decompress(base64.b64decode(data["counts"])), "<i8").astype(np.int64)
        tally.sources, tally.languages, tally.sampled = data["sources"], data["languages"], data["sampled"]
        return tally


def headline(tally: Tally, special: Sequence[int]) -> dict[str, float]:
    """Return the numbers that sum a tally up; `special` are the ids that no text is encoded to.

    `fertility` is tokens per whitespace-separated word, and is of the sample, as is `round_trip_fraction`.
    """
    sampled = tally.sampled
    usable = len(tally.counts) - len(special)
    return {
        "fertility": sampled["tokens"] / max(1, sampled["words"]),
        "unused_fraction": len(_unused(tally, special)) / max(1, usable),
        "round_trip_documents": sampled["documents"],
        "round_trip_fraction": sampled["exact"] / max(1, sampled["documents"]),
    }


def describe(tally: Tally, special: Sequence[int], decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    """Return the whole report on a tokenizer, as JSON holds it."""
    texts = [decode([number]) for number in range(len(tally.counts))]
    ordinary = sorted(set(range(len(texts))) - set(special), key=lambda number: (-len(texts[number]), number))
    longest = [_token(tally, texts, number) for number in ordinary[:SHOWN_TOKENS]]
    unused = sorted(_unused(tally, special), key=lambda number: (-len(texts[number]), number))
    return {
        "vocab_size": len(texts),
        **headline(tally, special),
        "sampled": tally.sampled,
        "sources": _largest(tally.sources),
        "languages": _largest(tally.languages),
        "longest": longest,
        "unused": {"tokens": len(unused), "longest": [texts[number] for number in unused[:SHOWN_TOKENS]]},
        "counts": tally.counts.tolist(),
    }


def _token(tally: Tally, texts: Sequence[str], number: int) -> dict[str, Any]:
    return {"id": number, "text": texts[number], "count": int(tally.counts[number])}


def _unused(tally: Tally, special: Sequence[int]) -> list[int]:
    """Return the ids that no text of the corpus was encoded to, but for those that no text ever is."""
    return sorted(set(np.flatnonzero(tally.counts == 0).tolist()) - set(special))


def _largest(groups: Groups) -> list[dict[str, Any]]:
    """Return the groups with the most bytes, the largest first, and what the others are together."""
    named = sorted((name for name in groups if name != OTHER), key=lambda name: (-groups[name][1], name))
    kept = {name: groups[name] for name in named[:SHOWN_NAMES]}
    for name in [*named[SHOWN_NAMES:], *(name for name in groups if name == OTHER)]:
        _add(kept, OTHER, groups[name])
    return [
        {"name": name, "documents": documents, "bytes": num_bytes, "tokens": tokens}
        for name, (documents, num_bytes, tokens) in kept.items()
    ]


def _add_groups(
    groups: Groups, names: Sequence[str | None], numbers: Counts, num_bytes: Counts, lengths: Counts
) -> None:
    """Add documents to the group of each: `names[numbers[document]]`; a document of no name is in none."""
    documents = np.bincount(numbers, minlength=len(names))
    # sums of whole numbers below 2^53, so exact
    sizes = np.bincount(numbers, num_bytes, len(names)).astype(np.int64)
    tokens = np.bincount(numbers, lengths, len(names)).astype(np.int64)
    for name, *counted in zip(names, documents.tolist(), sizes.tolist(), tokens.tolist(), strict=True):
        if name is not None:
            _add(groups, name, counted)


def _add(groups: Groups, name: str, counted: Sequence[int]) -> None:
    known = name if name in groups or len(groups) < MAX_NAMES else OTHER
    groups[known] = [a + b for a, b in zip(groups.get(known, (0, 0, 0)), counted, strict=True)]


@lru_cache(maxsize=4096)
def _language(meta: str) -> str | None:
    """Return the language that a document's meta names."""
    if '"lang' not in meta:
        return None
    fields = json.loads(meta)
    return next((fields[key] for key in LANGUAGE_KEYS if isinstance(fields.get(key), str)), None)
