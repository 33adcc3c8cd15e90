"""Causal language modelling: every token is predicted from those before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pipeline.training.objectives.objective import Objective, Row, SpecialIds

if TYPE_CHECKING:
    from pipeline.text.loader import Rows
    from pipeline.training.objectives.objective import Example


class Causal(Objective):
    """Every token is predicted from those before it in its document (Radford et al. 2018)."""

    families: ClassVar[frozenset[str]] = frozenset({"decoder"})
    term_names: ClassVar[dict[str, str]] = {"tokens": "next_token"}

    kind: Literal["causal"] = "causal"

    def make(self, row: Row, seed: int, seq_len: int, ids: SpecialIds, partner: Row | None = None) -> Example:
        """Return the row as it is."""
        return {"ids": row.inputs, "labels": row.tokens, "documents": row.documents}

    def make_many(
        self, rows: Rows, seeds: Sequence[int], seq_len: int, ids: SpecialIds, partners: Rows | None = None
    ) -> Example:
        """Return the rows as they are; without documents if the rows have none."""
        example: Example = {"ids": rows.inputs, "labels": rows.labels}
        return example if rows.documents is None else {**example, "documents": rows.documents}
