"""What is known of files without reading them: proofs of their checksums, kept so that a start need not read terabytes.

`work/proven` of an artifact has a line "xxh128 bytes mtime_ns name" for every proof. A file that still has this size
and this modification time is taken to hold what it held then; any ordinary write changes the time, and the file is
read again. What changes behind the file system's back (a failing disk) only reading finds: `pipeline verify`.

Lines are appended in one write, so processes may race, and a line that was torn proves nothing. A directory that cannot
be written has no proofs, and its files are read.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash

from pipeline.errors import ArtifactError

PROVEN = "work/proven"
BLOCK_BYTES = 1 << 20
MOMENT_NS = 50_000_000  # longer than a tick of a file system's clock (4 ms, or 10), in which two writes look like one

Tick = Callable[[int], None]  # told how many bytes more were read


class Proofs:
    """The proofs of the files in a directory; read when first asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.lines: set[str] | None = None

    def hold(self, name: str, xxh128: str) -> bool:
        """Return whether a file was proven to have this checksum and was not written since; costs one stat."""
        return not self.lacking([(name, xxh128)])

    def lacking(self, files: Iterable[tuple[str, str]]) -> list[str]:
        """Return those names of (name, xxh128) that have no proof, or were written since."""
        lines = self.read() if self.lines is None else self.lines
        directory, lacking = str(self.directory), []
        for name, xxh128 in files:
            try:
                status = os.stat(f"{directory}/{name}")  # noqa: PTH116 (Path.stat takes three times as long)
            except OSError:
                lacking.append(name)
                continue
            if f"{xxh128} {status.st_size} {status.st_mtime_ns} {name}" not in lines:
                lacking.append(name)
        return lacking

    def read(self) -> set[str]:
        """Read the proofs anew: other processes may have added some."""
        self.lines = set()
        with suppress(OSError):
            self.lines = set((self.directory / PROVEN).read_text("utf-8", errors="replace").split("\n"))
        return self.lines

    def prove(self, name: str, path: Path, tick: Tick = lambda count: None) -> tuple[int, str]:
        """Read the file in `path`, which is or will be called `name`; remember and return its size and xxh128.

        Raises:
            ArtifactError: If it cannot be read.
        """
        try:
            before = path.stat()
            digest = hash_file(path, tick)
            after = path.stat()
        except FileNotFoundError:
            raise ArtifactError(f"{path}: no such file, but the manifest lists it; make the artifact again") from None
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be read ({error.strerror}); see to its disk and its rights") from None
        if before.st_mtime_ns == after.st_mtime_ns < time.time_ns() - MOMENT_NS:
            self.add(name, digest, after)
        return after.st_size, digest

    def add(self, name: str, xxh128: str, status: os.stat_result) -> None:
        """Remember that a file was found to have this checksum, where the directory can be written."""
        line = f"{xxh128} {status.st_size} {status.st_mtime_ns} {name}"
        if self.lines is not None:
            if line in self.lines:
                return
            self.lines.add(line)
        path = self.directory / PROVEN
        with suppress(OSError):
            path.parent.mkdir(exist_ok=True)
            with open(path, "ab", buffering=0) as stream:
                stream.write(f"\n{line}".encode())  # the newline first: a torn line before it ends there

    def withdraw(self, name: str) -> None:
        """Forget the proofs of a file that was found to be damaged."""
        kept = {line for line in self.read() if line.split(" ", 3)[3:] != [name]}
        if kept == self.lines:
            return
        self.lines = kept
        path = self.directory / PROVEN
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        with suppress(OSError):
            temporary.write_text("\n".join(sorted(kept)), "utf-8")
            temporary.replace(path)


def hash_file(path: Path, tick: Tick = lambda count: None) -> str:
    """Return the xxh128 of a file, in hexadecimal."""
    digest, block = xxhash.xxh3_128(), bytearray(BLOCK_BYTES)
    view = memoryview(block)
    with open(path, "rb", buffering=0) as stream:
        while count := stream.readinto(block):
            digest.update(view[:count])
            tick(count)
    return digest.hexdigest()


def settle(path: Path) -> None:
    """Put the modification time of a file just written back by a moment, so that a write, however soon, shows."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - 2 * MOMENT_NS))


@contextmanager
def alone(path: Path) -> Iterator[bool]:
    """Hold the lock file `path`, so that one process works while the others wait for what it makes.

    Gives false where there can be no lock (a read-only directory, a file system without): work is done twice there.
    """
    descriptor, held = None, False
    with suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        held = True
    try:
        yield held
    finally:
        if descriptor is not None:
            os.close(descriptor)
