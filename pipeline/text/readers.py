"""Readers of raw text: one for each form that text comes in. The only door to `datasets`.

A reader cuts what a path names into spans (so that one huge file is work for many ranks) and reads one span at a
time. A row that cannot be used is a reject with a reason, never a crash.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.errors import ArtifactError
from pipeline.text import lines
from pipeline.text.arrow import BATCH_ROWS, Document, Reject, Table, open_table, table_rows
from pipeline.text.lines import Span
from pipeline.text.rows import (
    FieldReader,
    Outcome,
    Reader,
    Row,
    RowReader,
    check_document,
    check_fields,
    decode_utf8,
    parse_json,
)
from pipeline.text.sources import expand_user

Cut = Literal["file", "paragraph", "line"]


class Text(Reader):
    """Plain text in UTF-8, plain or compressed (.gz, .bz2, .zst, .lz4).

    Attributes:
        document: What makes a document: a whole file, a paragraph (ended by blank lines) or a line.
    """

    kind: Literal["text"] = "text"
    document: Cut = "file"

    def cut(self, name: str, file: Path) -> list[Span]:
        """Cut a file into byte ranges, unless it is one document."""
        return [lines.whole_file(name, file)] if self.document == "file" else lines.byte_ranges(name, file)

    def read(self, span: Span) -> Iterator[Outcome]:
        """Yield the documents; what is not UTF-8 is rejected as `bad_utf8`."""
        read = {"file": lines.read_whole, "paragraph": lines.read_paragraphs, "line": lines.read_lines}
        for offset, raw in read[self.document](span):
            place = f"{span.name}:{offset}"
            text = decode_utf8(place, raw)
            if isinstance(text, Reject):
                yield text
            else:
                yield check_document(Document(place, text, self.source or span.stem), place)


class Jsonl(RowReader):
    """A JSON object a line, plain or compressed (.gz, .bz2, .zst, .lz4)."""

    kind: Literal["jsonl"] = "jsonl"

    def cut(self, name: str, file: Path) -> list[Span]:
        """Cut a file into byte ranges."""
        return lines.byte_ranges(name, file)

    def rows(self, span: Span) -> Iterator[tuple[int, Row | Reject]]:
        """Yield (byte offset of its line, object)."""
        for offset, line in lines.read_lines(span):
            yield offset, parse_json(f"{span.name}:{offset}", line)


class TableReader(RowReader):
    """A reader of files that hold columns in groups of rows."""

    kind: Literal["parquet", "arrow"]

    def cut(self, name: str, file: Path) -> list[Span]:
        """Cut a file into runs of row groups or record batches."""
        sizes = [num_bytes for _, num_bytes in self._open(file).groups]
        return [Span(name, file, start, stop, sum(sizes[start:stop])) for start, stop in lines.runs(sizes)]

    def rows(self, span: Span) -> Iterator[tuple[int, Row | Reject]]:
        """Yield (number of the row in its file, row)."""
        table = self._open(span.path)
        first = sum(rows for rows, _ in table.groups[: span.start])
        yield from _numbered(first, table.batches(span.start, span.stop or len(table.groups), self.fields()))

    def _open(self, file: Path) -> Table:
        table = open_table(file, self.kind)
        check_fields(file, self.fields(), table.columns)
        return table


class Parquet(TableReader):
    """Parquet files."""

    kind: Literal["parquet"] = "parquet"


class Arrow(TableReader):
    """Arrow IPC files and streams."""

    kind: Literal["arrow"] = "arrow"


class Datasets(RowReader):
    """What `datasets` opens: a directory made by `save_to_disk`, or local files by one of its builders.

    Attributes:
        builder: Builder for the files that `path` names; null if `path` is a `save_to_disk` directory.
        split: Split of that directory; null takes all that it has.
    """

    kind: Literal["datasets"] = "datasets"
    builder: Literal["csv", "json", "parquet", "arrow", "text", "xml"] | None = None
    split: str | None = None

    def spans(self, path: str) -> list[Span]:
        """Cut a saved dataset into runs of rows; a builder's file is one span."""
        if self.builder is not None:
            return super().spans(path)
        return [span for name, folder in self._splits(expand_user(path)) for span in self.cut(name, folder)]

    def cut(self, name: str, file: Path) -> list[Span]:
        """Cut one split, or take one file whole."""
        if self.builder is not None:
            return [lines.whole_file(name, file)]
        dataset = _load_saved(file)
        check_fields(file, self.fields(), dataset.column_names)
        run = max(1, lines.UNIT_BYTES * len(dataset) // max(1, dataset.data.nbytes))
        starts = range(0, len(dataset), run)
        return [Span(name, file, start, min(start + run, len(dataset)), lines.UNIT_BYTES) for start in starts]

    def rows(self, span: Span) -> Iterator[tuple[int, Row | Reject]]:
        """Yield (number of the row in its split or file, row)."""
        yield from _numbered(span.start, self._tables(span))

    def _splits(self, place: Path) -> list[tuple[str, Path]]:
        """Return (name, directory) of the chosen splits of a saved dataset."""
        if not is_saved_dataset(place):
            raise ArtifactError(f"{place}: not a directory made by save_to_disk; for files, say which reader.builder")
        index = place / "dataset_dict.json"
        if not index.exists():
            return [("dataset", place)]
        splits = _split_names(index)
        if self.split is not None and self.split not in splits:
            raise ArtifactError(f"{place}: has no split '{self.split}'; there is {', '.join(splits)}")
        return [(name, place / name) for name in splits if self.split in (None, name)]

    def _tables(self, span: Span) -> Iterator[Any]:
        import datasets

        if self.builder is None:
            saved = _load_saved(span.path).select_columns(self.fields())
            yield from saved.select(range(span.start, span.stop or len(saved))).with_format("arrow").iter(BATCH_ROWS)
            return
        try:
            files = datasets.load_dataset(self.builder, data_files=[str(span.path)], split="train", streaming=True)
            for number, table in enumerate(files.with_format("arrow").iter(BATCH_ROWS)):
                if number == 0:
                    check_fields(span.path, self.fields(), table.column_names)
                yield table
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise ArtifactError(f"{span.path}: cannot be read by the builder '{self.builder}': {error}") from None


class Auto(FieldReader):
    """Chooses by a file's extension: .jsonl, .json, .txt, .md, .rst, .parquet, .arrow, .feather, or a saved dataset.

    Attributes:
        document: What makes a document in plain text: a whole file, a paragraph or a line.
    """

    kind: Literal["auto"] = "auto"
    document: Cut = "file"

    def spans(self, path: str) -> list[Span]:
        """Cut all that `path` names."""
        place = expand_user(path)
        return self._reader(place).spans(path) if is_saved_dataset(place) else super().spans(path)

    def cut(self, name: str, file: Path) -> list[Span]:
        """Cut one file, as the reader for it does."""
        return self._reader(file).cut(name, file)

    def read(self, span: Span) -> Iterator[Outcome]:
        """Yield what the reader for the file yields."""
        return self._reader(span.path).read(span)

    def first_row(self, span: Span) -> Row | None:
        """Return the first row of `span`."""
        return self._reader(span.path).first_row(span)

    def _reader(self, file: Path) -> Reader:
        """Return the reader for a file, told what this one was told."""
        extension = Path(file.stem if file.suffix in lines.COMPRESSED else file.name).suffix.lower()
        told = {name: getattr(self, name) for name in FieldReader.model_fields if name != "kind"}
        if is_saved_dataset(file):
            return Datasets(**told)
        if extension in EXTENSIONS:
            return EXTENSIONS[extension](**told)
        if extension not in (".txt", ".text", ".md", ".rst"):
            known = ", ".join([*EXTENSIONS, ".txt", ".md", ".rst"])
            raise ArtifactError(
                f"{file}: no reader is known for '{extension}' files, only for {known}; say which reader.kind, or "
                "name the files to read by a pattern such as 'data/**/*.jsonl'"
            )
        if self.fields() != ["text"]:
            raise ArtifactError(f"{file}: plain text has no fields, but the reader is told to use {self.fields()}")
        return Text(source=self.source, document=self.document)


EXTENSIONS: dict[str, type[RowReader]] = {
    ".jsonl": Jsonl,
    ".json": Jsonl,
    ".ndjson": Jsonl,
    ".parquet": Parquet,
    ".arrow": Arrow,
    ".feather": Arrow,
}
AnyReader = Annotated[Auto | Jsonl | Text | Parquet | Arrow | Datasets, Field(discriminator="kind")]


def is_saved_dataset(place: Path) -> bool:
    """Return whether `place` is a directory made by `save_to_disk`."""
    indexes = (place / "dataset_dict.json", place / "dataset_info.json")
    return any(map(os.path.isfile, indexes))  # Path.is_file would raise for a path that cannot be looked up


def _split_names(index: Path) -> list[str]:
    """Return the splits that a `dataset_dict.json` names."""
    try:
        splits = json.loads(index.read_text("utf-8"))["splits"]
    except (OSError, ValueError, RecursionError, LookupError, TypeError) as error:
        problem = f"found {type(error).__name__}: {error}"
    else:
        if isinstance(splits, list) and splits and all(isinstance(name, str) for name in splits):
            return splits
        problem = f"found splits = {json.dumps(splits)[:80]}"
    raise ArtifactError(f'{index}: damaged; wanted {{"splits": ["train"]}} or the like, {problem}; save it again')


def _load_saved(place: Path) -> Any:
    """Open a split, which `datasets` reads from files that may hold anything."""
    import datasets

    try:
        return datasets.load_from_disk(str(place))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        problem = f"{type(error).__name__}: {error}".split("\n")[0]
        raise ArtifactError(
            f"{place}: wanted what save_to_disk makes, but it cannot be opened ({problem}); save it again, or name "
            f"the files to read by a pattern such as '{place}/*.jsonl'"
        ) from None


def _numbered(first: int, batches: Iterable[Any]) -> Iterator[tuple[int, Row]]:
    """Yield (number, row) for all rows of record batches or tables."""
    return enumerate((row for batch in batches for row in table_rows(batch)), start=first)
