"""A tokens artifact as one long row of tokens, read in place from its memory-mapped parts."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.artifact import Artifact
from pipeline.errors import ArtifactError
from pipeline.text.corpus import HELD
from pipeline.text.token_parts import TokenPart, open_tokens

Tokens = npt.NDArray[np.int64]

MAX_OPEN_PARTS = 4096  # memory maps at one time; Linux allows a process 65,530 (vm.max_map_count)


@dataclass(frozen=True)
class Span:
    """Some tokens of a document.

    Attributes:
        part: Name of the file that it is in.
        id: The document's id.
        source: Where the document is from, as the corpus says.
        begin: First token within the document.
        end: Token after the last one.
    """

    part: str
    id: str
    source: str
    begin: int
    end: int


def open_stream(tokens: Artifact, prefix: str = "part-", *, prove: bool = True) -> "TokenStream":
    """Return the documents of a tokens artifact to train on, or with "held-" those that are held out.

    Args:
        prove: Whether to read at once what was written since it was last proven, or each part when it is first read.

    Raises:
        ArtifactError: If a file of them is not what the manifest says, or an id is outside the vocabulary.
    """
    stats, names = tokens.stats, tokens.parts(prefix)
    _check_numbers(tokens, names)
    if stats["max_token_id"] >= stats["vocab_size"]:
        raise ArtifactError(
            f"{tokens.place}: has the id {stats['max_token_id']}, but its vocabulary has {stats['vocab_size']}; "
            "tokenize again"
        )
    if prove:
        tokens.prove(names)
    held = prefix == HELD
    documents, num_bytes = (
        stats[f"held_out.{what}"] if held else stats[what] - stats[f"held_out.{what}"]
        for what in ("documents", "bytes")
    )
    return TokenStream(
        names,
        [stats["part_tokens"][name] for name in names],
        end_of_text=stats["end_of_text_id"],
        vocab_size=stats["vocab_size"],
        num_documents=documents,
        num_bytes=num_bytes,
        find_part=tokens.proven_file,
    )


def _check_numbers(tokens: Artifact, names: Sequence[str]) -> None:
    """Refuse a manifest whose numbers cannot be. Raises ArtifactError."""
    stats = tokens.stats
    wanted = (
        "documents",
        "bytes",
        "held_out.documents",
        "held_out.bytes",
        "end_of_text_id",
        "vocab_size",
        "max_token_id",
    )
    numbers: dict[str, object] = {name: stats.get(name) for name in wanted}
    parts = stats.get("part_tokens")
    numbers |= {f"part_tokens.{name}": parts.get(name) if isinstance(parts, dict) else None for name in names}
    bad = [name for name, number in numbers.items() if not isinstance(number, int) or not 0 <= number < 2**62]
    if not bad and not stats["end_of_text_id"] < stats["vocab_size"] <= 2**32:
        bad = ["end_of_text_id", "vocab_size"]
    if bad:
        raise ArtifactError(f"{tokens.place}: its manifest has no sensible {', '.join(bad)}; tokenize again")


class _Places:
    """Where the record batches of some parts lie in memory.

    All parts are seen as one array, from the first mapped file to the last: what lies between two files is never read.
    So numpy copies rows of any parts in one call.

    Attributes:
        parts: By their number, in order.
        starts, stops: First token of each batch within the stream, and the one after its last.
        moves: What to add to a token's place in the stream to get its place in the array.
    """

    def __init__(self, parts: dict[int, TokenPart], begins: Sequence[int]) -> None:
        """Look the batches of parts up; `begins` has the first token of every part."""
        self.parts = parts
        self._lowest = min((part.flat for part in parts.values()), key=_address, default=np.zeros(0, np.uint16))
        size, first = self._lowest.itemsize, _address(self._lowest)
        ends = [(_address(part.flat) - first) // size + len(part.flat) for part in parts.values()]
        self._size, self._windows = max(ends, default=0), dict[int, npt.NDArray[Any]]()
        empty = [np.zeros(0, np.int64)]
        self.starts, self.stops, self.moves = (
            np.concatenate([*arrays, *empty])
            for arrays in (
                [part.starts[:-1] + begins[number] for number, part in parts.items()],
                [part.starts[1:] + begins[number] for number, part in parts.items()],
                [
                    part.places - part.starts[:-1] - begins[number] + (_address(part.flat) - first) // size
                    for number, part in parts.items()
                ],
            )
        )

    def copy(self, firsts: Tokens, length: int) -> npt.NDArray[Any]:
        """Return tokens [first, first + length) of the array for each [firsts, length]; all must be of one batch."""
        if length not in self._windows:
            shape, step = (self._size - length + 1, length), self._lowest.itemsize
            windows = np.lib.stride_tricks.as_strided(self._lowest, shape, (step, step), writeable=False)
            self._windows[length] = windows
        rows: npt.NDArray[Any] = self._windows[length][firsts]
        return rows


def _address(array: npt.NDArray[Any]) -> int:
    return int(array.ctypes.data)


class TokenStream:
    """The parts of one tokens artifact, one behind another; each is opened when it is first read.

    Attributes:
        num_tokens: Length of the stream; every document ends with its end-of-text id.
        end_of_text: That id; it also stands before the first token.
        dtype: Of the ids as they are stored, uint16 or uint32.
        vocab_size: Every id is smaller.
        num_documents: How many documents there are.
        num_bytes: UTF-8 bytes of their texts.

    Args:
        sizes: How many tokens each part has.
        find_part: Gives the path of a part by its name, when it is first read.
    """

    def __init__(
        self,
        names: Sequence[str],
        sizes: Sequence[int],
        end_of_text: int,
        vocab_size: int,
        num_documents: int = 0,
        num_bytes: int = 0,
        find_part: Callable[[str], Path] = Path,
    ) -> None:
        self.names, self.end_of_text, self.vocab_size = list(names), end_of_text, vocab_size
        self._find_part = find_part
        self.num_documents, self.num_bytes = num_documents, num_bytes
        self._begins: Tokens = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self.begins = self._begins.tolist()
        self.num_tokens = int(self.begins[-1])
        self.dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
        self._parts: dict[int, TokenPart] = {}
        self._known = _Places({}, self.begins)

    def read(self, start: int, length: int) -> Tokens:
        """Return tokens [start, start + length) of the stream; the one before the first is the end of a text.

        Raises:
            ArtifactError: If one of the ids is outside the vocabulary, or a part is damaged.
        """
        out = np.empty(length, dtype=np.int64)
        filled = 0
        if start < 0:
            out[0], filled = self.end_of_text, 1
        while filled < length:
            number = self.part_of(start + filled)
            begin, end = self.begins[number], self.begins[number + 1]
            stop = min(start + length, end)
            ids = self._part(number).tokens(start + filled - begin, stop - begin)
            out[filled : stop - start] = self._checked(number, ids)
            filled = stop - start
        return out

    def gather(self, starts: Tokens, length: int) -> npt.NDArray[Any]:
        """Return tokens [start, start + length) for each of the starts, as they are stored; [starts, length].

        Raises:
            ArtifactError: If one of the ids is outside the vocabulary, or a part is damaged.
        """
        numbers = self._begins.searchsorted(starts, side="right") - 1
        places = self._known
        if len(places.parts) < len(self.names):
            places = self._places(set(numbers.clip(0).tolist()))
        batches = places.starts.searchsorted(starts, side="right") - 1
        firsts = starts + places.moves[batches]
        inside = (starts >= 0) & (starts + length <= places.stops[batches])
        if inside.all():
            ids = places.copy(firsts, length)
        else:
            ids = np.empty((len(starts), length), self.dtype)
            ids[inside] = places.copy(firsts[inside], length)
            for row in (~inside).nonzero()[0].tolist():  # goes on in another batch or part
                ids[row] = self.read(int(starts[row]), length)
        if len(ids) and ids.max() >= self.vocab_size:
            for number, tokens in zip(numbers.tolist(), ids, strict=True):
                self._checked(max(number, 0), tokens)
        return ids

    def _places(self, needed: set[int]) -> _Places:
        """Return where the batches lie of some parts, and of others that are known already."""
        places = self._known
        if not places.parts.keys() >= needed:
            parts = {number: self._part(number) for number in needed}
            if len(places.parts) + len(parts) <= MAX_OPEN_PARTS:
                parts = {**places.parts, **parts}
            places = self._known = _Places({number: parts[number] for number in sorted(parts)}, self.begins)
        return places

    def part_of(self, token: int) -> int:
        """Return the number of the part that a token lies in."""
        return bisect_right(self.begins, token) - 1

    def spans(self, start: int, stop: int) -> list[Span]:
        """Return the documents that tokens [start, stop) belong to."""
        spans = []
        while start < stop:
            number = self.part_of(start)
            part, begin = self._part(number), self.begins[number]
            batch = int(np.searchsorted(part.starts, start - begin, side="right")) - 1
            offsets = part.offsets(batch) + begin
            ids, sources, _, _ = part.rows(batch)
            row = int(np.searchsorted(offsets, start, side="right")) - 1
            while start < stop and row < len(ids):
                first, end = int(offsets[row]), min(stop, int(offsets[row + 1]))
                if end > start:
                    spans.append(Span(self.names[number], ids[row], sources[row], start - first, end - first))
                start, row = max(start, end), row + 1
        return spans

    def documents(self) -> Iterator[tuple[int, int]]:
        """Yield where each document lies in the stream, its end-of-text id included."""
        for window in range(len(self.window_starts) - 1):
            yield from pairwise(self.bounds(window).tolist())

    def find(self, document: str) -> list[tuple[int, int]]:
        """Return where the documents of this id lie in the stream; reads the ids of all."""
        found = []
        for number in range(len(self.names)):
            part = self._part(number)
            for batch in range(part.num_batches):
                offsets = part.offsets(batch)
                for row, identity in enumerate(part.rows(batch)[0]):
                    if identity == document:
                        begin = self.begins[number]
                        found.append((begin + int(offsets[row]), begin + int(offsets[row + 1])))
        return found

    # Windows: the record batches of all parts, which packing looks at one by one.

    @cached_property
    def window_starts(self) -> Tokens:
        """First token of every window, and the end of the stream; opens every part."""
        starts = [self._part(number).starts[:-1] + self.begins[number] for number in range(len(self.names))]
        return np.concatenate([*starts, [self.num_tokens]]).astype(np.int64)

    def bounds(self, window: int) -> Tokens:
        """Return where each document of a window begins, and where the last one ends."""
        start = int(self.window_starts[window])
        number = self.part_of(start)
        part, begin = self._part(number), self.begins[number]
        bounds: Tokens = part.offsets(int(np.searchsorted(part.starts, start - begin, side="right")) - 1) + begin
        return bounds

    def window_of(self, token: int) -> int:
        """Return the window that a token lies in."""
        return int(np.searchsorted(self.window_starts, token, side="right")) - 1

    def _checked(self, number: int, ids: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return ids of a part. Raises ArtifactError if one is outside the vocabulary."""
        largest = int(ids.max(initial=0))
        if largest >= self.vocab_size:
            raise ArtifactError(
                f"{self._part(number).path}: has the id {largest}, but the vocabulary has {self.vocab_size}; tokenize "
                "again"
            )
        return ids

    def _part(self, number: int) -> TokenPart:
        part = self._parts.pop(number, None)
        if part is None:
            part = open_tokens(self._find_part(self.names[number]))
            if part.num_tokens != self.begins[number + 1] - self.begins[number]:
                raise ArtifactError(
                    f"{part.path}: the manifest says {self.begins[number + 1] - self.begins[number]} tokens, found "
                    f"{part.num_tokens}; tokenize again"
                )
            if part.flat.dtype != self.dtype:
                raise ArtifactError(
                    f"{part.path}: wanted ids of {self.dtype} for a vocabulary of {self.vocab_size}, found "
                    f"{part.flat.dtype}; tokenize again"
                )
            if len(self._parts) >= MAX_OPEN_PARTS:
                self._parts.pop(next(iter(self._parts)), None)
        self._parts[number] = part  # last: the one used most recently
        return part
