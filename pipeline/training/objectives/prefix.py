"""Prefix language modelling: the beginning of each document is given, the rest predicted."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pipeline.training.objectives.objective import IGNORED, Objective, Row, SpecialIds

if TYPE_CHECKING:
    from pipeline.training.objectives.objective import Example


class Prefix(Objective):
    """The beginning of each document is seen as a whole, the rest predicted (Liu et al. 2018; Raffel et al. 2020).

    Each document of a row, or its piece, is split at a place of its own, each place equally likely; a row whose
    documents may see one another is split once. What the prefix holds has no loss, so the first token behind it is the
    first with one: it is predicted at the prefix's last position. At least one token of a document has a loss.
    """

    families: ClassVar[frozenset[str]] = frozenset({"decoder"})
    term_names: ClassVar[dict[str, str]] = {"tokens": "continuation"}

    kind: Literal["prefix"] = "prefix"

    def make(self, row: Row, seed: int, seq_len: int, ids: SpecialIds, partner: Row | None = None) -> Example:
        """Return ids, labels, documents and `prefix`, true at positions that all of their document sees."""
        import numpy as np

        from pipeline.training.objectives.draws import Draws
        from pipeline.training.objectives.pieces import find_pieces, mark_gaps

        labels, prefix, pieces = row.tokens.copy(), np.zeros(len(row.tokens), np.bool_), find_pieces(row)
        for (start, stop), share in zip(pieces, Draws(seed).uniform(len(pieces)).tolist(), strict=True):
            size = 1 + int(share * (stop - start))
            prefix[start : start + size] = True
            labels[start : start + size - 1] = IGNORED
        documents = mark_gaps(row.tokens, row.documents)
        return {"ids": row.inputs, "labels": labels, "documents": documents, "prefix": prefix}
