"""A door to pyarrow: parts of a corpus and of its rejects, and tables from outside.

pyarrow and numpy are imported inside the functions, because a run that has nothing to do imports this module too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from pipeline.errors import ArtifactError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from pipeline.text.flat import Texts

CORPUS = {"id": "string", "text": "large_string", "source": "string", "meta": "string"}
REJECTS = {"id": "string", "reason": "string", "detail": "string", "text": "large_string"}
BATCH_BYTES = 1 << 20  # text of a record batch: what a writer or reader holds in memory
BATCH_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Document:
    """A text of a corpus; `meta` is a JSON object."""

    id: str
    text: str
    source: str
    meta: str = "{}"


@dataclass(frozen=True, slots=True)
class Reject:
    """A document or row that was left out. `reason` is one word that is counted, `detail` what exactly was wrong."""

    id: str
    reason: str
    detail: str
    text: str | None = None


class RowWriter:
    """Writes rows to an Arrow IPC stream, in record batches of about `BATCH_BYTES`."""

    def __init__(self, path: Path, columns: dict[str, str]) -> None:
        import pyarrow as pa

        self._schema = pa.schema([(name, getattr(pa, kind)()) for name, kind in columns.items()])
        self._file = pa.OSFile(str(path), "wb")
        self._stream = pa.ipc.new_stream(self._file, self._schema)
        self._rows: list[Sequence[str | None]] = []
        self._held_bytes = 0

    def add(self, row: Sequence[str | None], num_bytes: int) -> None:
        """Write a row whose text is `num_bytes` long."""
        self._rows.append(row)
        self._held_bytes += num_bytes
        if self._held_bytes >= BATCH_BYTES or len(self._rows) >= BATCH_ROWS:
            self._flush()

    def close(self) -> None:
        """Write what is held back, and the end of the stream."""
        if self._rows:
            self._flush()
        self._stream.close()
        self._file.close()

    def _flush(self) -> None:
        import pyarrow as pa

        columns = [pa.array(c, kind) for c, kind in zip(zip(*self._rows, strict=True), self._schema.types, strict=True)]
        self._stream.write_batch(pa.record_batch(columns, schema=self._schema))
        self._rows, self._held_bytes = [], 0


def write_corpus(path: Path, documents: Iterable[Document]) -> None:
    """Write a corpus part."""
    with closing(RowWriter(path, CORPUS)) as writer:
        for document in documents:
            writer.add((document.id, document.text, document.source, document.meta), len(document.text))


def read_corpus(path: Path) -> Iterator[Document]:
    """Yield the documents of a corpus part in their order, in constant memory."""
    for columns in _columns(path):
        yield from map(Document, *columns)


@dataclass(frozen=True)
class TextBatch:
    """Neighbouring documents of a corpus part.

    Attributes:
        columns: `id`, `source` and `meta` as Arrow arrays.
    """

    columns: dict[str, Any]
    texts: Texts

    def distinct(self, name: str) -> tuple[list[str], npt.NDArray[np.int64]]:
        """Return (the different values of a column, the number of each document's value among them)."""
        import numpy as np

        coded = self.columns[name].dictionary_encode()
        return coded.dictionary.to_pylist(), coded.indices.to_numpy().astype(np.int64)


def read_texts(path: Path, num_bytes: int, skip: int = 0) -> Iterator[TextBatch]:
    """Yield a corpus part in batches that hold at least `num_bytes` of text, but for the last.

    Where they begin depends on the part alone if `skip`, the number of documents to leave out, ends such a batch.
    """
    import pyarrow as pa

    held: list[Any] = []
    held_bytes = 0
    with _readable_errors(path), pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
        for batch in stream:
            left_out = min(skip, batch.num_rows)
            skip -= left_out
            if left_out < batch.num_rows:
                held.append(batch.slice(left_out))
                places = _text_places(held[-1])
                held_bytes += int(places[-1] - places[0])
            if held_bytes >= num_bytes:
                yield _text_batch(held)
                held, held_bytes = [], 0
        if held:
            yield _text_batch(held)


def sample_texts(path: Path, count: int) -> list[str]:
    """Return some texts of a corpus part, spread evenly over its documents."""
    import pyarrow as pa

    with _readable_errors(path), pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
        texts = pa.Table.from_batches(stream, stream.schema).column("text")
        count = min(count, len(texts))
        return [texts[number * len(texts) // count].as_py() for number in range(count)]


def read_ids(path: Path) -> Iterator[str]:
    """Yield the document ids of a corpus or tokens part, without reading the texts."""
    for columns in _columns(path, ["id"]):
        yield from columns[0]


def read_rejects(path: Path) -> Iterator[Reject]:
    """Yield the rejects of one part."""
    for columns in _columns(path):
        yield from map(Reject, *columns)


def open_decompressed(path: Path) -> BinaryIO:
    """Open a .gz, .bz2, .zst or .lz4 file as the bytes that were compressed."""
    import pyarrow as pa

    stream: BinaryIO = pa.input_stream(str(path), compression="detect")
    return stream


@dataclass(frozen=True)
class Table:
    """A Parquet or Arrow file from outside.

    Attributes:
        columns: Names of its columns.
        groups: (rows, bytes) of each row group or record batch.
        batches: Gives the record batches of groups [start, stop), with the columns asked for.
    """

    columns: list[str]
    groups: list[tuple[int, int]]
    batches: Callable[[int, int, list[str]], Iterable[Any]]


def open_table(path: Path, kind: Literal["parquet", "arrow"]) -> Table:
    """Open a Parquet file, or an Arrow IPC file or stream.

    Raises:
        ArtifactError: If it is damaged or something else.
    """
    with _readable_errors(path, kind):
        return _open_parquet(path) if kind == "parquet" else _open_ipc(path)


def table_rows(batch: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a record batch or table; a string that is not valid UTF-8 comes as bytes."""
    names = batch.schema.names
    for row in zip(*map(_values, batch.columns), strict=True):
        yield dict(zip(names, row, strict=True))


def _open_parquet(path: Path) -> Table:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    meta = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    row_bytes = sum(group.total_byte_size for group in meta) // max(1, file.metadata.num_rows)
    batch_rows = max(1, min(BATCH_ROWS, 16 * BATCH_BYTES // max(1, row_bytes)))

    def batches(start: int, stop: int, columns: list[str]) -> Iterator[Any]:
        groups = list(range(start, stop))
        with _readable_errors(path, "parquet"):
            yield from file.iter_batches(batch_rows, row_groups=groups, columns=columns, use_threads=False)

    return Table(file.schema_arrow.names, [(group.num_rows, group.total_byte_size) for group in meta], batches)


def _open_ipc(path: Path) -> Table:
    import pyarrow as pa

    with open(path, "rb") as file:
        is_file = file.read(6) == b"ARROW1"
    source = pa.memory_map(str(path))
    reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)

    def all_batches() -> Iterator[Any]:
        with _readable_errors(path, "arrow"):
            if is_file:
                yield from map(reader.get_batch, range(reader.num_record_batches))
            else:
                yield from pa.ipc.open_stream(pa.memory_map(str(path)))

    def batches(start: int, stop: int, columns: list[str]) -> Iterator[Any]:
        return (batch.select(columns) for batch in itertools.islice(all_batches(), start, stop))

    return Table(reader.schema.names, [(batch.num_rows, batch.nbytes) for batch in all_batches()], batches)


def _columns(path: Path, names: list[str] | None = None) -> Iterator[list[list[Any]]]:
    """Yield the columns of each record batch of one of our own parts."""
    import pyarrow as pa

    with _readable_errors(path), pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
        for batch in stream:
            yield [column.to_pylist() for column in (batch.select(names) if names else batch).columns]


def _text_batch(batches: Sequence[Any]) -> TextBatch:
    import numpy as np
    import pyarrow as pa

    from pipeline.text.flat import Texts

    columns = {name: pa.concat_arrays([batch.column(name) for batch in batches]) for name in ("id", "source", "meta")}
    places = [_text_places(batch) for batch in batches]
    sizes = np.concatenate([np.diff(place) for place in places])
    data = [
        np.frombuffer(batch.column("text").buffers()[2] or b"", np.uint8)[place[0] : place[-1]]
        for batch, place in zip(batches, places, strict=True)
    ]
    starts = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=starts[1:])
    return TextBatch(columns, Texts(np.concatenate(data), starts))


def _text_places(batch: Any) -> npt.NDArray[np.int64]:
    """Return the byte at which each text of a record batch begins, and at which the last one ends."""
    import numpy as np

    texts = batch.column("text")
    return np.frombuffer(texts.buffers()[1], np.int64)[texts.offset :][: len(texts) + 1]


def _values(column: Any) -> list[Any]:
    import pyarrow as pa

    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        values = [_decoded(raw) for raw in column.cast(pa.large_binary()).to_pylist()]
    return values


def _decoded(raw: bytes | None) -> str | bytes | None:
    try:
        return None if raw is None else raw.decode()
    except UnicodeDecodeError:
        return raw


@contextmanager
def _readable_errors(path: Path, kind: str = "arrow") -> Iterator[None]:
    """Turn what pyarrow says of a file that it cannot read into an ArtifactError."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, StopIteration) as error:
        problem = str(error).split("\n")[0]
        raise ArtifactError(f"{path}: cannot be read as {kind} ({problem}); is it damaged, or another kind?") from None
