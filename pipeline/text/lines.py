"""Text files as lines and paragraphs, by byte ranges: so that one huge file is work for many ranks.

A line or a paragraph belongs to the range in which it starts. Compressed files can only be read from their start and
are one range; offsets in them count decompressed bytes.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import ArtifactError
from pipeline.text.arrow import open_decompressed
from pipeline.text.sources import reading

COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UNIT_BYTES = 64 << 20  # a unit is a minute or so of work
MAX_DOCUMENT_BYTES = 1 << 30  # Arrow counts the tokens of a part in 31 bits
COMPRESSION = 4  # how many times smaller compressed text is, about


@dataclass(frozen=True)
class Span:
    """A piece of a raw file: bytes, row groups or rows [start, stop).

    Attributes:
        name: The file's relative name, from which ids are made.
        stop: Null means the end of the file.
        num_bytes: About how much text it is.
    """

    name: str
    path: Path
    start: int
    stop: int | None
    num_bytes: int

    @property
    def stem(self) -> str:
        """The file's name without directories and extensions."""
        return self.name.rsplit("/", 1)[-1].split(".", 1)[0]


def whole_file(name: str, path: Path) -> Span:
    """Return the span of a whole text file."""
    size = path.stat().st_size
    return Span(name, path, 0, None, size * COMPRESSION if path.suffix in COMPRESSED else size)


def byte_ranges(name: str, path: Path) -> list[Span]:
    """Return spans of at most `UNIT_BYTES` that cover a text file; one, if the file is compressed."""
    if path.suffix in COMPRESSED:
        return [whole_file(name, path)]
    size = path.stat().st_size
    starts = range(0, size, UNIT_BYTES)
    return [Span(name, path, start, min(start + UNIT_BYTES, size), min(UNIT_BYTES, size - start)) for start in starts]


def runs(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of runs of neighbours that are together at most `UNIT_BYTES`, or one by itself."""
    start, total = 0, 0
    for number, size in enumerate(sizes):
        if number > start and total + size > UNIT_BYTES:
            yield start, number
            start, total = number, 0
        total += size
    if sizes:
        yield start, len(sizes)


def read_lines(span: Span) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, line without its end) for every line that starts in `span`; blank lines are left out."""
    with open_raw(span.path) as stream:
        for offset, line in _lines_from(stream, span.start):
            if span.stop is not None and offset >= span.stop:
                return
            if line.strip():
                yield offset, line


def read_paragraphs(span: Span) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, paragraph) for every paragraph that starts in `span`; blank lines end paragraphs."""
    with open_raw(span.path) as stream:
        begun_before = not _follows_blank(stream, span.start)
        block: list[bytes] = []
        begin = 0
        for offset, line in _lines_from(stream, span.start):
            blank = not line.strip()
            if blank and block:
                yield begin, b"\n".join(block)
                block = []
            if not block and span.stop is not None and offset >= span.stop:
                return
            begun_before = begun_before and not blank
            if not blank and not begun_before:
                begin = begin if block else offset
                block.append(line)
        if block:
            yield begin, b"\n".join(block)


def read_whole(span: Span) -> Iterator[tuple[int, bytes]]:
    """Yield (0, the file's bytes without a byte order mark), cut off just above `MAX_DOCUMENT_BYTES`."""
    with open_raw(span.path) as stream:
        yield 0, stream.read(MAX_DOCUMENT_BYTES + 4).removeprefix(BYTE_ORDER_MARK)


def open_raw(path: Path) -> BinaryIO:
    """Open a file of bytes, decompressed.

    Raises:
        ArtifactError: If it cannot be opened; while reading, if it is compressed and damaged.
    """
    with reading(str(path)):
        if path.suffix in COMPRESSED:
            return io.BufferedReader(Decompressed(path), 1 << 20)
        return open(path, "rb", buffering=1 << 20)


class Decompressed(io.RawIOBase):
    """The decompressed bytes of a file.

    Raises:
        ArtifactError: While reading, if the file is damaged or cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.stream = path, open_decompressed(path)

    def readable(self) -> bool:
        """Return true."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill `buffer`; return how many bytes there were."""
        try:
            data = self.stream.read(len(buffer))
        except (OSError, ValueError, EOFError) as error:
            raise ArtifactError(f"{self.path}: damaged, cannot be decompressed ({error}); fetch it again") from None
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Close the file."""
        self.stream.close()
        super().close()


def _lines_from(stream: BinaryIO, start: int) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, line without its end) from the first line that starts at `start` or after it."""
    offset = start
    if start > 0:
        stream.seek(start - 1)
        offset += len(stream.readline()) - 1
    for line in stream:
        begin = offset
        offset += len(line)
        if begin == 0:
            line = line.removeprefix(BYTE_ORDER_MARK)
        yield begin, line.rstrip(b"\r\n")


def _follows_blank(stream: BinaryIO, start: int) -> bool:
    """Return whether the first line at or after `start` comes after a blank line or begins the file."""
    if start == 0:
        return True
    stream.seek(start - 1)
    first = start + len(stream.readline()) - 1
    window = 4096
    while True:
        begin = max(0, first - window)
        stream.seek(begin)
        _, newline, last = stream.read(first - begin).removesuffix(b"\n").rpartition(b"\n")
        if newline or begin == 0:
            return not last.strip()
        window *= 2
