"""What all readers share: rows of raw data become documents, or rejects that say what was wrong with them."""

import json
import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

from pydantic import model_validator

from pipeline.errors import ArtifactError
from pipeline.settings import Choice, nearest
from pipeline.text.arrow import Document, Reject
from pipeline.text.lines import MAX_DOCUMENT_BYTES, Span
from pipeline.text.sources import list_files

Row = dict[str, Any]
Outcome = Document | Reject | None  # None: a row that `where` does not want


class Reader(Choice):
    """How raw text is read.

    Attributes:
        source: What the corpus calls the origin of these documents; null takes each file's name, without extensions.
    """

    source: str | None = None

    def spans(self, path: str) -> list[Span]:
        """Cut all files that `path` names into spans, in the order of the corpus.

        Raises:
            ArtifactError: If there is nothing, or a file is not what this reader reads.
        """
        return [span for name, file in list_files(path) for span in self.cut(name, file)]

    def first_row(self, span: Span) -> Row | None:
        """Return the first row of `span`, to show a person; null where there are no rows with fields."""
        return None

    @abstractmethod
    def cut(self, name: str, file: Path) -> list[Span]:
        """Cut one file into spans."""

    @abstractmethod
    def read(self, span: Span) -> Iterator[Outcome]:
        """Yield what becomes of every row of `span`, in order."""


class FieldReader(Reader):
    """What a reader of rows with named fields can be told.

    Attributes:
        text_field: Field that holds the text.
        id_field: Field that names a document; null names it by its file and its place there.
        source_field: Field that holds the origin of a document, instead of `source`.
        meta_fields: Fields to keep beside the text, as JSON; it has no numbers that are not finite, they become null.
        where: Keep only rows whose fields have these values; the others count as `skipped.where`.
    """

    text_field: str = "text"
    id_field: str | None = None
    source_field: str | None = None
    meta_fields: list[str] = []
    where: dict[str, str] = {}

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.source is not None and self.source_field is not None:
            raise ValueError("source and source_field exclude each other; drop one")
        return self

    def fields(self) -> list[str]:
        """Return the fields of a row that are used."""
        named = [self.text_field, self.id_field, self.source_field, *self.meta_fields, *self.where]
        return list(dict.fromkeys(name for name in named if name is not None))


class RowReader(FieldReader):
    """A reader of rows with named fields."""

    @abstractmethod
    def rows(self, span: Span) -> Iterator[tuple[int, Row | Reject]]:
        """Yield (place in the file, row), or a reject for what is not a row."""

    def first_row(self, span: Span) -> Row | None:
        """Return the first row of `span`."""
        return next((row for _, row in self.rows(span) if not isinstance(row, Reject)), None)

    def read(self, span: Span) -> Iterator[Outcome]:
        """Yield a document, a reject or null for every row."""
        for place, row in self.rows(span):
            if isinstance(row, Reject):
                yield row
                continue
            named = f"{span.name}:{place}"
            try:
                outcome = self._outcome(span, named, row)
            except RecursionError:
                outcome = Reject(named, "bad_json", "a field is nested too deeply to be written as JSON again")
            yield outcome

    def _outcome(self, span: Span, place: str, row: Row) -> Outcome:
        if any(as_text(row.get(name)) != wanted for name, wanted in self.where.items()):
            return None
        identity = place if self.id_field is None else as_text(row.get(self.id_field))
        if not identity:
            return Reject(place, "no_id", describe_problem(self.id_field or "", row))
        text = row.get(self.text_field)
        if isinstance(text, bytes):
            return Reject(place, "bad_utf8", f"field '{self.text_field}' is not UTF-8")
        if not isinstance(text, str):
            return Reject(place, "no_text", describe_problem(self.text_field, row))
        origin = self.source or as_text(row.get(self.source_field or "")) or span.stem
        meta = {name: row.get(name) for name in self.meta_fields}
        document = Document(identity, text, origin, _strict_json(meta))
        return check_document(document, place)


def decode_utf8(place: str, raw: bytes) -> str | Reject:
    """Return the text of `raw`, or the reject `bad_utf8`."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        return Reject(place, "bad_utf8", f"byte 0x{raw[error.start]:02x} at {error.start} is not UTF-8")


def parse_json(place: str, line: bytes) -> Row | Reject:
    """Return the JSON object on a line, or the reject `bad_utf8` or `bad_json`."""
    text = decode_utf8(place, line)
    if isinstance(text, Reject):
        return text
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Reject(place, "bad_json", str(error))
    return row if isinstance(row, dict) else Reject(place, "bad_json", f"wanted an object, found {_type_name(row)}")


def check_document(document: Document, place: str) -> Document | Reject:
    """Return `document` if a corpus can hold it, else the reject `empty`, `bad_utf8` or `too_large`."""
    text = document.text
    if not text or text.isspace():
        return Reject(place, "empty", "no text but white space")
    try:
        size = len(text.encode())
        f"{document.id}{document.source}{document.meta}".encode()
    except UnicodeEncodeError:
        return Reject(place, "bad_utf8", "half of a surrogate pair, which UTF-8 cannot hold")
    if size > MAX_DOCUMENT_BYTES:
        return Reject(place, "too_large", f"more than {MAX_DOCUMENT_BYTES >> 20} MiB; cut it into paragraphs or lines")
    return document


def as_text(value: Any) -> str | None:
    """Return a string as it is and any other value as JSON; null for null and for bytes."""
    if value is None or isinstance(value, str | bytes):
        return value if isinstance(value, str) else None
    return json.dumps(value, ensure_ascii=False, default=str)


def _strict_json(meta: Row) -> str:
    """Return `meta` as JSON that any parser reads."""
    try:
        return json.dumps(meta, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(meta), ensure_ascii=False, default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    """Return `value` with null for NaN and the infinities, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def describe_problem(name: str, row: Row) -> str:
    """Return why field `name` of `row` cannot be used: it is not there, or not a string."""
    return f"field '{name}' is {_type_name(row[name])}" if name in row else _no_field(name, tuple(row))


def check_fields(file: Path, wanted: Iterable[str], columns: Iterable[str]) -> None:
    """Check that a table has the fields that a reader was told to use.

    Raises:
        ArtifactError: For the first that it does not have.
    """
    there = tuple(columns)
    for name in wanted:
        if name not in there:
            raise ArtifactError(f"{file}: {_no_field(name, there)}")


@lru_cache(maxsize=1024)
def _no_field(name: str, there: tuple[str, ...]) -> str:
    listed = f"; there is {', '.join(sorted(there))}" if there else "; the row is empty"
    close = nearest(name, list(there))
    return f"no field '{name}'{listed}{close if 'did you mean' in close else ''}"


def _type_name(value: Any) -> str:
    """Return what JSON calls the type of `value`."""
    if value is None or value == "":
        return "null" if value is None else "an empty string"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), f"of type {type(value).__name__}")
