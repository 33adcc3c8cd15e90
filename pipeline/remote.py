"""Artifacts from elsewhere, and the only door to fsspec: `s3://bucket/tokens/NAME-FINGERPRINT` as an input.

Such an artifact is a directory `<root>/cache/<fingerprint>` with its manifest and, in `origin`, its URL. A file comes
when it is asked for, and gets its name once its checksum is right; so a second run fetches nothing. Where its server is
and who asks is said by the environment, as every tool for that protocol reads it (AWS_ENDPOINT_URL_S3, AWS_PROFILE, …);
with FSSPEC_S3_ANON=true a public bucket needs no account.
"""

import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from zlib import crc32

import xxhash

from pipeline.artifact import MANIFEST, ORIGIN, WORK, Artifact, FileRecord, atomic, open_artifact, parse_manifest
from pipeline.errors import ArtifactError, ConfigError, PipelineError
from pipeline.progress import Progress
from pipeline.proof import Proofs, alone, settle

CACHE = "cache"  # in the root
RANGE_BYTES = 8 << 20
NUM_RANGES = 4  # fetched at once
TRIES = 3  # beside those that the libraries of the protocols make
FIRST_WAIT_S = 0.5  # before the second try; twice as long before each one after
NUM_LOCKS = 256

Result = TypeVar("Result")


def is_url(place: str) -> bool:
    """Return whether a place is a URL and not a path."""
    return re.match(r"[a-z][a-z0-9+.-]*://", place) is not None


def open_anywhere(place: str, root: Path, *kinds: str, where: str = "", whole: bool = True) -> Artifact:
    """Open the artifact in a directory or at a URL; `root` has the cache. The rest is as in `open_artifact`.

    Raises:
        ArtifactError: As `open_artifact`, or if it cannot be fetched.
        ConfigError: If the library for this kind of URL is not installed.
    """
    if is_url(place):
        path = _fetch_manifest(place.rstrip("/"), root / CACHE, where)
    else:
        path = Path(place).resolve() if Path(place).exists() else Path(place)
    return open_artifact(path, *kinds, where=where, whole=whole)


def fetch(url: str, target: Path, wanted: FileRecord, proofs: Proofs) -> None:
    """Bring the file at `url` to `target`, unless another process just did; it gets its name once it is proven.

    Raises:
        ArtifactError: If it cannot be fetched, or is not what the manifest says.
    """
    slot = f"fetch-{crc32(target.name.encode()) % NUM_LOCKS:03}"
    with alone(target.parent / WORK / f"{slot}.lock") as held:
        proofs.read()
        if proofs.hold(target.name, wanted.xxh128):
            return
        for left in (target.parent / WORK).glob(f"{slot}.*.tmp") if held else ():  # of a process that was killed
            left.unlink(missing_ok=True)
        temporary = _temporary(target.parent / WORK, slot)
        try:
            with atomic(target, temporary):
                _download(url, temporary, wanted)
                settle(temporary)
        finally:
            temporary.unlink(missing_ok=True)
        proofs.add(target.name, wanted.xxh128, target.stat())


def _fetch_manifest(url: str, cache: Path, where: str) -> Path:
    """Return the directory in `cache` of the artifact at `url`; only a URL without fingerprint is asked again."""
    named = re.search(r"-([0-9a-f]{16})$", url)
    if named and (cache / named[1] / MANIFEST).is_file():
        directory = cache / named[1]
    else:
        source = f"{url}/{MANIFEST}"
        text: bytes = _ask(f"{where}: {source}" if where else source, _read, source)
        manifest = parse_manifest(text, source)
        if named and named[1] != manifest.fingerprint:
            raise ArtifactError(f"{source}: is of {manifest.fingerprint}, not of what the URL is called; name it so")
        for name in (manifest.fingerprint, *manifest.files):
            if not re.fullmatch(r"[^./\\\0][^/\\\0]*", name) or name in (MANIFEST, ORIGIN, WORK):
                raise ArtifactError(f"{source}: '{name}' cannot be the name of a file; this is no manifest of ours")
        directory = cache / manifest.fingerprint
        (directory / WORK).mkdir(parents=True, exist_ok=True)
        _put(directory / MANIFEST, text)
    _put(directory / ORIGIN, f"{url}\n".encode())
    return directory


def _put(path: Path, text: bytes) -> None:
    """Write a small file that other processes may be writing too, unless it is there."""
    if not path.exists() or path.read_bytes() != text:
        with atomic(path, _temporary(path.parent, path.name)) as temporary:
            temporary.write_bytes(text)


def _temporary(directory: Path, name: str) -> Path:
    """Return a new empty file that no other process writes to."""
    descriptor, path = tempfile.mkstemp(".tmp", f"{name}.", directory)
    os.close(descriptor)
    return Path(path)


def _download(url: str, path: Path, wanted: FileRecord) -> None:
    """Write the file at `url` to `path`; raise ArtifactError if it is not what was wanted."""
    size = _ask(url, _size, url)
    if size != wanted.bytes:
        raise ArtifactError(
            f"{url}: damaged: wanted {wanted.bytes} bytes, found {size}; put the artifact there once more"
        )
    digest = xxhash.xxh3_128()
    progress = Progress(f"fetching {url}", size / 1e6, "MB")
    with open(path, "wb") as out:
        for begin in range(0, size, NUM_RANGES * RANGE_BYTES):
            for block in _ask(url, _read_ranges, url, begin, size):
                out.write(block)
                digest.update(block)
                progress.advance(len(block) / 1e6)
    progress.close()
    if digest.hexdigest() != wanted.xxh128:
        raise ArtifactError(
            f"{url}: damaged: wanted {wanted.bytes} bytes with xxh128 {wanted.xxh128}, found {digest.hexdigest()}; "
            "put the artifact there once more"
        )


def _read(url: str) -> bytes:
    files, path = _connect(url)
    text: bytes = files.cat_file(path)
    return text


def _size(url: str) -> int:
    files, path = _connect(url)
    return int(files.size(path))


def _read_ranges(url: str, begin: int, size: int) -> list[bytes]:
    """Return the next few ranges of a file of `size` bytes, fetched at once."""
    files, path = _connect(url)
    begins = range(begin, min(begin + NUM_RANGES * RANGE_BYTES, size), RANGE_BYTES)
    ends = [min(start + RANGE_BYTES, size) for start in begins]
    blocks: list[bytes] = files.cat_ranges([path] * len(ends), list(begins), ends, on_error="raise")
    if sum(map(len, blocks)) != ends[-1] - begin:
        raise OSError(f"the server sent {sum(map(len, blocks))} bytes of {ends[-1] - begin}")
    return blocks


def _connect(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, the same one at every call, and the path in it."""
    from fsspec.core import url_to_fs

    protocol = url.partition("://")[0]
    try:
        found: tuple[Any, str] = url_to_fs(url)
    except ImportError as error:
        extra = "pip install -e '.[s3]' brings it" if protocol == "s3" else "install it"
        raise ConfigError(f"{url}: its library is missing ({_in_one_line(error)}); {extra}") from None
    except ValueError:
        raise ConfigError(f"{url}: wanted s3:// or another that fsspec knows, found {protocol}://") from None
    return found


def _ask(place: str, call: Callable[..., Result], *arguments: object) -> Result:
    """Call until it works, a few times; every protocol has errors of its own, which become ours here, about `place`."""
    wait_s = FIRST_WAIT_S
    for number in range(TRIES):
        try:
            return call(*arguments)
        except PipelineError:
            raise
        except (FileNotFoundError, IsADirectoryError):
            raise ArtifactError(f"{place}: no such file, or no such bucket; wanted an artifact") from None
        except PermissionError as error:
            raise ArtifactError(f"{place}: not allowed to read it ({_in_one_line(error)})") from None
        except Exception as error:
            problem = error
        if number < TRIES - 1:
            time.sleep(wait_s)
            wait_s *= 2
    raise ArtifactError(f"{place}: cannot be fetched ({_in_one_line(problem)}, {TRIES} times); run it again to go on")


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__
