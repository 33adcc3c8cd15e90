"""Parts of a tokens artifact: Arrow IPC streams of several record batches, one row a document, read in place.

A door to pyarrow. A part is appended to batch by batch, can be gone on with after a kill, and is read as one long row
of tokens without copying any.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from pipeline.artifact import FileRecord, is_disk_full
from pipeline.errors import ArtifactError

Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
COLUMNS = ("id", "source", "input_ids", "num_bytes", "text_hash")
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # a message of length 0 (Arrow columnar format, IPC streaming)
BLOCK_BYTES = 1 << 20


class TokenPart:
    """A tokens part, memory-mapped.

    Attributes:
        flat: The whole file as one array of uint16 or uint32.
        starts: First token of each batch within the part, and the number of all at the end; int64 [batches + 1].
        places: Index in `flat` at which the tokens of each batch begin; int64 [batches].
        first_documents: Number of the first document of each batch, and of all at the end; int64 [batches + 1].
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        buffer, self._batches = _map(path)
        columns = [batch.column("input_ids") for batch in self._batches]
        dtype = np.dtype(columns[0].type.value_type.to_pandas_dtype())
        places = [_address(column, dtype.itemsize) - buffer.address for column in columns]
        if any(place % dtype.itemsize for place in places):
            raise ArtifactError(f"{path}: its tokens do not lie on multiples of {dtype.itemsize} bytes; make it again")
        self.flat: Tokens = np.frombuffer(buffer, dtype, buffer.size // dtype.itemsize)
        self.places = np.array(places, np.int64) // dtype.itemsize
        self.starts = _running([column.offsets[-1].as_py() - column.offsets[0].as_py() for column in columns])
        self.first_documents = _running([batch.num_rows for batch in self._batches])

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all documents."""
        return int(self.starts[-1])

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return int(self.first_documents[-1])

    @property
    def num_batches(self) -> int:
        """Number of record batches."""
        return len(self._batches)

    def tokens(self, start: int, stop: int) -> Tokens:
        """Return tokens [start, stop) of the part: a view of the file where they lie in one batch, else a copy."""
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        if first < self.num_batches and stop <= self.starts[first + 1]:
            place = int(self.places[first] - self.starts[first])
            return self.flat[place + start : place + stop]
        last = int(np.searchsorted(self.starts, stop))
        return np.concatenate(
            [
                self.tokens(max(start, int(self.starts[batch])), min(stop, int(self.starts[batch + 1])))
                for batch in range(first, min(last, self.num_batches))
            ]
            or [self.flat[:0]]
        )

    def offsets(self, batch: int) -> npt.NDArray[np.int64]:
        """Return the token of the part at which each document of a batch begins, and at which the last one ends."""
        places: npt.NDArray[np.int64] = np.asarray(self._batches[batch].column("input_ids").offsets, np.int64)
        moved: npt.NDArray[np.int64] = places + (self.starts[batch] - places[0])
        return moved

    def rows(self, batch: int) -> tuple[list[str], list[str], npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
        """Return (ids, sources, UTF-8 bytes of the texts, xxh3_64 of the texts) of a batch's documents."""
        columns = self._batches[batch]
        return (
            columns.column("id").to_pylist(),
            columns.column("source").to_pylist(),
            columns.column("num_bytes").to_numpy(),
            columns.column("text_hash").to_numpy(),
        )


def open_tokens(path: Path) -> TokenPart:
    """Map a tokens part into memory; reads no more than where its batches lie.

    Raises:
        ArtifactError: If it is damaged, empty, or something else.
    """
    return TokenPart(path)


class TokenWriter:
    """Writes a tokens part: one record batch at every `add`, and the end of the stream when its block ends well.

    What was written can be gone on with after a kill: `sync` makes it durable and says what it is, and a writer given
    that record cuts off what was written since.

    Args:
        dtype: Type of the ids, "uint16" or "uint32".
        at: What `sync` returned, to go on from there.

    Raises:
        ArtifactError: If the file does not begin with what `at` says, or the disk is full.
    """

    def __init__(self, path: Path, dtype: str, at: FileRecord | None = None) -> None:
        self.path, self._digest, self._num_bytes = path, xxhash.xxh3_128(), 0
        ids = pa.list_(pa.from_numpy_dtype(np.dtype(dtype)))
        types = (pa.string(), pa.string(), ids, pa.int64(), pa.uint64())
        self._schema = pa.schema(list(zip(COLUMNS, types, strict=True)))
        self._file = io.FileIO(path, "w" if at is None else "r+")
        if at is None:
            self._write(self._schema.serialize())
        else:
            self._go_on(at)
        self._stream = pa.ipc.new_stream(_Sink(self._write, self._schema.serialize().size), self._schema)

    def add(
        self,
        ids: Any,
        sources: Any,
        values: npt.NDArray[Any],
        lengths: Sequence[int] | npt.NDArray[np.int64],
        num_bytes: Sequence[int] | npt.NDArray[np.int64],
        text_hash: Sequence[int] | npt.NDArray[np.uint64],
        chosen: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Write a record batch.

        Args:
            ids: Document ids, as a list or an Arrow array; so are `sources`.
            values: The tokens of all documents one after another; `lengths` says how many each has.
            num_bytes: UTF-8 bytes of each document's text.
            text_hash: xxh3_64 of each document's UTF-8 text.
            chosen: Which documents to write; all by default.
        """
        starts = _running(lengths)
        assert starts[-1] == len(values), f"{len(values)} tokens for documents of {starts[-1]}"
        if chosen is not None and chosen.all():
            chosen = None
        if chosen is not None:
            values = _chosen_values(values, starts, chosen)
            starts = _running(np.diff(starts)[chosen])
        tokens = pa.array(np.asarray(values, self._schema.field("input_ids").type.value_type.to_pandas_dtype()))
        columns = [
            _column(ids, pa.string(), chosen),
            _column(sources, pa.string(), chosen),
            pa.ListArray.from_arrays(pa.array(starts, pa.int32()), tokens),
            _column(num_bytes, pa.int64(), chosen),
            _column(text_hash, pa.uint64(), chosen),
        ]
        if len(starts) > 1:
            self._stream.write_batch(pa.record_batch(columns, schema=self._schema))

    @property
    def record(self) -> FileRecord:
        """Size and checksum of what was written."""
        return FileRecord(bytes=self._num_bytes, xxh128=self._digest.hexdigest())

    def sync(self) -> FileRecord:
        """Make what was written durable, and return its size and checksum."""
        os.fsync(self._file.fileno())
        return self.record

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self._write(END_OF_STREAM)
        finally:
            self._file.close()

    def _write(self, data: Any) -> None:
        view = memoryview(data)
        self._digest.update(view)
        self._num_bytes += len(view)
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            if is_disk_full(error):
                raise ArtifactError(
                    f"{self.path}: the disk is full; make room and run the same command again"
                ) from None
            raise

    def _go_on(self, at: FileRecord) -> None:
        """Check what is there, and cut off the rest."""
        while self._num_bytes < at.bytes:
            block = self._file.read(min(BLOCK_BYTES, at.bytes - self._num_bytes))
            if not block:
                break
            self._digest.update(block)
            self._num_bytes += len(block)
        if (self._num_bytes, self._digest.hexdigest()) != (at.bytes, at.xxh128):
            self._file.close()
            raise ArtifactError(f"{self.path}: does not begin with the {at.bytes} bytes that were written; delete it")
        self._file.truncate(at.bytes)


def keep_memory() -> None:
    """Let pyarrow take memory from the C library, which keeps what is freed.

    Its own allocator gives it back between two batches, and the system clears the pages anew: 4 % of tokenizing.
    """
    pa.set_memory_pool(pa.system_memory_pool())


class _Sink:
    """A file to pyarrow, which hands it the buffers of a batch uncopied; the schema, which comes first, is left out.

    Args:
        write: Is given all that is behind the first `skipped` bytes.
    """

    closed = False

    def __init__(self, write: Callable[[Any], None], skipped: int) -> None:
        self._write, self._skipped = write, skipped

    def write(self, data: Any) -> None:
        if self._skipped:
            self._skipped -= len(data)
        else:
            self._write(data)


def _map(path: Path) -> tuple[Any, list[Any]]:
    """Return (the file as a buffer, its record batches)."""
    try:
        with pa.memory_map(str(path)) as source:
            buffer = source.read_buffer()
        stream = pa.ipc.open_stream(pa.BufferReader(buffer))
        schema, batches = stream.schema, list(stream)
    except (pa.ArrowException, OSError) as error:
        problem = str(error).split("\n")[0]
        raise ArtifactError(f"{path}: cannot be read as tokens ({problem}); is it damaged, or another kind?") from None
    if tuple(schema.names) != COLUMNS or schema.field("input_ids").type not in map(
        pa.list_, (pa.uint16(), pa.uint32())
    ):
        found = ", ".join(f"{column.name}: {column.type}" for column in schema)
        raise ArtifactError(f"{path}: wanted the columns {', '.join(COLUMNS)} of tokens, found {found}; make it again")
    if not batches:
        raise ArtifactError(f"{path}: holds no documents; make it again")
    return buffer, batches


def _column(values: Any, kind: Any, chosen: npt.NDArray[np.bool_] | None) -> Any:
    array = values if isinstance(values, pa.Array) else pa.array(values, kind)
    return array if chosen is None else array.filter(pa.array(chosen))


def _chosen_values(
    values: npt.NDArray[Any], starts: npt.NDArray[np.int64], chosen: npt.NDArray[np.bool_]
) -> npt.NDArray[Any]:
    """Return the tokens of the chosen documents, copied run by run of neighbours."""
    turns = np.flatnonzero(np.diff(chosen, prepend=False, append=False))
    begins, ends = starts[turns[0::2]].tolist(), starts[turns[1::2]].tolist()
    return np.concatenate([values[:0], *(values[a:b] for a, b in zip(begins, ends, strict=True))])


def _address(column: Any, itemsize: int) -> int:
    """Return the address in memory of the first token of a batch."""
    first: int = column.values.offset + column.offsets[0].as_py()
    return int(column.values.buffers()[1].address) + first * itemsize


def _running(counts: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return 0 and the running sums."""
    sums = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=sums[1:])
    return sums
