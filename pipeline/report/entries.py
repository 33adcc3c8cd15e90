"""What the page is made of: tasks with their artifacts, and what can be read from these."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pipeline.artifact import Artifact
from pipeline.track import METRICS, read_metrics
from pipeline.training.ledger import LEDGER, Event, read_ledger


@dataclass(frozen=True)
class Entry:
    """One task of the report.

    Attributes:
        amount: How much it did, in words.
        result: The number that matters, in words.
        lengths: Of a tokens artifact, how many documents there are of each number of tokens.
        vocabulary: Of a tokens artifact, how its tokenizer fares: what `vocabulary.json` holds.
        samples: Of a samples artifact, its rows: each a prompt and its continuation.
        certificate: Of a certificate, its bounds and rows: what `certificate.json` holds.
    """

    name: str
    artifact: Artifact
    amount: str = ""
    result: str = ""
    lengths: Mapping[int, int] = field(default_factory=dict)
    vocabulary: Mapping[str, Any] = field(default_factory=dict)
    samples: Sequence[Mapping[str, Any]] = ()
    certificate: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The kind of its stage."""
        return str(self.settings.get("kind", ""))

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting of its stage."""
        return self.artifact.manifest.stage

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.artifact.manifest.made.seconds

    @property
    def fingerprint(self) -> str:
        """The fingerprint of its artifact."""
        return self.artifact.manifest.fingerprint

    @property
    def needs(self) -> dict[str, str]:
        """The fingerprint of each of its inputs."""
        return {name: record.fingerprint for name, record in self.artifact.manifest.inputs.items()}

    @cached_property
    def numbers(self) -> dict[str, float]:
        """The statistics that are finite numbers."""
        found = {name: value for name, value in self.artifact.stats.items() if is_number(value)}
        return {name: value for name, value in found.items() if math.isfinite(value)}

    @cached_property
    def metrics(self) -> list[dict[str, float]]:
        """The rows of its metrics in the order of their steps, the last where a step comes twice; none if it kept none.

        Raises:
            ArtifactError: If the file is damaged.
        """
        if METRICS not in self.artifact.manifest.files:
            return []
        rows = {row["step"]: row for row in read_metrics(self.artifact.file(METRICS))}
        return [rows[step] for step in sorted(rows)]

    @cached_property
    def events(self) -> list[Event]:
        """The steps that its training passed over, and why; none if it kept no ledger.

        Raises:
            ArtifactError: If the file is damaged.
        """
        return read_ledger(self.artifact.file(LEDGER)) if LEDGER in self.artifact.manifest.files else []


def is_number(value: Any) -> bool:
    """Return whether a value is a number, which true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_corpus(entry: Entry) -> bool:
    """Return whether a task made a corpus, and counted what it read and kept."""
    return entry.artifact.manifest.kind == "corpus" and entry.numbers.keys() >= {"documents_in", "documents"}


def in_order(entries: Sequence[Entry]) -> list[Entry]:
    """Return the tasks so that each comes after what it needs, and otherwise as they were."""
    known = {entry.fingerprint: entry for entry in entries}
    ordered: dict[str, Entry] = {}

    def place(entry: Entry) -> None:
        for fingerprint in entry.needs.values():
            if fingerprint in known and known[fingerprint].name not in ordered:
                place(known[fingerprint])
        ordered[entry.name] = entry

    for entry in entries:
        if entry.name not in ordered:
            place(entry)
    return list(ordered.values())
