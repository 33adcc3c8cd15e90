"""Raw files: which ones a setting names, and what identifies their content in a fingerprint."""

import errno
import glob
import itertools
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from pipeline.errors import ArtifactError
from pipeline.settings import nearest

SAMPLE_BYTES = 64 << 10
KINDS = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}  # else a device


def list_files(path: str) -> list[tuple[str, Path]]:
    """Return (relative name, path) of every raw file that `path` names, sorted by name.

    `path` is a file, a directory (with all below it; hidden files and directories are skipped) or a glob, in which
    `**` stands for any directories. Names are relative to the directory, or to the part of a glob before its first
    wildcard, so they do not depend on where the data lies.

    Raises:
        ArtifactError: If there is nothing, or anything of it cannot be listed or is no regular file.
    """
    place = expand_user(path)
    with reading(path):
        if glob.has_magic(path) and not os.path.lexists(place):
            base, found, nothing = _fixed_part(place), _matches(place), "no file matches this pattern"
        elif place.is_dir():
            base, found, nothing = place, list(_walk(place)), "this directory has no files but hidden ones"
        elif _is_missing(place):
            raise ArtifactError(f"{path}: no such file or directory; wanted raw text files{_nearest_sibling(place)}")
        else:
            base, found, nothing = place.parent, [place], ""
        if not found:
            raise ArtifactError(f"{path}: {nothing}; wanted raw text files")
        return sorted((_readable(file.relative_to(base).as_posix()), regular_file(file)) for file in found)


def identify(path: str) -> list[list[str | int]]:
    """Return [relative name, bytes, xxh128 of the first and last 64 KiB] of every raw file that `path` names.

    Raises:
        ArtifactError: If there is nothing, or anything of it cannot be read or is no regular file.
    """
    return [[name, *_size_and_hash(file)] for name, file in list_files(path)]


def expand_user(path: str) -> Path:
    """Return `path` with the home directory for `~`.

    Raises:
        ArtifactError: If `path` begins with `~` and a user that does not exist.
    """
    with reading(path):
        return Path(path).expanduser()


def regular_file(file: Path) -> Path:
    """Return `file` if it is a regular file, or a link to one.

    Raises:
        ArtifactError: If it is not, such as a named pipe, which would never end, or a link that leads nowhere.
    """
    with reading(str(file)):
        try:
            mode = file.stat().st_mode
        except FileNotFoundError:
            if not file.is_symlink():
                raise
            to = file.readlink()
            raise ArtifactError(f"{file}: a link to '{to}', which leads to nothing; mend it or remove it") from None
    if not stat.S_ISREG(mode):
        kind = KINDS.get(stat.S_IFMT(mode), "a device")
        raise ArtifactError(f"{file}: not a regular file but {kind}; remove it, or name other files")
    return file


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn what the system says of a path that it cannot find or read into an ArtifactError."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:  # `~nobody` is a RuntimeError, a zero byte a ValueError
        place = getattr(error, "filename", None) or path
        problem = getattr(error, "strerror", None) or str(error).rstrip(".")
        found = problem[:1].lower() + problem[1:]
        raise ArtifactError(f"{place}: {found}; wanted what can be read; mend that, or name other files") from None


def _is_missing(place: Path) -> bool:
    try:
        place.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    return False


def _matches(pattern: Path) -> list[Path]:
    """Return the files that match a glob, which by itself would pass over directories that it cannot list."""
    for depth in range(len(_fixed_part(pattern).parts), len(pattern.parts)):
        for folder in _glob(Path(*pattern.parts[:depth])):
            try:
                os.scandir(folder).close()
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):  # these are no directories
                    raise
    return [match for match in _glob(pattern) if not match.is_dir()]


def _glob(pattern: Path) -> list[Path]:
    if not glob.has_magic(str(pattern)):
        return [pattern]
    return list(map(Path, glob.glob(str(pattern), recursive=True)))  # noqa: PTH207 (Path.glob takes hidden files)


def _walk(directory: Path) -> Iterator[Path]:
    """Yield all files below a directory, through links to directories but not in circles."""

    def refuse(error: OSError) -> None:
        raise error

    for folder, folders, files in os.walk(directory, onerror=refuse, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not _leads_up(Path(folder, name)))
        yield from (Path(folder, name) for name in files if not name.startswith("."))


def _leads_up(folder: Path) -> bool:
    """Return whether `folder` is a link to a directory that it lies in."""
    return folder.is_symlink() and folder.resolve() in [parent.resolve() for parent in folder.parents]


def _fixed_part(pattern: Path) -> Path:
    """Return the directories of a glob before its first wildcard."""
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))


def _size_and_hash(file: Path) -> tuple[int, str]:
    digest = xxhash.xxh3_128()
    with reading(str(file)), open(file, "rb") as stream:
        size = file.stat().st_size
        digest.update(stream.read(SAMPLE_BYTES))
        stream.seek(max(stream.tell(), size - SAMPLE_BYTES))
        digest.update(stream.read(SAMPLE_BYTES))
    return size, digest.hexdigest()


def _readable(name: str) -> str:
    """Return a file name as valid Unicode: bytes of it that are not UTF-8 are written as escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _nearest_sibling(place: Path) -> str:
    """Return what lies where `place` was looked for, if that helps."""
    if not place.parent.is_dir():
        return f"; there is no directory {place.parent} either"
    try:
        there = [entry.name for entry in place.parent.iterdir() if not entry.name.startswith(".")]
    except OSError:
        return ""
    siblings = nearest(place.name, there)
    return siblings if len(siblings) <= 200 else ""
