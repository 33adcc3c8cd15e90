"""Raw text of any form as a corpus: Arrow parts of about one size, with unique ids."""

import itertools
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pipeline.errors import ArtifactError
from pipeline.settings import Settings, Source
from pipeline.stage import Context, Run, Stats, Unit
from pipeline.text.arrow import Document, read_ids, read_rejects
from pipeline.text.corpus import SKIPPED, CorpusStage, CorpusWriter, check_books
from pipeline.text.lines import COMPRESSED, COMPRESSION, Span, runs
from pipeline.text.readers import AnyReader, Auto
from pipeline.text.rows import as_text, describe_problem
from pipeline.text.sources import list_files

Work = tuple[int, list[Span]]  # number of the source, and what to read of it
WAYS_OUT = {
    "no_text": "; choose {}.text_field",
    "no_id": "; choose {}.id_field",
    "bad_json": "; a file that is one JSON array is read by {}.kind: datasets with builder: json",
}


class TextSource(Settings):
    """Raw text to read.

    Attributes:
        path: A file, a directory (with all below it) or a glob.
        reader: How to read it.
    """

    path: Annotated[str, Source()]
    reader: AnyReader = Auto()


class Shard(CorpusStage):
    """Reads raw text of any form into a corpus. Rows that cannot be used become rejects with a reason.

    Attributes:
        sources: What to read, in the order of the corpus.
        part_bytes: UTF-8 text of a part, about.
    """

    version: ClassVar[int] = 1
    ranks: ClassVar[Literal["one", "units", "group"]] = "units"

    kind: Literal["shard"] = "shard"
    sources: list[TextSource] = Field(min_length=1)
    part_bytes: int = Field(default=64 << 20, ge=1, le=512 << 20)

    def disk_bytes(self, input_bytes: int, run: Run) -> int:
        """Return the size of the raw text, where it is compressed by a guess."""
        files = [file for source in self.sources for _, file in list_files(source.path)]
        packed = (*COMPRESSED, ".parquet")
        return sum(file.stat().st_size * (COMPRESSION if file.suffix in packed else 1) for file in files)

    def run(self, ctx: Context) -> None:
        """Read this rank's units, each into its own parts."""
        work = self._work()
        for unit in ctx.units(list(work), "units"):
            self._read(unit, *work[unit.name])

    def finish(self, ctx: Context, stats: Stats) -> Stats:
        """Check that every source gave documents, that the books balance and that ids are unique."""
        for number in range(len(self.sources)):
            if not stats.get(f"sources.{number}.documents"):
                raise ArtifactError(f"{ctx.task}.{self._why_nothing(ctx, stats, number)}")
        check_books(ctx, stats)
        _check_unique_ids(ctx)
        return stats

    def _work(self) -> dict[str, Work]:
        """Return all units by name, in the order of the corpus: runs of spans of about `UNIT_BYTES`."""
        units: list[Work] = []
        taken: set[str] = set()
        for number, source in enumerate(self.sources):
            spans = source.reader.spans(source.path)
            names, prefix = {span.name for span in spans}, ""
            while any(prefix + name in taken for name in names):  # two sources have files of one name
                prefix += f"{number}/"
            taken |= {prefix + name for name in names}
            spans = [replace(span, name=prefix + span.name) for span in spans]
            units += [(number, spans[start:stop]) for start, stop in runs([span.num_bytes for span in spans])]
        return {f"{place:05d}": unit for place, unit in enumerate(units)}

    def _read(self, unit: Unit, number: int, spans: list[Span]) -> None:
        reader, source = self.sources[number].reader, f"sources.{number}"
        with CorpusWriter(unit, unit.name, self.part_bytes) as corpus:
            for outcome in itertools.chain.from_iterable(map(reader.read, spans)):
                unit.stats["documents_in"] += 1
                unit.stats[f"{source}.rows"] += 1
                if outcome is None:
                    unit.stats[f"{SKIPPED}where"] += 1
                    unit.stats[f"{source}.skipped"] += 1
                elif isinstance(outcome, Document):
                    unit.stats[f"{source}.documents"] += 1
                    corpus.keep(outcome)
                else:
                    corpus.drop(outcome)

    def _why_nothing(self, ctx: Context, stats: Stats, number: int) -> str:
        """Say why a source gave no document: the first problem, and the way out."""
        source, place = self.sources[number], f"sources.{number}"
        rows, skipped = stats.get(f"{place}.rows", 0), stats.get(f"{place}.skipped", 0)
        units = {name: spans for name, (of, spans) in self._work().items() if of == number}
        if not rows:
            return f"{place}.path: {source.path}: there is no text in it; looked into {_count_files(units)}"
        none_of = f"none of the {rows:,} rows of {source.path}"
        if rows == skipped:
            return f"{place}.reader.where: {none_of} is wanted; {self._first_row(number, units)}"
        notes = [ctx.directory / f"rejects-{name}.arrow" for name in units]
        reject = next(read_rejects(next(note for note in notes if note.exists())))
        way_out = WAYS_OUT.get(reject.reason, "").format(f"{place}.reader")
        problem = f"{reject.reason} at {reject.id}: {reject.detail}{way_out}"
        return f"{place}: {none_of} can be used; the first problem is {problem}"

    def _first_row(self, number: int, units: dict[str, list[Span]]) -> str:
        """Say what the first row has where `where` wants something else."""
        reader = self.sources[number].reader
        rows = (reader.first_row(span) for spans in units.values() for span in spans)
        row = next((row for row in rows if row is not None), {})
        wanted: dict[str, str] = getattr(reader, "where", {})
        for name, value in wanted.items():
            if name not in row:
                return describe_problem(name, row)
            if as_text(row[name]) != value:
                return f"wanted {name} = '{value}', but the first row has {name} = '{as_text(row[name])}'"
        return "the first row is"


def _count_files(units: dict[str, list[Span]]) -> str:
    files = {span.path for spans in units.values() for span in spans}
    return f"{len(files)} file{'' if len(files) == 1 else 's'}"


def _check_unique_ids(ctx: Context) -> None:
    """Raise ArtifactError with an id that two documents have. Takes 16 bytes a document, 50 while sorting."""
    import numpy as np

    from pipeline.text.dedup import digest, find_duplicates, ids_at

    names = sorted(name for name in ctx.output.files if name.startswith("part-"))
    paths = [ctx.directory / name for name in names]
    digests = [digest(read_ids(path)) for path in paths]
    repeats, firsts = find_duplicates(np.concatenate(digests))
    if not len(repeats):
        return
    first, again = int(firsts[0]), int(repeats[0])
    identity = ids_at(paths, {first})[first]
    ends = np.cumsum([len(part) for part in digests])
    parts = [names[number] for number in np.searchsorted(ends, [first, again], side="right")]
    raise ArtifactError(
        f"sources: {len(repeats):,} ids are there more than once; the first is '{identity}', in {parts[0]} and "
        f"{parts[1]}; choose an id_field that is unique, or null to name documents by their file and place"
    )
