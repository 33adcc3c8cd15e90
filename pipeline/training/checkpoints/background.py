"""One checkpoint on its way to the disk: a thread of every rank copies and writes, that of rank 0 completes it.

The threads talk to one another through files alone, since the ranks' groups belong to training.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import xxhash

from pipeline import errors
from pipeline.artifact import FileRecord, fsync, is_disk_full, write_json
from pipeline.errors import ArtifactError, PipelineError
from pipeline.settings import decode, encode
from pipeline.training.checkpoints.format import (
    INDEX,
    UNFINISHED,
    Index,
    Part,
    join_parts,
    step_directory,
    write_index,
)
from pipeline.training.checkpoints.holdings import Holding
from pipeline.training.checkpoints.write import Snapshot, write_all, write_part

POLL_S = 0.01


@dataclass(frozen=True)
class Destination:
    """Where checkpoints go.

    Attributes:
        attempt: Of this run of the task: nobody writes into what another attempt has begun.
        extras: Files that go into every checkpoint, by name.
        fence: Called before a checkpoint appears or goes; raises if this attempt has been replaced.
    """

    directory: Path
    attempt: str
    extras: Mapping[str, Path | bytes]
    fence: Callable[[], None]

    def unfinished(self, step: int) -> Path:
        """Return where the checkpoint of a step is made."""
        return step_directory(self.directory, step).with_suffix(f".{self.attempt}{UNFINISHED}")


class Writing:
    """A checkpoint on its way.

    Attributes:
        index: What is known of it from the start; without files and tensors.
        copied: Set once everything is copied, so that training may change it; or once that has failed.
        error: Why this rank failed, once it has.
    """

    def __init__(
        self,
        destination: Destination,
        index: Index,
        rank: int,
        snapshot: Snapshot,
        holdings: Callable[[], Iterable[Holding]],
        completed: Callable[[Index], None],
    ) -> None:
        """Begin.

        Args:
            holdings: Gives all that this rank holds; called in the background.
            completed: Called on rank 0, in the background, when the checkpoint is there.
        """
        self.index, self.copied = index, threading.Event()
        self.error: BaseException | None = None
        self._destination, self._rank, self._snapshot = destination, rank, snapshot
        self._holdings, self._completed = holdings, completed
        self._unfinished = destination.unfinished(index.step)
        self._thread = threading.Thread(target=self._run, name=f"checkpoint {index.step}", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Wait at most so long; return whether this rank has done all that it has to."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def reason(self) -> BaseException:
        """Return why the checkpoint failed, here or on another rank."""
        if self.error is not None:
            return self.error
        for rank in range(self.index.ranks.world):
            if (error := self._read_failure(rank)) is not None:
                return error
        return ArtifactError(f"{self._unfinished}: could not be written by another rank, whose log says why")

    def _run(self) -> None:
        try:
            self._snapshot.begin()
            with ThreadPoolExecutor(1) as pool:  # what is copied already is written meanwhile
                copying = pool.submit(self._copy)
                self._unfinished.mkdir(parents=True, exist_ok=True)
                part = write_part(self._unfinished, self._snapshot, self._rank, self.index.ranks.world)
            copying.result()
            write_json(self._unfinished / f"rank-{self._rank:05d}.json", encode(part))
            if self._rank == 0:
                self._completed(self._complete())
        except BaseException as error:
            reason = self._in_our_words(error)
            self._leave_failure(reason)
            self.error = reason  # only now: as soon as it is set all ranks look for what was left

    def _copy(self) -> None:
        try:
            self._snapshot.take(self._holdings())
        finally:
            self.copied.set()

    def _complete(self) -> Index:
        """Wait for the other ranks, write the index and give the checkpoint its name."""
        parts = [self._wait_for(rank) for rank in range(self.index.ranks.world)]
        files, tensors = join_parts(parts)
        for name, content in self._destination.extras.items():
            files[name] = _write_extra(self._unfinished / name, content)
        index = self.index.model_copy(update={"files": files, "tensors": tensors})
        write_index(self._unfinished, index)
        for path in self._unfinished.glob("rank-*"):
            path.unlink()
        fsync(self._unfinished)
        self._destination.fence()
        final = step_directory(self._destination.directory, index.step)
        if (final / INDEX).is_file():  # by an attempt that this one replaced, in its last moment: of the same step
            shutil.rmtree(self._unfinished)
        else:
            self._unfinished.rename(final)
        fsync(final.parent)
        return index

    def _wait_for(self, rank: int) -> Part:
        path = self._unfinished / f"rank-{rank:05d}.json"
        while True:
            try:
                return decode(Part, json.loads(path.read_text("utf-8")))
            except FileNotFoundError:
                pass
            if (error := self._read_failure(rank)) is not None:
                raise error
            if not self._unfinished.is_dir():
                raise ArtifactError(f"{self._unfinished}: was removed while it was written; is another run at work?")
            time.sleep(POLL_S)

    def _in_our_words(self, error: BaseException) -> BaseException:
        if not isinstance(error, OSError):
            return error
        directory = self._destination.directory
        if is_disk_full(error):
            free = shutil.disk_usage(directory).free / 1e6
            return ArtifactError(
                f"{self._unfinished}: the disk is full, with {free:,.1f} MB free; make room and run the same command "
                "again"
            )
        return ArtifactError(f"{self._unfinished}: could not be written ({error}); see to {directory} and run it again")

    def _leave_failure(self, error: BaseException) -> None:
        """Tell the other ranks, if the disk still takes anything."""
        message = str(error) if isinstance(error, PipelineError) else f"rank {self._rank}: {error!r}"
        data = {"class": type(error).__name__, "message": message}
        try:
            write_json(self._unfinished / f"failure-{self._rank:05d}.json", data)
        except (OSError, PipelineError):
            return

    def _read_failure(self, rank: int) -> PipelineError | None:
        try:
            data = json.loads((self._unfinished / f"failure-{rank:05d}.json").read_text("utf-8"))
        except (OSError, ValueError):
            return None
        kind: type[PipelineError] = getattr(errors, data["class"], PipelineError)
        return kind(data["message"])


def _write_extra(path: Path, content: Path | bytes) -> FileRecord:
    data = content.read_bytes() if isinstance(content, Path) else content
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        write_all(descriptor, memoryview(data))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return FileRecord(bytes=len(data), xxh128=xxhash.xxh3_128_hexdigest(data))
