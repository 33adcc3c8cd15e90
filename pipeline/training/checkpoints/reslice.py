"""Takes ranges of tensors out of a checkpoint, however the ranks shared them that wrote it."""

import math
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from pipeline.training.checkpoints.format import DTYPES, Index, file_name, key, read_header

TORCH_DTYPES = {theirs: getattr(torch, name) for name, theirs in DTYPES.items()}
Part = tuple[int, int]  # which slice of how many equal ones
WHOLE = (0, 1)
Box = tuple[int, int, int, int]  # first row, the row after the last, first column, the column after the last


@dataclass(frozen=True)
class Lying:
    """A range of a slice of a tensor that is seen as a table, with a row for all dimensions before the sliced one.

    Attributes:
        start: Its first element in the slice, row by row; `stop` is after its last.
        width: Columns of the slice.
        left: Which column of the whole is the first of the slice.
    """

    start: int
    stop: int
    width: int
    left: int

    @classmethod
    def of(cls, shape: Sequence[int], dim: int, part: Part, bounds: tuple[int, int]) -> "Lying":
        """Return where a range lies, in a tensor that is seen as a table before dimension `dim`."""
        number, parts = part
        width = math.prod(shape[dim:]) // parts
        return cls(*bounds, width, number * width)

    def boxes(self) -> Iterator[Box]:
        """Yield rectangles of the slice that make the range: a row's end, whole rows, a row's beginning."""
        first, last = -(-self.start // self.width), self.stop // self.width
        if first > last:  # within a row
            yield last, first, self.start - last * self.width, self.stop - last * self.width
            return
        if self.start < first * self.width:
            yield first - 1, first, self.start - (first - 1) * self.width, self.width
        if first < last:
            yield first, last, 0, self.width
        if last * self.width < self.stop:
            yield last, last + 1, 0, self.stop - last * self.width

    def overlaps(self, other: "Lying") -> bool:
        """Return whether the rows of both, and the columns of their slices, have anything in common."""
        rows = self.start // self.width <= (other.stop - 1) // other.width
        rows = rows and other.start // other.width <= (self.stop - 1) // self.width
        return rows and self.left < other.left + other.width and other.left < self.left + self.width

    def view(self, numbers: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
        """Return a rectangle, in rows and columns of the whole, of the numbers of this range."""
        first = rows[0] * self.width + columns[0] - self.left - self.start
        shape = (rows[1] - rows[0], columns[1] - columns[0])
        return numbers.as_strided(shape, (self.width, 1), numbers.storage_offset() + first)


def transfer(source: Tensor, lies: Lying, target: Tensor, wanted: Lying) -> None:
    """Copy what two ranges have in common; each is given with its numbers, in one row."""
    for top, bottom, left, right in lies.boxes():
        for other_top, other_bottom, other_left, other_right in wanted.boxes():
            rows = max(top, other_top), min(bottom, other_bottom)
            columns = (
                max(left + lies.left, other_left + wanted.left),
                min(right + lies.left, other_right + wanted.left),
            )
            if rows[0] < rows[1] and columns[0] < columns[1]:
                wanted.view(target, rows, columns).copy_(lies.view(source, rows, columns))


class File:
    """A safetensors file, of which only those pages are read that are asked for."""

    def __init__(self, path: Path) -> None:
        self.tensors, self.begin = read_header(path)
        with open(path, "rb") as stream:
            # Note: private pages, since torch warns of memory that it may not write
            self.memory = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)

    def numbers(self, name: str) -> Tensor:
        """Return a tensor of the file in one row."""
        dtype, (begin, end) = self.dtype(name), self.tensors[name]["data_offsets"]
        count = (end - begin) // dtype.itemsize
        return torch.frombuffer(self.memory, dtype=dtype, count=count, offset=self.begin + begin)

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of a tensor's numbers."""
        dtype: torch.dtype = TORCH_DTYPES[self.tensors[name]["dtype"]]
        return dtype


class Source:
    """A checkpoint to read from."""

    def __init__(self, checkpoint: Path, index: Index) -> None:
        self.checkpoint, self.index = checkpoint, index
        self._file = cache(lambda name: File(checkpoint / name))

    def fill(
        self, name: str, state: str, target: Tensor, bounds: tuple[int, int], part: Part = WHOLE, dim: int | None = None
    ) -> None:
        """Read a range of a tensor into `target`, its numbers in one row.

        Args:
            state: "weights", or of the optimizer.
            part: Of which slice along `dim` the range is.
        """
        record, ranks = self.index.tensors[name], self.index.ranks
        table = dim if record.sliced is None else record.sliced
        assert dim in (None, table), f"{name}: sliced along {record.sliced}, now along {dim}"
        wanted = Lying.of(record.shape, table or 0, part, bounds)
        for piece in record.pieces:
            of = WHOLE if record.sliced is None else (piece.tensor_rank, ranks.tensor)
            lies = Lying.of(record.shape, table or 0, of, (piece.start, piece.stop))
            if lies.overlaps(wanted):
                file = self._file(file_name(state, piece.rank, ranks.world))
                transfer(file.numbers(key(name, state)), lies, target, wanted)

    def dtype(self, name: str, state: str) -> torch.dtype:
        """Return the type of a tensor's numbers."""
        record = self.index.tensors[name]
        file = self._file(file_name(state, record.pieces[0].rank, self.index.ranks.world))
        return file.dtype(key(name, state))

    def whole(self, name: str, state: str) -> Tensor:
        """Return a whole tensor."""
        whole = torch.empty(self.index.tensors[name].shape, dtype=self.dtype(name, state))
        self.fill(name, state, whole.view(-1), (0, whole.numel()))
        return whole
