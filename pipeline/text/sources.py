"""Raw files: which ones a setting names, and what identifies their content in a fingerprint."""

import glob
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import xxhash

from pipeline.errors import ArtifactError
from pipeline.settings import nearest

SAMPLE_BYTES = 64 << 10


def list_files(path: str) -> list[tuple[str, Path]]:
    """Return (relative name, path) of every raw file that `path` names, sorted by name.

    `path` is a file, a directory (with all below it; hidden files and directories are skipped) or a glob, in which
    `**` stands for any directories. Names are relative to the directory, or to the part of a glob before its first
    wildcard, so they do not depend on where the data lies.

    Raises:
        ArtifactError: If there is nothing.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return [(_readable(place.name), place)]
    if place.is_dir():
        base, found = place, list(_walk(place))
    elif glob.has_magic(path):
        base = _fixed_part(place)
        matches = map(Path, glob.glob(str(place), recursive=True))  # noqa: PTH207 (Path.glob takes hidden files)
        found = [match for match in matches if match.is_file()]
    else:
        raise ArtifactError(f"{path}: no such file or directory; wanted raw text files{_nearest_sibling(place)}")
    if not found:
        what = "this directory has no files but hidden ones" if place.is_dir() else "no file matches this pattern"
        raise ArtifactError(f"{path}: {what}; wanted raw text files")
    return sorted((_readable(file.relative_to(base).as_posix()), file) for file in found)


def identify(path: str) -> list[list[str | int]]:
    """Return [relative name, bytes, xxh128 of the first and last 64 KiB] of every raw file that `path` names.

    Raises:
        ArtifactError: If there is nothing.
    """
    return [[name, file.stat().st_size, _sample_hash(file)] for name, file in list_files(path)]


def _walk(directory: Path) -> Iterator[Path]:
    """Yield all files below a directory, through links to directories but not in circles."""
    for folder, folders, files in os.walk(directory, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not _leads_up(Path(folder, name)))
        yield from (Path(folder, name) for name in files if not name.startswith("."))


def _leads_up(folder: Path) -> bool:
    """Return whether `folder` is a link to a directory that it lies in."""
    return folder.is_symlink() and folder.resolve() in [parent.resolve() for parent in folder.parents]


def _fixed_part(pattern: Path) -> Path:
    """Return the directories of a glob before its first wildcard."""
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))


def _sample_hash(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(file, "rb") as stream:
        digest.update(stream.read(SAMPLE_BYTES))
        stream.seek(max(stream.tell(), file.stat().st_size - SAMPLE_BYTES))
        digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _readable(name: str) -> str:
    """Return a file name as valid Unicode: bytes of it that are not UTF-8 are written as escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _nearest_sibling(place: Path) -> str:
    """Return what lies where `place` was looked for, if that helps."""
    if not place.parent.is_dir():
        return f"; there is no directory {place.parent} either"
    siblings = nearest(place.name, [entry.name for entry in place.parent.iterdir() if not entry.name.startswith(".")])
    return siblings if len(siblings) <= 200 else ""
