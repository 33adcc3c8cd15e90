"""Artifacts: directories that are whole or not there. `manifest.json` is written last; without it nothing is read.

An artifact is `<root>/<kind>/<name>-<fingerprint>/`. While a task works in it, `work/` holds what is needed to go on
after a kill; files appear under their final names by rename after fsync.
"""

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import xxhash

from pipeline.errors import ArtifactError, ConfigError
from pipeline.settings import Settings, decode, encode

MANIFEST = "manifest.json"
WORK = "work"

UMASK = os.umask(0)
os.umask(UMASK)


class FileRecord(Settings):
    """Size and checksum of one file of an artifact."""

    bytes: int
    xxh128: str


class InputRecord(Settings):
    """An input of the stage that made an artifact; `path` is relative to that artifact's directory."""

    path: str
    fingerprint: str


class Made(Settings):
    """When, where and by what an artifact was made; not part of its fingerprint."""

    version: str
    commit: str | None
    python: str
    host: str
    time: str
    seconds: float
    ranks: int


class Manifest(Settings):
    """What an artifact is and holds. The same schema for every kind."""

    format: Literal[1] = 1
    kind: str
    name: str
    fingerprint: str
    stage: dict[str, Any]
    inputs: dict[str, InputRecord]
    files: dict[str, FileRecord]
    stats: dict[str, Any]
    made: Made


@dataclass(frozen=True)
class Artifact:
    """A complete artifact. Its files are checked against their checksums the first time each is asked for."""

    path: Path
    manifest: Manifest
    _checked: set[str] = field(default_factory=set, compare=False, repr=False)

    @property
    def stats(self) -> dict[str, Any]:
        """The counts and numbers that its stage left in the manifest."""
        return self.manifest.stats

    @cached_property
    def names(self) -> list[str]:
        """Names of all files, sorted."""
        return sorted(self.manifest.files)

    def file(self, name: str) -> Path:
        """Return the path of a file whose size and checksum are those of the manifest.

        Raises:
            ArtifactError: If the artifact has no such file, or the file is damaged.
        """
        path, record = self.path / name, self.manifest.files.get(name)
        if record is None:
            raise ArtifactError(f"{self.path}: has no file '{name}'; it is a {self.manifest.kind} artifact")
        if name not in self._checked:
            found = record_file(path)
            if found != record:
                raise ArtifactError(
                    f"{path}: damaged: wanted {record.bytes} bytes with xxh128 {record.xxh128}, found {found.bytes} "
                    f"with {found.xxh128}; delete {self.path} and run the task that made it again"
                )
            self._checked.add(name)
        return path

    def parts(self, prefix: str = "part-") -> list[str]:
        """Return the names of the data files in their order."""
        return [name for name in self.names if name.startswith(prefix)]


def open_artifact(path: Path, *kinds: str, where: str = "") -> Artifact:
    """Open the complete artifact in `path`.

    Args:
        kinds: Kinds of artifact that will do; any if none is given.
        where: Dotted path of the setting that names it, for messages.

    Raises:
        ArtifactError: If there is none, it is unfinished, of another kind, or a file is missing or of another size.
    """
    place = f"{where}: {path}" if where else str(path)
    if not path.is_dir():
        raise ArtifactError(f"{place}: no such directory; wanted {_a_kind(kinds)}")
    if not (path / MANIFEST).is_file():
        raise ArtifactError(f"{place}: has no {MANIFEST}, so it is unfinished; run the task that makes it")
    manifest = read_manifest(path)
    if kinds and manifest.kind not in kinds:
        raise ArtifactError(f"{place}: wanted {_a_kind(kinds)}, found one of kind '{manifest.kind}'")
    for name, record in manifest.files.items():
        size = (path / name).stat().st_size if (path / name).is_file() else None
        if size != record.bytes:
            found = "no such file" if size is None else f"{size}"
            raise ArtifactError(
                f"{path / name}: damaged: wanted {record.bytes} bytes, found {found}; "
                f"delete {path} and run the task that made it again"
            )
    return Artifact(path, manifest)


def read_manifest(path: Path) -> Manifest:
    """Read the manifest in directory `path`. Raises ArtifactError if it is not one of ours."""
    try:
        return decode(Manifest, json.loads((path / MANIFEST).read_text("utf-8")))
    except (ConfigError, ValueError) as error:
        problem = str(error).splitlines()[0]
        raise ArtifactError(f"{path / MANIFEST}: not a manifest of this version ({problem}); make it again") from None


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Make the directory `path` an artifact: the last write of a task."""
    write_json(path / MANIFEST, encode(manifest))


def record_file(path: Path) -> FileRecord:
    """Return size and xxh128 of a file. Raises ArtifactError if it is gone."""
    digest, size = xxhash.xxh3_128(), 0
    try:
        with open(path, "rb", buffering=0) as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
                size += len(block)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file, but the manifest lists it; make the artifact again") from None
    return FileRecord(bytes=size, xxh128=digest.hexdigest())


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to; on success it becomes `path`, durably, in one step.

    Raises:
        ArtifactError: If the disk is full.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        temporary.chmod(0o666 & ~UMASK)  # whatever a library chose
        fsync(temporary)
        temporary.replace(path)
        fsync(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if is_disk_full(error):
            raise ArtifactError(f"{path}: the disk is full; make room and run the same command again") from None
        raise


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")


def is_disk_full(error: OSError) -> bool:
    """Return whether a write failed for want of space or quota."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def fsync(path: Path) -> None:
    """Make a file or a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _a_kind(kinds: tuple[str, ...]) -> str:
    return f"an artifact of kind {' or '.join(kinds)}" if kinds else "an artifact"
