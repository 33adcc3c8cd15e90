"""Labelled texts: JSONL rows with a text, a label and a split."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ArtifactError
from pipeline.settings import nearest
from pipeline.text.arrow import open_decompressed

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
        ArtifactError: If the file is missing, a row is not JSON or lacks a field, or a split is unknown or empty.
    """
    splits: dict[str, list[Labelled]] = {split: [] for split in SPLITS}
    for place, row in _rows(path, where):
        for field in (text_field, label_field, split_field):
            if not isinstance(row.get(field), str):
                raise ArtifactError(f"{place}: has no text in field '{field}'{nearest(field, list(row))}")
        if row[split_field] not in splits:
            raise ArtifactError(f"{place}: split '{row[split_field]}' is none of {', '.join(SPLITS)}")
        splits[row[split_field]].append(Labelled(row[text_field], row[label_field]))
    empty = [split for split, rows in splits.items() if not rows]
    if empty:
        raise ArtifactError(f"{where}: {path}: no rows of split {' or '.join(empty)} in field '{split_field}'")
    return splits


def _rows(path: str, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (file:line, row)."""
    if not Path(path).is_file():
        raise ArtifactError(f"{where}: {path}: no such file; wanted labelled texts as JSONL")
    with io.TextIOWrapper(open_decompressed(Path(path)), encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ArtifactError(f"{path}:{number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise ArtifactError(f"{path}:{number}: wanted a JSON object, found {type(row).__name__}")
            yield f"{path}:{number}", row
