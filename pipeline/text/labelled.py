"""Labelled texts: JSONL rows with a text, a label and a split."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ArtifactError
from pipeline.text.arrow import Reject
from pipeline.text.lines import BYTE_ORDER_MARK, open_raw
from pipeline.text.rows import Row, describe_problem, parse_json
from pipeline.text.sources import expand_user, reading, regular_file

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Labelled:
    """One labelled text."""

    text: str
    label: str


def read_labelled(
    path: str, text_field: str, label_field: str, split_field: str, where: str
) -> dict[str, list[Labelled]]:
    """Read a JSONL file (plain, .gz or .zst) and return its rows by split, in the order of the file.

    Args:
        where: Dotted path of the setting that names the file, for messages.

    Raises:
        ArtifactError: If the file cannot be read, a row is not JSON in UTF-8 or lacks a field, or a split is unknown
            or empty.
    """
    splits: dict[str, list[Labelled]] = {split: [] for split in SPLITS}
    for place, row in _rows(path, where):
        text, label, split = (_text(place, row, field) for field in (text_field, label_field, split_field))
        if split not in splits:
            raise ArtifactError(f"{place}: split {split[:80]!r} is none of {', '.join(SPLITS)}")
        splits[split].append(Labelled(text, label))
    empty = [split for split, rows in splits.items() if not rows]
    if empty:
        raise ArtifactError(f"{where}: {path}: no rows of split {' or '.join(empty)} in field '{split_field}'")
    return splits


def _rows(path: str, where: str) -> Iterator[tuple[str, Row]]:
    """Yield (file:line, row)."""
    try:
        file = regular_file(expand_user(path))
    except ArtifactError as error:
        raise ArtifactError(f"{where}: {error}; wanted labelled texts as JSONL") from None
    for number, line in _lines(file):
        row = parse_json(f"{path}:{number}", line)
        if isinstance(row, Reject):
            raise ArtifactError(f"{row.id}: not a JSON object in UTF-8 ({row.detail}); wanted one on each line")
        yield f"{path}:{number}", row


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, line without its end)."""
    number = 0
    try:
        with reading(str(file)), open_raw(file) as lines:
            for number, line in enumerate(lines, 1):
                yield number, line.removeprefix(BYTE_ORDER_MARK if number == 1 else b"").rstrip(b"\r\n")
    except ArtifactError as error:
        problem = str(error).removeprefix(f"{file}: ")
        raise ArtifactError(f"{file}:{number + 1}: {problem}") from None


def _text(place: str, row: Row, field: str) -> str:
    """Return a field that must be text."""
    value = row.get(field)
    if not isinstance(value, str):
        shown = f" ({json.dumps(value)[:40]})" if isinstance(value, int | float) else ""
        wanted = ", wanted text" if field in row else ""
        raise ArtifactError(f"{place}: {describe_problem(field, row)}{shown}{wanted}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise ArtifactError(
            f"{place}: field '{field}' has half of a surrogate pair ({half}), which UTF-8 cannot hold; mend it"
        ) from None
    return value
