"""Artifacts: directories that are whole or not there. `manifest.json` is written last; without it nothing is read.

An artifact is `<root>/<kind>/<name>-<fingerprint>/`. While a task works in it, `work/` holds what is needed to go on
after a kill; files appear under their final names by rename after fsync.
"""

import errno
import gc
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from pipeline.env import cpus
from pipeline.errors import ArtifactError, ConfigError
from pipeline.progress import Progress
from pipeline.proof import Proofs, Tick, alone, hash_file
from pipeline.settings import Settings, decode, encode

MANIFEST = "manifest.json"
WORK = "work"
ORIGIN = "origin"  # in an artifact of the cache: the URL that its files come from

UMASK = os.umask(0)
os.umask(UMASK)


class FileRecord(Settings):
    """Size and checksum of one file of an artifact."""

    bytes: int
    xxh128: str


class InputRecord(Settings):
    """An input of the stage that made an artifact; `path` is relative to that artifact's directory, or a URL."""

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
    """A complete artifact. No file of it is handed out that is not what the manifest says.

    Attributes:
        path: Its directory; of an artifact from elsewhere one in `<root>/cache`, to which files come when asked for.
        url: Where an artifact from elsewhere comes from.
    """

    path: Path
    manifest: Manifest
    url: str | None = None
    _checked: set[str] = field(default_factory=set, compare=False, repr=False)

    @property
    def place(self) -> str:
        """Where it is, for messages and records: its URL or its directory."""
        return self.url or str(self.path)

    @property
    def stats(self) -> dict[str, Any]:
        """The counts and numbers that its stage left in the manifest."""
        return self.manifest.stats

    @cached_property
    def names(self) -> list[str]:
        """Names of all files, sorted."""
        return sorted(self.manifest.files)

    @cached_property
    def proofs(self) -> Proofs:
        """Which of its files were proven, and when they were last written then."""
        return Proofs(self.path)

    def parts(self, prefix: str = "part-") -> list[str]:
        """Return the names of the data files in their order."""
        return [name for name in self.names if name.startswith(prefix)]

    def file(self, name: str, tick: Tick = lambda count: None) -> Path:
        """Return the path of a file, which is read in full against its checksum the first time this process asks.

        Raises:
            ArtifactError: If the artifact has no such file, or it is damaged, or cannot be fetched.
        """
        if name not in self._checked:
            self._check(name, self._record(name), tick)
            self._checked.add(name)
        return self.path / name

    def proven_file(self, name: str) -> Path:
        """Return the path of a file that was proven since it was last written: at the cost of a stat, else as `file`.

        Raises:
            ArtifactError: As `file`.
        """
        if name in self._checked or self.proofs.hold(name, self._record(name).xxh128):
            return self.path / name
        return self.file(name)

    def prove(self, names: Sequence[str]) -> None:
        """Read those files in full that were written since they were last proven, of any number in well under a second.

        Of several processes that ask for it one reads, and the others wait. Files that are yet to be fetched are left
        out: they are proven as they come.

        Raises:
            ArtifactError: For the first that is damaged.
        """
        if not self._unproven(names):
            return
        with alone(self.path / WORK / "proving.lock"):
            self.proofs.read()
            for problem in self.check(self._unproven(names), f"proving {self.place}"):
                raise ArtifactError(problem)

    def check(self, names: Sequence[str], what: str) -> Iterator[str]:
        """Read files in full, several at a time, with a progress line that begins with `what`; yield every problem."""
        progress = Progress(what, sum(self._record(name).bytes for name in names) / 1e6, "MB")
        with ThreadPoolExecutor(max(4, cpus())) as pool:
            try:
                yield from filter(None, pool.map(lambda name: self._problem(name, progress), names))
            finally:
                pool.shutdown(cancel_futures=True)
                progress.close()

    def _problem(self, name: str, progress: Progress) -> str | None:
        try:
            self.file(name, lambda count: progress.advance(count / 1e6))
        except ArtifactError as error:
            return str(error)
        return None

    def _unproven(self, names: Sequence[str]) -> list[str]:
        lacking = self.proofs.lacking((name, self._record(name).xxh128) for name in names)
        return [name for name in lacking if self.url is None or (self.path / name).exists()]

    def _record(self, name: str) -> FileRecord:
        record = self.manifest.files.get(name)
        if record is None:
            raise ArtifactError(f"{self.place}: has no file '{name}'; it is a {self.manifest.kind} artifact")
        return record

    def _check(self, name: str, wanted: FileRecord, tick: Tick) -> None:
        path = self.path / name
        if self.url is None or path.exists():
            size, xxh128 = self.proofs.prove(name, path, tick)
            if (size, xxh128) == (wanted.bytes, wanted.xxh128):
                return
            self.proofs.withdraw(name)
            if self.url is None:
                raise _damage(
                    path, f"wanted {wanted.bytes} bytes with xxh128 {wanted.xxh128}, found {size} with {xxh128}"
                )
        from pipeline.remote import fetch

        fetch(f"{self.url}/{name}", path, wanted, self.proofs)


def open_artifact(path: Path, *kinds: str, where: str = "", whole: bool = True) -> Artifact:
    """Open the complete artifact in `path`.

    Args:
        kinds: Kinds of artifact that will do; any if none is given.
        where: Dotted path of the setting that names it, for messages.
        whole: Whether to look that every file is there and of its size.

    Raises:
        ArtifactError: If there is none, it is unfinished, of another kind, or a file is missing or of another size.
    """
    place = f"{where}: {path}" if where else str(path)
    if not path.is_dir():
        raise ArtifactError(f"{place}: no such directory; wanted {_a_kind(kinds)}")
    if not (path / MANIFEST).is_file():
        if (path / WORK).is_dir():
            raise ArtifactError(f"{place}: has no {MANIFEST}, so it is unfinished; run the task that makes it")
        hint = "; stage=import_tokenizer makes one of a file" if "tokenizer" in kinds else ""
        hint += ", or a config.json of Hugging Face's with a model_type" if "model" in kinds else ""
        raise ArtifactError(f"{place}: has no {MANIFEST}, so it is not an artifact; wanted {_a_kind(kinds)}{hint}")
    artifact = Artifact(path, read_manifest(path), _read_origin(path))
    if kinds and artifact.manifest.kind not in kinds:
        place = f"{where}: {artifact.place}" if where else artifact.place
        raise ArtifactError(f"{place}: wanted {_a_kind(kinds)}, found one of kind '{artifact.manifest.kind}'")
    if whole and artifact.url is None:
        _check_sizes(artifact)
    return artifact


def _check_sizes(artifact: Artifact) -> None:
    directory = str(artifact.path)
    for name, record in artifact.manifest.files.items():
        try:
            status = os.stat(f"{directory}/{name}")  # noqa: PTH116 (Path.stat takes three times as long)
            size = status.st_size if stat.S_ISREG(status.st_mode) else None
        except (FileNotFoundError, NotADirectoryError):
            size = None
        if size != record.bytes:
            found = "no such file" if size is None else f"{size}"
            raise _damage(artifact.path / name, f"wanted {record.bytes} bytes, found {found}")


def _damage(path: Path, problem: str) -> ArtifactError:
    """Return the error of a file of an artifact that is not what it was; a link leads to a file that others made."""
    if path.is_symlink():
        return ArtifactError(f"{path.readlink()}: changed since it was planned with: {problem}; run it again")
    return ArtifactError(f"{path}: damaged: {problem}; delete {path.parent} and run the task that made it again")


def _read_origin(path: Path) -> str | None:
    """Return the URL that the files of a cached artifact come from, or null for one that was made here."""
    try:
        return (path / ORIGIN).read_text("utf-8").strip()
    except FileNotFoundError:
        return None


def read_manifest(path: Path) -> Manifest:
    """Read the manifest in directory `path`. Raises ArtifactError if it is not one of ours."""
    return parse_manifest((path / MANIFEST).read_bytes(), str(path / MANIFEST))


def parse_manifest(text: bytes, place: str) -> Manifest:
    """Return the manifest in `text`, which was read from `place`. Raises ArtifactError if it is not one of ours."""
    collects = gc.isenabled()
    gc.disable()  # which would look at 100,000 new records again and again
    try:
        return Manifest.model_validate_json(text)
    except ValidationError:
        pass  # for words of ours
    finally:
        if collects:
            gc.enable()
    try:
        return decode(Manifest, json.loads(text))
    except (ConfigError, ValueError) as error:
        problem = str(error).splitlines()[0]
        raise ArtifactError(f"{place}: not a manifest of this version ({problem}); make it again") from None


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Make the directory `path` an artifact: the last write of a task."""
    write_json(path / MANIFEST, encode(manifest))


def record_file(path: Path) -> FileRecord:
    """Return size and xxh128 of a file. Raises ArtifactError if it is gone."""
    try:
        return FileRecord(bytes=path.stat().st_size, xxh128=hash_file(path))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file, but the manifest lists it; make the artifact again") from None


@contextmanager
def atomic(path: Path, temporary: Path | None = None) -> Iterator[Path]:
    """Give a temporary path to write to; on success it becomes `path`, durably, in one step.

    Args:
        temporary: One that only this process uses, where several may write the same file.

    Raises:
        ArtifactError: If the disk is full.
    """
    temporary = temporary or path.with_name(path.name + ".tmp")
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
