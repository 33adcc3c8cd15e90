"""A corpus, normalized and filtered."""

from typing import Annotated, ClassVar, Literal

from pipeline.settings import Input
from pipeline.stage import Context, Stats, Unit
from pipeline.text.arrow import Document, Reject, read_corpus
from pipeline.text.corpus import CorpusStage, CorpusWriter, check_books, part_label
from pipeline.text.filters import AnyFilter, Form, Length, Repetition, Verdict, normalize


class Clean(CorpusStage):
    r"""Normalizes texts and drops those that a filter does not pass.

    Attributes:
        normalization: Unicode normal form; \r\n becomes \n too. Null leaves every byte as it is.
        filters: Asked in order; the first that drops a document gives the reason.
        keep_rejected_text: Whether to keep the texts that are dropped beside their reasons.
    """

    version: ClassVar[int] = 1
    ranks: ClassVar[Literal["one", "units", "group"]] = "units"

    kind: Literal["clean"] = "clean"
    corpus: Annotated[str, Input("corpus")]
    normalization: Form | None = "NFC"
    filters: list[AnyFilter] = [Length(min_chars=20), Repetition()]
    keep_rejected_text: bool = False

    def run(self, ctx: Context) -> None:
        """Clean this rank's parts."""
        corpus = ctx.inputs["corpus"]
        for unit in ctx.units(corpus.parts(), "parts"):
            with CorpusWriter(unit, part_label(unit.name)) as out:
                for document in read_corpus(corpus.file(unit.name)):
                    self._clean(document, unit, out)

    def finish(self, ctx: Context, stats: Stats) -> Stats:
        """Check that the books balance and something is left."""
        check_books(ctx, stats, ctx.inputs["corpus"].stats["documents"], way_out="loosen the filters")
        return stats

    def _clean(self, document: Document, unit: Unit, out: CorpusWriter) -> None:
        unit.stats["documents_in"] += 1
        text = normalize(document.text, self.normalization)
        verdict: Verdict = next(filter(None, (each.check(text) for each in self.filters)), None)
        if verdict is None:
            out.keep(Document(document.id, text, document.source, document.meta))
        else:
            out.drop(Reject(document.id, *verdict, text=document.text if self.keep_rejected_text else None))
