"""Saves a training while it goes on, and finds where it was: the newest checkpoint that is whole.

What is saved changes only when the weights are updated. So it is copied in the background during the next forward and
backward pass, and the loop waits, if at all, just before the update; then the copy is written while training goes on.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from pipeline.artifact import fsync
from pipeline.errors import ArtifactError, TrainingError
from pipeline.parallel.mesh import Mesh
from pipeline.parallel.partitions import flat_partitions
from pipeline.stage import Checkpoints
from pipeline.training.checkpoints.background import Destination, Writing
from pipeline.training.checkpoints.format import (
    DAMAGED,
    UNFINISHED,
    Index,
    Ranks,
    complete_checkpoints,
    read_index,
    step_directory,
)
from pipeline.training.checkpoints.holdings import Holding, buffers, frozen, learned, scalars, scaler_numbers
from pipeline.training.checkpoints.restore import damaged_files, load
from pipeline.training.checkpoints.retention import Summary, checkpoint_bytes, most_at_once, superseded
from pipeline.training.checkpoints.write import Snapshot

WAIT_S = 1.0  # between two looks at the other ranks, while the loop waits for the disk


@dataclass(frozen=True)
class Restored:
    """Where a training goes on: after which step, with which notes of the loop, and how it was spread then."""

    step: int
    notes: dict[str, Any]
    ranks: Ranks


class Saver:
    """The checkpoints of one training.

    Every rank makes one, and calls `restore`, `due`, `save` and `finish` at the same places. At most one checkpoint is
    on its way; what goes wrong with it shows in `failed`, which the loop asks of all ranks, to call `raise_failure`.
    """

    def __init__(
        self,
        engine: Any,
        directory: Path,
        mesh: Mesh,
        zero: int,
        settings: Checkpoints,
        steps: int,
        attempt: str = "0",
        fence: Callable[[], None] = lambda: None,
        extras: Mapping[str, Path | bytes] | None = None,
        about: Mapping[str, Any] | None = None,
        log: Callable[[str], None] = lambda message: None,
        beat: Callable[[], None] = lambda: None,
        took: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """Prepare to save into `directory`.

        Args:
            steps: The last step of the training.
            attempt: Of this run of the task, the same on all ranks and another than that of any run before.
            fence: Called by rank 0 before a checkpoint appears or goes; raises if this attempt has been replaced.
            extras: Files that go into every checkpoint, by name: what makes a model of it.
            about: What an input made of a checkpoint has to know: "precision", "end_of_text_id".
            log: Told of damaged checkpoints, on rank 0.
            beat: Called now and then while this rank waits for the disk.
            took: Told on rank 0, in the background, for how many seconds each checkpoint was on its way.
        """
        self._engine, self._directory, self._mesh, self._zero = engine, directory, mesh, zero
        self._settings, self._steps, self._about = settings, steps, dict(about or {})
        self._destination = Destination(directory, attempt, dict(extras or {}), fence)
        self._log, self._beat, self._took = log, beat, took
        self._layouts, self._snapshot = flat_partitions(engine), Snapshot()
        self._writing: Writing | None = None
        self._summaries: dict[int, Summary] = {}  # of the complete ones, on rank 0
        self._newest, self._begun_at, self._stall_s = 0, time.monotonic(), 0.0

    @property
    def ranks(self) -> Ranks:
        """How the training is spread."""
        return Ranks(data=self._mesh.data, tensor=self._mesh.tensor, zero=self._zero)

    @property
    def newest(self) -> int:
        """The step of the newest checkpoint that was restored or saved, 0 where there is none."""
        return self._newest

    @property
    def failed(self) -> bool:
        """Whether this rank could not write its part of a checkpoint."""
        return self._writing is not None and self._writing.error is not None

    @property
    def stall_s(self) -> float:
        """Seconds that the loop has waited for checkpoints since this was asked last."""
        waited, self._stall_s = self._stall_s, 0.0
        return waited

    def raise_failure(self) -> None:
        """Raise why the last checkpoint could not be written, on this rank or another.

        Raises:
            ArtifactError: If the disk did not take it.
            TrainingError: If a number in it is not finite.
        """
        assert self._writing is not None
        raise self._writing.reason()

    def due(self, step: int, now: float) -> bool:
        """Return whether a checkpoint is to be saved after a step; the same on every rank.

        Args:
            now: From `time.monotonic`; that of rank 0 counts.
        """
        if step % self._settings.every_steps == 0:
            return True
        if self._settings.every_minutes is None:
            return False
        idle = self._writing is None or self._writing.wait(0)
        late = now - self._begun_at >= 60 * self._settings.every_minutes
        return self._mesh.sum_all([float(self._mesh.rank == 0 and idle and late)], self._engine.device)[0] > 0

    def save(self, step: int, notes: Mapping[str, Any], validation_loss: float | None = None) -> None:
        """Begin to save the state after `step`; before the weights change again `before_update` is to be called.

        Args:
            notes: What the loop wants back, as plain data; of rank 0.
        """
        if step == self._newest:
            return  # what it was restored from, or has been saved
        with self._stalling():
            while self._writing is not None and not self._writing.wait(WAIT_S):
                self._beat()
            if self.failed:
                return  # the loop will hear of it at the next step
            self._newest, self._begun_at = step, time.monotonic()
            index = Index(
                step=step,
                temporary=step % self._settings.every_steps != 0 and step != self._steps,
                validation_loss=validation_loss,
                ranks=Ranks(data=self._mesh.data, tensor=self._mesh.tensor, zero=self._zero),
                notes=dict(notes),
                about=self._about,
                scaler=scaler_numbers(self._engine),
                scalars=scalars(self._engine, self._layouts),
                files={},
                tensors={},
            )
            held = [_copied(buffer) for buffer in buffers(self._engine.module, self._mesh)]
            self._writing = Writing(
                self._destination, index, self._mesh.rank, self._snapshot, lambda: self._holdings(held), self._keep
            )

    def before_update(self) -> None:
        """Wait until what is being saved is copied: to be called before anything changes the weights."""
        if self._writing is not None and not self._writing.copied.is_set():
            with self._stalling():
                self._writing.copied.wait()

    def finish(self) -> None:
        """Wait until the checkpoint on its way is complete, on every rank.

        Raises:
            ArtifactError: As `raise_failure`, on every rank.
            TrainingError: The same.
        """
        with self._stalling():
            pending = True
            while pending:
                done = self._writing is None or self._writing.wait(WAIT_S)
                self._beat()
                waiting, failed = self._mesh.sum_all([float(not done), float(self.failed)], self._engine.device)
                if failed:
                    self.raise_failure()
                pending = waiting > 0

    def restore(self) -> Restored | None:
        """Bring back the newest checkpoint that is whole, or nothing where there is none.

        Unfinished ones are removed, and damaged ones set aside under a name of their own.

        Raises:
            TrainingError: If it is of another model or optimizer.
            ArtifactError: If there is not room for all that is to be saved.
        """
        self.finish()
        if self._mesh.rank == 0:
            for unfinished in self._directory.glob(f"step-*{UNFINISHED}"):
                _remove(unfinished)
        found = self._find()
        self._newest, self._writing = found.step if found else 0, None
        if found is not None:
            if found.about.get("optimizer") != self._about.get("optimizer"):
                raise TrainingError(
                    f"{step_directory(self._directory, found.step)}: wanted the state of '{self._about['optimizer']}', "
                    f"found that of '{found.about.get('optimizer')}'; move it away"
                )
            load(self._engine, self._layouts, self._mesh, step_directory(self._directory, found.step), found)
        if self._mesh.rank == 0:
            self._summaries = dict(self._summarize())
        return None if found is None else Restored(found.step, found.notes, found.ranks)

    def check_space(self, params: int, state_copies: int) -> None:
        """Look that there is room for all checkpoints of the training; to be called once, after `restore`.

        Args:
            params: Parameters of the whole model.
            state_copies: Numbers that optimizer and average keep for each.

        Raises:
            ArtifactError: If there is not.
        """
        one = checkpoint_bytes(params, state_copies)
        at_once = most_at_once(self._settings, self._steps)
        lacking = 0.0
        if self._mesh.rank == 0:
            self._directory.mkdir(parents=True, exist_ok=True)
            wanted = one * max(at_once - len(self._summaries), 1)
            lacking = max(wanted - shutil.disk_usage(self._directory).free, 0)
        (lacking,) = self._mesh.sum_all([lacking], self._engine.device)
        if lacking:
            raise ArtifactError(
                f"{self._directory}: {at_once} checkpoints of {one / 1e6:,.3f} MB are there at once, for which "
                f"{lacking / 1e6:,.3f} MB more have to be free; make room, or keep fewer with run.checkpoints"
            )

    def _find(self) -> Index | None:
        """Return the index of the newest checkpoint that is whole; set aside those that are not."""
        while True:
            newest = 0
            if self._mesh.rank == 0:
                newest = next((int(path.name[5:]) for path in complete_checkpoints(self._directory)), 0)
            (agreed,) = self._mesh.sum_all([newest], self._engine.device)  # Note: of rank 0; others add 0
            if not agreed:
                return None
            path = step_directory(self._directory, int(agreed))
            index, problem = None, ""
            try:
                index = read_index(path)
            except ArtifactError as error:
                problem = str(error)
            (unread,) = self._mesh.sum_all([float(index is None)], self._engine.device)
            if index is not None and index.step != int(agreed):
                problem = f"it is of step {index.step}"
            elif index is not None and not unread:
                damaged = damaged_files(path, index, self._mesh, self._engine.device, lambda count: self._beat())
                if not damaged:
                    return index
                problem = f"{damaged[0]} is not as it was written"
            if self._mesh.rank == 0:
                self._set_aside(path, problem)

    def _set_aside(self, checkpoint: Path, problem: str) -> None:
        aside = checkpoint.with_name(checkpoint.name + DAMAGED)
        _remove(aside)
        checkpoint.rename(aside)
        fsync(aside.parent)
        self._log(f"checkpoint {checkpoint.name} is damaged ({problem}); it is now {aside.name}, and not used")

    def _summarize(self) -> Iterator[tuple[int, Summary]]:
        """Yield what each complete checkpoint is judged by."""
        for path in complete_checkpoints(self._directory):
            try:
                index = read_index(path)
            except ArtifactError as error:
                self._set_aside(path, str(error))
            else:
                yield index.step, Summary(index.temporary, index.validation_loss)

    def _holdings(self, held: list[Holding]) -> Iterable[Holding]:
        return chain(learned(self._engine, self._layouts, self._mesh), frozen(self._engine, self._mesh), held)

    def _keep(self, index: Index) -> None:
        """Remove the checkpoints that a new one supersedes."""
        self._took(time.monotonic() - self._begun_at)
        self._summaries[index.step] = Summary(index.temporary, index.validation_loss)
        for step in superseded(self._summaries, self._settings):
            self._destination.fence()
            path = step_directory(self._directory, step)
            unwanted = path.with_name(path.name + UNFINISHED)
            with suppress(FileNotFoundError):  # somebody else has removed it
                path.rename(unwanted)  # so that a kill in the middle leaves none that looks whole
                shutil.rmtree(unwanted)
            del self._summaries[step]

    @contextmanager
    def _stalling(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self._stall_s += time.monotonic() - began


def _copied(holding: Holding) -> Holding:
    return replace(holding, states={state: numbers.clone() for state, numbers in holding.states.items()})


def _remove(path: Path) -> None:
    """Remove a directory, or whatever else has its name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
