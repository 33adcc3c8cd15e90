"""The ledger of a run: the steps that are passed over, why, and which documents were in them.

`ledger.jsonl` in the artifact's directory, one event a line. A step that it names is passed over whenever and on
however many ranks the run goes on: its number counts, nothing is computed and no weight changes.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.artifact import atomic
from pipeline.errors import ArtifactError, ConfigError
from pipeline.settings import Settings, decode, encode

if TYPE_CHECKING:
    from pipeline.text.loader import Loader

LEDGER = "ledger.jsonl"
MAX_DOCUMENTS = 256  # pieces of documents that an event lists; `num_documents` counts all

Piece = tuple[str, str, int, int]  # source, id of the document, first token of it and the one after the last


class Event(Settings):
    """A step that must not change the weights, and what was done about it.

    Attributes:
        training: Which training of the artifact it was, where there are several; else empty.
        step: The bad step, counted from the first of its training.
        loss: Its loss; null if it was not finite. The same of `grad_norm`.
        z: Its robust z-score; null where something was not finite.
        policy: What was done: only skipped, or a checkpoint was restored too.
        rolled_back_to: The step of that checkpoint.
        skipped: The steps that are passed over because of it.
        documents: The pieces of documents that the bad step's batch was made of, as far as they are listed.
        num_documents: How many pieces there were.
    """

    training: str = ""
    step: int
    reason: str
    loss: float | None
    grad_norm: float | None
    z: float | None
    policy: Literal["skip", "rollback"]
    rolled_back_to: int | None
    skipped: list[int]
    documents: list[Piece] = []
    num_documents: int = 0


class Ledger:
    """The events of a training so far. Every rank keeps one and is told the same; only one writes the file.

    Attributes:
        events: In their order.
        skipped: Every step that is passed over.
    """

    def __init__(self, path: Path, writes: bool, training: str = "", fence: Callable[[], None] = lambda: None) -> None:
        """Read what earlier tries left.

        Args:
            writes: Whether this rank writes the file.
            training: The one that it is of, where the artifact holds several.
            fence: Called before every write; raises if this process is no longer the one to write.

        Raises:
            ArtifactError: If the file is damaged.
        """
        self._path, self._writes, self._training, self._fence = path, writes, training, fence
        self.events = [event for event in read_ledger(path) if event.training == training]
        self.skipped = {step for event in self.events for step in event.skipped}

    def check(self, known: int) -> None:
        """Look that no event was lost.

        Args:
            known: How many there were when the checkpoint was saved that is gone on from.

        Raises:
            ArtifactError: If there are fewer.
        """
        if len(self.events) < known:
            raise ArtifactError(
                f"{self._path}: wanted {known} events, which the newest checkpoint knows of, found {len(self.events)}; "
                f"bring it back from a copy, or delete {self._path.parent} and train from the beginning"
            )

    def record(self, event: Event, documents: Callable[[], Iterable[Piece]] = tuple) -> Event:
        """Add an event; when this returns on the rank that writes, it is durable.

        Args:
            documents: Gives the pieces of documents of the bad step; called on the rank that writes alone.
        """
        event = event.model_copy(update={"training": self._training})
        if self._writes:
            pieces = iter(documents())
            listed = list(islice(pieces, MAX_DOCUMENTS))
            count = len(listed) + sum(1 for _ in pieces)
            event = event.model_copy(update={"documents": listed, "num_documents": count})
            self._write([*read_ledger(self._path), event])
        self.events.append(event)
        self.skipped |= set(event.skipped)
        return event

    def _write(self, events: Iterable[Event]) -> None:
        """Replace the file, so that a kill leaves the one before or this one, and never a part of a line."""
        self._fence()
        with atomic(self._path) as temporary:
            lines = (json.dumps(encode(event), ensure_ascii=False, allow_nan=False) for event in events)
            temporary.write_text("".join(f"{line}\n" for line in lines), "utf-8")


def read_ledger(path: Path) -> list[Event]:
    """Return the events in a ledger of any number of trainings; none if it is not there.

    Raises:
        ArtifactError: If it is damaged.
    """
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return []
    except (ValueError, OSError) as error:
        raise _damage(path, error) from None
    *lines, rest = text.split("\n")  # not splitlines, which also cuts at U+2028
    if rest:
        raise _damage(path, "its end is missing")
    events = []
    for number, line in enumerate(lines, 1):
        try:
            events.append(decode(Event, json.loads(line)))
        except (ValueError, ConfigError) as error:
            problem = str(error).splitlines()[0]
            raise _damage(path, f"line {number}: {problem}") from None
    return events


def pieces(loader: "Loader", step: int) -> Iterator[Piece]:
    """Yield the pieces of documents that the labels of a step's batch are of, in the order of its samples."""
    for source, spans in loader.spans(step):
        for span in spans:
            yield source, span.id, span.begin, span.end


def _damage(path: Path, problem: object) -> ArtifactError:
    return ArtifactError(
        f"{path}: damaged ({problem}), so the steps to pass over are not known; bring it back from a copy, or delete "
        f"{path.parent} and train from the beginning"
    )
