"""Causal language modelling: every token is predicted from those before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pipeline.training.objectives.objective import IGNORED, Objective, Row, SpecialIds

if TYPE_CHECKING:
    from pipeline.text.loader import Rows
    from pipeline.training.objectives.objective import Array, Example


class Causal(Objective):
    """Every token is predicted from those before it in its document (Radford et al. 2018)."""

    families: ClassVar[frozenset[str]] = frozenset({"decoder"})
    term_names: ClassVar[dict[str, str]] = {"tokens": "next_token"}

    kind: Literal["causal"] = "causal"

    def make(self, row: Row, seed: int, seq_len: int, ids: SpecialIds, partner: Row | None = None) -> Example:
        """Return the row as it is, and where it holds nothing."""
        return {"ids": row.inputs, "labels": row.tokens, "documents": _without_gaps(row.tokens, row.documents)}

    def make_many(
        self, rows: Rows, seeds: Sequence[int], seq_len: int, ids: SpecialIds, partners: Rows | None = None
    ) -> Example:
        """Return the rows as they are; without documents if the rows have none, and no gaps."""
        documents = _without_gaps(rows.labels, rows.documents)
        example: Example = {"ids": rows.inputs, "labels": rows.labels}
        return example if documents is None else {**example, "documents": documents}


def _without_gaps(labels: Array, documents: Array | None) -> Any:
    """Return documents that are padding where there is no label; null if nobody numbers them and there is no gap."""
    import numpy as np

    from pipeline.training.objectives.pieces import mark_gaps

    if documents is not None:
        return mark_gaps(labels, documents)
    return mark_gaps(labels, np.zeros(labels.shape, np.int32)) if (labels == IGNORED).any() else None
