"""Masked language modelling: some tokens are hidden and predicted from all the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from pipeline.training.objectives.objective import IGNORED, Objective, Row, SpecialIds

if TYPE_CHECKING:
    from pipeline.training.objectives.objective import Example


class Masking(Objective):
    """How tokens are masked; what masked language modelling and the objectives with pairs of sentences share.

    Attributes:
        rate: Share of the tokens that are predicted, special ones aside; at least one token of a row.
        mask_share: Share of these that are replaced by `mask_token`.
        random_share: Share of these that are replaced by any ordinary token; the others stay as they are.
        unit: What is chosen. token: each by itself (Devlin et al. 2019). whole_word: all tokens of a word. span:
            several words (Joshi et al. 2020, SpanBERT), which are then all replaced in the same way.
        span_stop: Probability that a span ends after a word; SpanBERT's gives 3.8 words on average.
        max_span_words: Length of the longest span.
    """

    families: ClassVar[frozenset[str]] = frozenset({"encoder"})

    kind: str
    rate: float = Field(default=0.15, gt=0, lt=1)
    mask_share: float = Field(default=0.8, ge=0, le=1)
    random_share: float = Field(default=0.1, ge=0, le=1)
    unit: Literal["token", "whole_word", "span"] = "token"
    span_stop: float = Field(default=0.2, gt=0, lt=1)
    max_span_words: int = Field(default=10, ge=1, le=1000)
    mask_token: str = Field(default="[MASK]", min_length=1)

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        if self.mask_share + self.random_share > 1:
            raise ValueError(
                f"mask_share and random_share: wanted at most 1 together, found {self.mask_share} + {self.random_share}"
            )
        return self

    def special_tokens(self) -> list[str]:
        """Return the token that hides others."""
        return [self.mask_token]


class Masked(Masking):
    """Hidden tokens are predicted from all others of their document, as in BERT; anew every time a row is seen.

    Attributes:
        first_token: Put before every row, such as [CLS], and seen by the row's first document; null puts none.
    """

    term_names: ClassVar[dict[str, str]] = {"tokens": "masked"}

    kind: Literal["masked"] = "masked"
    first_token: str | None = Field(default=None, min_length=1)

    def special_tokens(self) -> list[str]:
        """Return the token that hides others, and the first of a row."""
        return [self.mask_token, *([self.first_token] if self.first_token else [])]

    def row_tokens(self, seq_len: int) -> int:
        """Return all positions, or all but the first."""
        return seq_len - (self.first_token is not None)

    def make(self, row: Row, seed: int, seq_len: int, ids: SpecialIds, partner: Row | None = None) -> Example:
        """Return ids, labels and documents."""
        import numpy as np

        from pipeline.training.objectives.draws import Draws
        from pipeline.training.objectives.masks import mask
        from pipeline.training.objectives.pieces import mark_gaps

        values = np.where(row.tokens == IGNORED, ids.end_of_text, row.tokens)
        documents = mark_gaps(row.tokens, row.documents)
        if self.first_token is not None:
            values, documents = np.insert(values, 0, ids[self.first_token]), np.insert(documents, 0, documents[0])
        masked, labels = mask(values, documents, self, ids, Draws(seed))
        return {"ids": masked, "labels": labels, "documents": documents}
