"""Corpora as stages write them: parts and rejects of one unit of work, and books that must balance."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from types import TracebackType
from typing import ClassVar, Self

from pipeline.artifact import Artifact
from pipeline.errors import ArtifactError
from pipeline.stage import Context, Output, Stage, Stats
from pipeline.text.arrow import CORPUS, REJECTS, Document, Reject, RowWriter

DROPPED, SKIPPED = "dropped.", "skipped."
MAX_DETAIL_CHARS = 300
HELD = "held-"  # begins the names of the parts of tokens that are held out of training


class CorpusWriter:
    """Writes the documents and rejects of one unit and counts them.

    Files appear once there is something to put into them: `part-<name>.arrow`, or with `part_bytes`
    `part-<name>-00000.arrow` and so on, each closed once it holds that much text; and `rejects-<name>.arrow`.
    """

    def __init__(self, output: Output, name: str, part_bytes: int | None = None) -> None:
        self._output, self._name, self._part_bytes = output, name, part_bytes
        self._part, self._rejects = _Part(), _Part()
        self._num_parts = 0

    def keep(self, document: Document) -> None:
        """Write a document."""
        num_bytes = len(document.text.encode())
        if self._part.writer is None:
            number = "" if self._part_bytes is None else f"-{self._num_parts:05d}"
            self._part.open(self._output, f"part-{self._name}{number}.arrow", CORPUS)
            self._num_parts += 1
        self._part.add((document.id, document.text, document.source, document.meta), num_bytes)
        self._output.stats["documents"] += 1
        self._output.stats["bytes"] += num_bytes
        if self._part_bytes is not None and self._part.num_bytes >= self._part_bytes:
            self._part.close()

    def drop(self, reject: Reject) -> None:
        """Write a reject."""
        if self._rejects.writer is None:
            self._rejects.open(self._output, f"rejects-{self._name}.arrow", REJECTS)
        detail = reject.detail[:MAX_DETAIL_CHARS].encode("utf-8", "backslashreplace").decode()
        self._rejects.add((reject.id, reject.reason, detail, reject.text), len(reject.text or ""))
        self._output.stats[DROPPED + reject.reason] += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for part in (self._part, self._rejects):
            part.files.__exit__(kind, error, at)


class _Part:
    """A file that is being written, or none yet."""

    def __init__(self) -> None:
        self.files = ExitStack()
        self.writer: RowWriter | None = None
        self.num_bytes = 0

    def open(self, output: Output, name: str, columns: dict[str, str]) -> None:
        path = self.files.enter_context(output.write(name))
        self.writer = self.files.enter_context(closing(RowWriter(path, columns)))
        self.num_bytes = 0

    def add(self, row: Sequence[str | None], num_bytes: int) -> None:
        assert self.writer is not None
        self.writer.add(row, num_bytes)
        self.num_bytes += num_bytes

    def close(self) -> None:
        self.writer = None
        self.files.close()


def part_label(name: str) -> str:
    """Return what tells a corpus part from its siblings: "00000-00001" of "part-00000-00001.arrow"."""
    return name.removeprefix("part-").removesuffix(".arrow")


def num_dropped(stats: Stats) -> int:
    """Return how many documents were dropped, for whatever reason."""
    return sum(count for name, count in stats.items() if name.startswith(DROPPED))


def check_books(ctx: Context, stats: Stats, documents_in: int | None = None, way_out: str = "read more text") -> None:
    """Check that every document that went in came out or was dropped for a reason.

    Args:
        documents_in: How many the input has, where that is known.
        way_out: What a person can do if nothing is left.

    Raises:
        ArtifactError: If one is missing, or none came out.
    """
    read, kept, dropped = stats.get("documents_in", 0), stats.get("documents", 0), num_dropped(stats)
    skipped = sum(count for name, count in stats.items() if name.startswith(SKIPPED))
    if read != kept + dropped + skipped or documents_in not in (None, read):
        raise ArtifactError(
            f"{ctx.directory}: the books do not balance: {read if documents_in is None else documents_in} documents "
            f"were to be read, {read} were, {kept} came out, {dropped} were dropped and {skipped} skipped; delete this "
            "directory and run again"
        )
    if not kept:
        raise ArtifactError(
            f"{ctx.task}: nothing is left of {read:,} documents; dropped: {describe_counts(stats, DROPPED)}; {way_out}"
        )


def describe_counts(stats: Stats, prefix: str) -> str:
    """Return "reason: how many, …" of what was dropped or skipped, the most frequent first."""
    counts = {name.removeprefix(prefix): count for name, count in stats.items() if name.startswith(prefix)}
    most_first = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{reason}: {count:,}" for reason, count in most_first)


class CorpusStage(Stage):
    """A stage that makes a corpus."""

    produces: ClassVar[str] = "corpus"

    @classmethod
    def headline(cls, stats: Stats) -> tuple[str, str]:
        """Return how many documents there are and how many were dropped."""
        return f"{stats['documents']:,} documents", f"{num_dropped(stats):,} dropped"

    @classmethod
    def show(cls, artifact: Artifact) -> Iterator[str]:
        """Yield what was left out, if anything was."""
        if dropped := describe_counts(artifact.stats, DROPPED):
            yield f"dropped: {dropped} (each document and its reason: {artifact.path}/rejects-*.arrow)"
        if skipped := describe_counts(artifact.stats, SKIPPED):
            yield f"skipped: {skipped}"
