"""Next-sentence prediction: whether a segment follows another, beside masked language modelling."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pipeline.training.objectives.objective import IGNORED, Row, SpecialIds
from pipeline.training.objectives.pairs import Pairs

if TYPE_CHECKING:
    from pipeline.training.objectives.objective import Example


class NextSentence(Pairs):
    """BERT's training (Devlin et al. 2019): half of the time B is what follows A, else another text of the source.

    Class 0 is the true neighbour and 1 another text, as in BERT. A B from elsewhere begins at a random place of the
    longest piece there. In both cases B is cut to the shorter of the two, so that no length tells the class.
    """

    term_names: ClassVar[dict[str, str]] = {"tokens": "masked", "sentence": "next_sentence"}
    partner: ClassVar[bool] = True

    kind: Literal["next_sentence"] = "next_sentence"

    def make(self, row: Row, seed: int, seq_len: int, ids: SpecialIds, partner: Row | None = None) -> Example:
        """Return ids, labels, documents, token_types and sentence."""
        from pipeline.training.objectives.draws import Draws
        from pipeline.training.objectives.pairs import cut
        from pipeline.training.objectives.pieces import longest_text

        assert partner is not None
        draws = Draws(seed)
        first, second = cut(longest_text(row, ids.end_of_text), draws)
        other = longest_text(partner, ids.end_of_text)
        if second is None or not len(other):
            return self._assemble(first, second, IGNORED, draws, seq_len, ids)
        size = min(len(second), len(other))
        start, elsewhere = draws.one_below(len(other) - size + 1), draws.chance(0.5)
        second = other[start : start + size] if elsewhere else second[:size]
        return self._assemble(first, second, int(elsewhere), draws, seq_len, ids)
