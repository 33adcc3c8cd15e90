"""Engines that encode text: gigatoken where it gives the plain library's ids, else the plain library.

The only door to gigatoken. Its ids were compared with those of `tokenizers` on every character of Unicode; what they
disagree on (`characters`) is left to the plain library, and `choose_engine` compares them again before every use.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.text.characters import disputed
from pipeline.text.flat import Texts
from pipeline.text.hostile import HOSTILE
from pipeline.text.tokenizers import Tokenizer

# Text after which gigatoken begins anew: its cache of pre-tokens grows with the text, by about a sixth of its bytes
# for text and by five times for random words; a fresh one needs about 64 MB of text to be fast again.
REFRESH_BYTES = 256 << 20

Encoded = tuple[npt.NDArray[Any], npt.NDArray[np.int64]]


class Engine(Protocol):
    """Encodes texts.

    Attributes:
        name: The library.
        why: Why it is not the fast one; null for that.
    """

    name: str
    why: str | None

    def encode(self, texts: Texts, end: int | None = None) -> Encoded:
        """Return (the ids of all texts one after another, of the tokenizer's dtype; how many each text has).

        Args:
            end: An id to put after each text, counted with it.
        """


class Plain:
    """`tokenizers` itself."""

    name = "tokenizers"

    def __init__(self, tokenizer: Tokenizer, why: str) -> None:
        self.why: str | None = why
        self._tokenizer = tokenizer

    def encode(self, texts: Texts, end: int | None = None) -> Encoded:
        """See `Engine.encode`."""
        return self._tokenizer.encode_batch([text.tobytes().decode() for text in texts], end)


class Gigatoken:
    """gigatoken, on the calling thread and in bounded memory.

    Raises:
        Exception: Of gigatoken, if it does not support the tokenizer.
    """

    name = "gigatoken"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.why: str | None = None
        self._tokenizer = tokenizer
        data = tokenizer.data
        if any(token[how] for token in data["added_tokens"] for how in ("lstrip", "rstrip", "single_word")):
            raise ValueError("its added tokens take what is around them into account")
        # it would find special tokens in a text, which are ordinary text to us
        data["added_tokens"] = [token for token in data["added_tokens"] if not token["special"]]
        data["truncation"] = data["padding"] = data["post_processor"] = None
        self._json = json.dumps(data)
        self._begin()

    def encode(self, texts: Texts, end: int | None = None) -> Encoded:
        """See `Engine.encode`."""
        pieces, begin = [], 0
        for number in disputed(texts):
            plain = self._tokenizer.encode_batch([texts.text(number)], end)
            pieces += [self._encode(texts.part(begin, number), end), plain]
            begin = number + 1
        last = self._encode(texts.part(begin, len(texts)) if begin else texts, end)
        if not pieces:
            return last
        values, lengths = zip(*pieces, last, strict=True)
        return np.concatenate(values), np.concatenate(lengths)

    def _encode(self, texts: Texts, end: int | None) -> Encoded:
        if self._held_bytes > REFRESH_BYTES:
            self._begin()
        self._held_bytes += len(texts.data)
        layout = self._inner.encode_batch(_as_awkward(texts), parallel=False).layout
        stops = np.asarray(layout.offsets.data)
        values = np.asarray(layout.content.data)[stops[0] : stops[-1]]
        return _with_end(values, stops - stops[0], end, self._tokenizer.dtype)

    def _begin(self) -> None:
        from gigatoken import Tokenizer as Inner

        self._inner = Inner.from_json(self._json)
        self._held_bytes = 0


def choose_engine(tokenizer: Tokenizer, sample: Sequence[str]) -> Engine:
    """Return gigatoken if it gives exactly the plain library's ids on `sample` and on hostile texts, else that.

    Takes as long as the plain library takes for the sample: about a second for each 3 MB.
    """
    texts = [*hostile(tokenizer), *sample]
    wanted = tokenizer.encode_batch(texts)
    try:
        engine = Gigatoken(tokenizer)
        found = engine.encode(Texts.of(texts))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # what Rust calls a panic is no Exception
        return Plain(tokenizer, f"gigatoken does not support this tokenizer ({_first_line(error)})")
    if np.array_equal(found[0], wanted[0]) and np.array_equal(found[1], wanted[1]):
        return engine
    return Plain(tokenizer, f"gigatoken gives other ids for {_difference(texts, wanted, found)}")


def hostile(tokenizer: Tokenizer) -> list[str]:
    """Return texts on which engines are likely to disagree: each kind that is known to have parted two libraries."""
    tokens = [*tokenizer.special_tokens, *tokenizer.added_tokens][:256]
    own = [form.format(token) for token in tokens for form in ("{0}", " {0} ", "a{0}b", "{0}{0}", "x {0}\n{0} y")]
    cut = [half for token in tokens for half in (token[:-1], token[1:])]
    return [*HOSTILE, *own, *cut]


def is_word(text: bytes) -> bool:
    """Return whether `train_merges` takes a text as one word."""
    from gigatoken import pretokenizer

    return list(pretokenizer(text)) == [text]


def train_merges(path: Path, separator: bytes, num_merges: int) -> list[tuple[bytes, bytes]]:
    """Return the first merges of byte-level BPE with GPT-2's pre-tokenizer: fewer if nothing is left to merge.

    Ties are broken as `tokenizers` does. Text is streamed from the disk; memory holds the counts of its words.

    Args:
        path: A file of documents.
        separator: What ends every document, and is in none.
    """
    from gigatoken import TextFileSource, train_bpe

    with _silent():
        return list(train_bpe(TextFileSource([path], separator=separator), 256 + num_merges, [])[1])


def _as_awkward(texts: Texts) -> Any:
    """Return the array of texts that gigatoken reads in place."""
    from awkward import Array
    from awkward.contents import ListOffsetArray, NumpyArray
    from awkward.index import Index64

    raw = NumpyArray(texts.data, parameters={"__array__": "byte"})
    return Array(ListOffsetArray(Index64(texts.starts), raw, parameters={"__array__": "bytestring"}))


def _with_end(
    values: npt.NDArray[Any], stops: npt.NDArray[np.int64], end: int | None, dtype: str
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """Return the ids as `dtype`, with `end` after every text, and how many each text has then.

    Args:
        stops: Where the first text begins, and where each ends.
    """
    lengths = np.diff(stops)
    if end is None:
        return values.astype(dtype), lengths
    out = np.empty(len(values) + len(lengths), dtype)
    ends = stops[1:] + np.arange(len(lengths))
    ordinary = np.ones(len(out), np.bool_)
    ordinary[ends] = False
    out[ordinary] = values
    out[ends] = end
    return out, lengths + 1


def _difference(texts: Sequence[str], wanted: Encoded, found: Encoded) -> str:
    """Return the first text that two engines encode differently, as a message shows it."""
    theirs = [np.split(values, np.cumsum(lengths)[:-1]) for values, lengths in (wanted, found)]
    for text, one, other in zip(texts, *theirs, strict=True):
        if not np.array_equal(one, other):
            shown = repr(text)
            return shown if len(shown) <= 60 else shown[:57] + "..."
    return "some text"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def _silent() -> Iterator[None]:
    """Send to nowhere what a library that is not Python's prints."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [(number, os.dup(number)) for number in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number, _ in kept:
            os.dup2(nowhere, number)
        yield
    finally:
        for number, copy in kept:
            os.dup2(copy, number)
            os.close(copy)
        os.close(nowhere)
