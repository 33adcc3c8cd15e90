"""The report: one page and one file of numbers that say what the tasks of a job did."""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from pipeline.artifact import Artifact, write_json
from pipeline.settings import Input
from pipeline.stage import Context, Run, Stage, Stats, TaskName
from pipeline.text.corpus import HELD

PAGE = "index.html"


class Report(Stage):
    """Draws one self-contained page, `index.html`, and gathers every number in `metrics.json`.

    Attributes:
        tasks: The artifacts to report on, by the name that each has in the report.
        title: Heading of the page.
    """

    version: ClassVar[int] = 2
    produces: ClassVar[str] = "report"
    result: ClassVar[str | None] = PAGE

    kind: Literal["report"] = "report"
    tasks: Annotated[dict[TaskName, str], Input(), Field(min_length=1)]
    title: str = "Pretraining report"

    def disk_bytes(self, input_bytes: int, run: Run) -> int:
        """A page of some hundred kilobytes."""
        return 4 << 20

    @classmethod
    def headline(cls, stats: Stats) -> tuple[str, str]:
        """Return the number of tasks, and the size of the page."""
        return f"{stats['tasks']} tasks", f"{PAGE} {stats['page_bytes'] / 1000:.0f} kB"

    def run(self, ctx: Context) -> None:
        """Read the manifests, metrics, lengths and samples of all inputs, and write both files."""
        from pipeline.report.entries import Entry
        from pipeline.report.page import render
        from pipeline.stages import headline

        artifacts = {name.removeprefix("tasks."): artifact for name, artifact in ctx.inputs.items()}
        entries = []
        for name, artifact in artifacts.items():
            amount, result = headline(artifact.manifest)
            drawn = (_lengths(artifact), _vocabulary(artifact), _samples(artifact), _certificate(artifact))
            entries.append(Entry(name, artifact, amount, result, *drawn))
        page = render(self.title, entries).encode()
        with ctx.output.write(PAGE) as path:
            path.write_bytes(page)
        with ctx.output.write("metrics.json") as path:
            write_json(path, {f"{entry.name}.{name}": n for entry in entries for name, n in entry.numbers.items()})
        ctx.output.stats |= {"tasks": len(entries), "page_bytes": len(page)}


def _lengths(artifact: Artifact) -> Mapping[int, int]:
    """Return how many documents of a tokens artifact there are of each number of tokens."""
    counts: Counter[int] = Counter()
    if artifact.manifest.kind != "tokens":
        return counts
    import numpy as np

    from pipeline.text.token_parts import open_tokens

    for name in (*artifact.parts(), *artifact.parts(HELD)):
        part = open_tokens(artifact.file(name))
        for batch in range(part.num_batches):
            sizes, numbers = np.unique(np.diff(part.offsets(batch)), return_counts=True)
            counts.update(dict(zip(sizes.tolist(), numbers.tolist(), strict=True)))
    return counts


def _vocabulary(artifact: Artifact) -> dict[str, Any]:
    """Return how the tokenizer of a tokens artifact fares."""
    from pipeline.stages.tokenize import VOCABULARY

    if VOCABULARY not in artifact.manifest.files:
        return {}
    found: dict[str, Any] = json.loads(artifact.file(VOCABULARY).read_text(encoding="utf-8"))
    return found


def _samples(artifact: Artifact) -> list[dict[str, Any]]:
    """Return the rows of a samples artifact."""
    from pipeline.stages.generate import SAMPLES

    if SAMPLES not in artifact.manifest.files:
        return []
    text = artifact.file(SAMPLES).read_text(encoding="utf-8")
    return [json.loads(row) for row in text.split("\n") if row]  # not splitlines, which also cuts at U+2028


def _certificate(artifact: Artifact) -> dict[str, Any]:
    """Return what a certificate says."""
    from pipeline.stages.prove import CERTIFICATE

    if CERTIFICATE not in artifact.manifest.files:
        return {}
    found: dict[str, Any] = json.loads(artifact.file(CERTIFICATE).read_text(encoding="utf-8"))
    return found
