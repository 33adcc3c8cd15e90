"""A corpus without exact duplicates."""

from typing import Annotated, Any, ClassVar, Literal

from pipeline.settings import Input
from pipeline.stage import Context, Stats
from pipeline.text.arrow import Reject, read_corpus
from pipeline.text.corpus import CorpusStage, CorpusWriter, check_books, part_label


class Dedup(CorpusStage):
    """Keeps the first of the documents that have one text; the others are dropped as `duplicate` of its id.

    Texts are compared by 128-bit hashes. One process does it all: it keeps 16 bytes a document in memory, about 50
    while it sorts them (5 GB for 100 million documents), and about 200 for each that is dropped.
    """

    version: ClassVar[int] = 1

    kind: Literal["dedup"] = "dedup"
    corpus: Annotated[str, Input("corpus")]

    def run(self, ctx: Context) -> None:
        """Hash all texts, find the repeats, and copy the rest part by part."""
        import numpy as np

        from pipeline.text.dedup import find_duplicates, ids_at

        corpus = ctx.inputs["corpus"]
        digests = _hash_parts(ctx)
        ends = np.cumsum([len(part) for part in digests]).tolist()
        repeats, firsts = find_duplicates(np.concatenate(digests))
        originals = ids_at(map(corpus.file, corpus.parts()), set(firsts.tolist()))
        starts = dict(zip(corpus.parts(), [0, *ends], strict=False))
        first_of = dict(zip(repeats.tolist(), firsts.tolist(), strict=True))
        for unit in ctx.units(corpus.parts(), "parts"):
            with CorpusWriter(unit, part_label(unit.name)) as out:
                for place, document in enumerate(read_corpus(corpus.file(unit.name)), start=starts[unit.name]):
                    unit.stats["documents_in"] += 1
                    if place in first_of:
                        out.drop(Reject(document.id, "duplicate", originals[first_of[place]]))
                    else:
                        out.keep(document)

    def finish(self, ctx: Context, stats: Stats) -> Stats:
        """Check that the books balance."""
        check_books(ctx, stats, ctx.inputs["corpus"].stats["documents"])
        return stats


def _hash_parts(ctx: Context) -> list[Any]:
    """Return the hashes of the texts of each part."""
    from pipeline.text.dedup import digest

    corpus = ctx.inputs["corpus"]
    progress = ctx.progress(len(corpus.parts()), "parts hashed")
    digests = []
    for name in corpus.parts():
        digests.append(digest(document.text for document in read_corpus(corpus.file(name))))
        progress.advance()
    progress.close()
    return digests
