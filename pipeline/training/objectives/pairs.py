"""Pairs of text segments as BERT reads them; what the two objectives about sentences share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from pipeline.training.objectives.masked import Masking
from pipeline.training.objectives.objective import IGNORED, SpecialIds

if TYPE_CHECKING:
    from pipeline.models.config import AnyModel
    from pipeline.training.objectives.draws import Draws
    from pipeline.training.objectives.objective import Array, Example

MARKERS = 3  # one [CLS] and two [SEP]


class Pairs(Masking):
    """Masked language modelling on `[CLS] A [SEP] B [SEP]`, with a class for the pair.

    The segments are real neighbours of one document: the longest piece of a document in the row, cut between a quarter
    and three quarters of its length. What else the row holds is not used in this example, so packing `padded` or
    `best_fit` uses more of each row than `contiguous`. The end of a text gives way to [SEP]. A piece too short to be
    cut becomes `[CLS] A [SEP]` with class -100, no loss.

    Attributes:
        first_token: Begins an example; its output decides on the class.
        separator: Ends each segment.
    """

    needs_documents: ClassVar[bool] = True

    first_token: str = Field(default="[CLS]", min_length=1)
    separator: str = Field(default="[SEP]", min_length=1)

    def special_tokens(self) -> list[str]:
        """Return the token that hides others, the first of an example and the one that ends a segment."""
        return [self.mask_token, self.first_token, self.separator]

    def row_tokens(self, seq_len: int) -> int:
        """Return what is left beside the markers."""
        return seq_len - MARKERS

    def check(self, config: AnyModel, seq_len: int) -> Iterator[tuple[str, str]]:
        """Refuse a model without token types or without an output for the class."""
        yield from super().check(config, seq_len)
        if config.kind == "encoder":
            if config.token_types < 2:
                yield (
                    "model.token_types",
                    f"'{self.kind}' tells two segments apart; wanted 2, found {config.token_types}",
                )
            if not config.pooler:
                yield "model.pooler", f"'{self.kind}' needs the model's output for pairs; set it to true"

    def _assemble(
        self, first: Array, second: Array | None, sentence: int, draws: Draws, seq_len: int, ids: SpecialIds
    ) -> Example:
        """Return the example of two segments, or of one."""
        import numpy as np

        from pipeline.training.objectives.masks import mask
        from pipeline.training.objectives.pieces import fill, pad_text

        values = np.concatenate([[ids[self.first_token]], first, [ids[self.separator]]])
        if second is not None:
            values = np.concatenate([values, second, [ids[self.separator]]])
        documents = np.zeros(len(values), np.int32)
        masked, labels = mask(values, documents, self, ids, draws)
        types = np.arange(len(values)) >= len(first) + 2
        return {
            **pad_text(masked, labels, documents, seq_len, ids),
            "token_types": fill(types, seq_len, 0),
            "sentence": np.array(IGNORED if second is None else sentence, np.int64),
        }


def cut(text: Array, draws: Draws) -> tuple[Array, Array | None]:
    """Return a text in two, or (text, null) if it has fewer than two tokens."""
    if len(text) < 2:
        return text, None
    least = max(1, len(text) // 4)
    place = least + draws.one_below(len(text) - 2 * least + 1)
    return text[:place], text[place:]
