"""How the documents of a token stream become rows of `seq_len` tokens.

A row is a list of pieces `(start, stop)`: tokens [start, stop) of the stream are labels of the row, one piece after
another, and each label's input is the token before it in the stream. So a document is read as the end-of-text id of the
one before it and all its tokens but the last, and every token of the stream is a label of one row.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

from pydantic import Field

from pipeline.settings import Choice, Settings

if TYPE_CHECKING:
    from pipeline.text.stream import TokenStream

Piece = tuple[int, int]

MAX_WINDOWS = 1024  # packed windows that are remembered, each some tens of kilobytes


class Packer(Protocol):
    """The rows of one stream.

    Attributes:
        num_rows: How many there are.
    """

    num_rows: int

    def row(self, number: int) -> list[Piece]:
        """Return the pieces of a row: no more than `seq_len` tokens together."""

    def rows_of(self, start: int, stop: int) -> list[int]:
        """Return which rows have tokens of [start, stop), a document's place in the stream, in their order."""


class Contiguous(Choice):
    """The stream is cut every `seq_len` tokens; what is left at its end, less than a row, is not used."""

    kind: Literal["contiguous"] = "contiguous"

    def pack(self, stream: "TokenStream", seq_len: int) -> Packer:
        """Return the rows of a stream."""
        return ContiguousRows(stream.num_tokens // seq_len, seq_len)


class BestFit(Choice):
    """Documents stay whole where they fit into a row (Ding et al. 2024, arXiv:2404.10830).

    The documents of a record batch (a megabyte of text or more) are packed by best-fit decreasing into as few rows as
    can hold their tokens; those longer than a row are cut every `seq_len` tokens, and only the few that then fit
    nowhere are cut into the gaps. So nothing is lost, and the gaps that stay are less than one row a batch.
    """

    kind: Literal["best_fit"] = "best_fit"

    def pack(self, stream: "TokenStream", seq_len: int) -> Packer:
        """Return the rows of a stream; reads where the batches of its parts lie."""
        return WindowRows(stream, seq_len, whole_rows=False)


class Padded(Choice):
    """Every document begins a row of its own; one longer than `seq_len` has several."""

    kind: Literal["padded"] = "padded"

    def pack(self, stream: "TokenStream", seq_len: int) -> Packer:
        """Return the rows of a stream; reads the lengths of its documents."""
        return WindowRows(stream, seq_len, whole_rows=True)


AnyPacking = Annotated[Contiguous | BestFit | Padded, Field(discriminator="kind")]


class WarmUp(Settings):
    """A stretch of training with shorter sequences: every row is cut into several.

    Attributes:
        tokens: Training tokens at which it ends.
        seq_len: Tokens of a sequence until then.
    """

    tokens: int = Field(ge=1)
    seq_len: int = Field(ge=1)


def check_warmup(warmup: Sequence[WarmUp], seq_len: int) -> Iterator[tuple[str, str]]:
    """Yield (setting, problem) for stretches that are out of order, or whose length does not divide `seq_len`."""
    before = 0
    for number, part in enumerate(warmup):
        where = f"seq_len_warmup.{number}"
        if seq_len % part.seq_len:
            yield f"{where}.seq_len", f"rows of {seq_len} tokens do not divide into sequences of {part.seq_len}"
        if part.tokens <= before:
            yield f"{where}.tokens", f"wanted more than the {before:,} before it, found {part.tokens:,}"
        before = part.tokens


class ContiguousRows:
    """Rows that lie one behind another in the stream."""

    def __init__(self, num_rows: int, seq_len: int) -> None:
        self.num_rows, self.seq_len = num_rows, seq_len

    def row(self, number: int) -> list[Piece]:
        """Return the one piece of a row."""
        return [(number * self.seq_len, (number + 1) * self.seq_len)]

    def rows_of(self, start: int, stop: int) -> list[int]:
        """Return which rows have tokens of [start, stop)."""
        return list(range(start // self.seq_len, min(-(-stop // self.seq_len), self.num_rows)))


class WindowRows:
    """Rows of each record batch by itself, packed when one of them is asked for."""

    def __init__(self, stream: "TokenStream", seq_len: int, whole_rows: bool) -> None:
        import numpy as np

        self.stream, self.seq_len, self.whole_rows = stream, seq_len, whole_rows
        counts = [self._count(window) for window in range(len(stream.window_starts) - 1)]
        self.first_rows = np.array([0, *np.cumsum(counts, dtype=np.int64)])
        self.num_rows = int(self.first_rows[-1])
        self._packed: OrderedDict[int, list[list[Piece]]] = OrderedDict()

    def row(self, number: int) -> list[Piece]:
        """Return the pieces of a row."""
        window = int(self.first_rows.searchsorted(number, side="right")) - 1
        return self._window(window)[number - int(self.first_rows[window])]

    def rows_of(self, start: int, stop: int) -> list[int]:
        """Return which rows have tokens of [start, stop), which lie in one window."""
        window = self.stream.window_of(start)
        rows = self._window(window)
        first = int(self.first_rows[window])
        return [first + n for n, row in enumerate(rows) if any(a < stop and start < b for a, b in row)]

    def _count(self, window: int) -> int:
        if self.whole_rows:
            bounds = self.stream.bounds(window)
            return int((-(-(bounds[1:] - bounds[:-1]) // self.seq_len)).sum())
        start, stop = map(int, self.stream.window_starts[window : window + 2])
        return -(-(stop - start) // self.seq_len)

    def _window(self, window: int) -> list[list[Piece]]:
        packed = self._packed.get(window)
        if packed is None:
            bounds = self.stream.bounds(window).tolist()
            packed = pad(bounds, self.seq_len) if self.whole_rows else best_fit(bounds, self.seq_len)
            self._packed[window] = packed
            if len(self._packed) > MAX_WINDOWS:
                self._packed.popitem(last=False)
        return packed


def pad(bounds: Sequence[int], seq_len: int) -> list[list[Piece]]:
    """Return rows of one piece each; document i is [bounds[i], bounds[i + 1])."""
    return [
        [(start, min(start + seq_len, stop))]
        for begin, stop in pairwise(bounds)
        for start in range(begin, stop, seq_len)
    ]


def best_fit(bounds: Sequence[int], seq_len: int) -> list[list[Piece]]:
    """Pack documents into ceil(tokens / seq_len) rows; document i is [bounds[i], bounds[i + 1]).

    Best-fit decreasing: each piece, the longest first, goes where the least room is left that holds it. What no row
    holds whole is cut into the largest gaps.
    """
    cut = pad(bounds, seq_len)
    rows = [row for row in cut if row[0][1] - row[0][0] == seq_len]
    pieces = sorted((row[0] for row in cut if row[0][1] - row[0][0] < seq_len), key=lambda p: (p[0] - p[1], p[0]))
    num_open = -(-(bounds[-1] - bounds[0]) // seq_len) - len(rows)
    opened: list[list[Piece]] = [[] for _ in range(num_open)]
    room = [(seq_len, number) for number in range(num_open)]  # (tokens that still fit, which row), sorted
    homeless = []
    for start, stop in pieces:
        place = bisect_left(room, (stop - start, -1))
        if place == len(room):
            homeless.append((start, stop))
            continue
        left, number = room.pop(place)
        opened[number].append((start, stop))
        insort(room, (left - (stop - start), number))
    for start, stop in homeless:
        while start < stop:
            left, number = room.pop()
            end = min(stop, start + left)
            opened[number].append((start, end))
            insort(room, (left - (end - start), number))
            start = end
    return rows + opened
