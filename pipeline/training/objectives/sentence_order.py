"""Sentence-order prediction: whether two segments are in their order, beside masked language modelling."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pipeline.training.objectives.objective import Row, SpecialIds
from pipeline.training.objectives.pairs import Pairs

if TYPE_CHECKING:
    from pipeline.training.objectives.objective import Example


class SentenceOrder(Pairs):
    """ALBERT's training (Lan et al. 2020): two neighbouring segments, half of the time with the second one first.

    Class 0 is their order and 1 the other.
    """

    term_names: ClassVar[dict[str, str]] = {"tokens": "masked", "sentence": "sentence_order"}

    kind: Literal["sentence_order"] = "sentence_order"

    def make(self, row: Row, seed: int, seq_len: int, ids: SpecialIds, partner: Row | None = None) -> Example:
        """Return ids, labels, documents, token_types and sentence."""
        from pipeline.training.objectives.draws import Draws
        from pipeline.training.objectives.pairs import cut
        from pipeline.training.objectives.pieces import longest_text

        draws = Draws(seed)
        first, second = cut(longest_text(row, ids.end_of_text), draws)
        swapped = draws.chance(0.5)
        if swapped and second is not None:
            first, second = second, first
        return self._assemble(first, second, int(swapped), draws, seq_len, ids)
