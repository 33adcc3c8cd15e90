"""Fill in the middle: documents are rearranged so that a causal model learns to insert text."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from pipeline.training.objectives.objective import Objective, Row, SpecialIds

if TYPE_CHECKING:
    from pipeline.training.objectives.draws import Draws
    from pipeline.training.objectives.objective import Array, Example

ADDED = 4  # tokens that a rearranged document may have more: three markers and an end of text
SHORTEST = 3  # tokens of a document that can be rearranged


class FillInMiddle(Objective):
    """Causal language modelling in which some documents have their middle at the end (Bavarian et al. 2022).

    A document, or the piece of one that a row holds (the paper's context level), is cut at two random tokens into
    prefix, middle and suffix, and becomes, with an end of text behind it even if the piece had none,

        PSM:  <prefix_token> prefix <suffix_token> suffix <middle_token> middle
        SPM:  <prefix_token> <suffix_token> suffix <middle_token> prefix middle

    All of its tokens have a loss, as in the paper. Cuts are between tokens, not within them.

    Nothing is cut off: rows have room for the markers of `documents_per_row` documents, and what is not needed of it is
    padding. If more documents of a row are chosen, the others stay as they are, chosen by chance.

    Attributes:
        rate: Share of the documents that are rearranged.
        spm_share: Share of these whose suffix comes first.
        documents_per_row: How many documents of a row can be rearranged; each takes 4 positions from the row's text.
    """

    families: ClassVar[frozenset[str]] = frozenset({"decoder"})
    term_names: ClassVar[dict[str, str]] = {"tokens": "fill_in_middle"}
    needs_documents: ClassVar[bool] = True

    kind: Literal["fill_in_middle"] = "fill_in_middle"
    rate: float = Field(default=0.5, ge=0, le=1)
    spm_share: float = Field(default=0.5, ge=0, le=1)
    documents_per_row: int = Field(default=4, ge=1)
    prefix_token: str = Field(default="<|fim_prefix|>", min_length=1)
    suffix_token: str = Field(default="<|fim_suffix|>", min_length=1)
    middle_token: str = Field(default="<|fim_middle|>", min_length=1)

    @model_validator(mode="after")
    def _tokens_differ(self) -> Self:
        if len(set(self.special_tokens())) < ADDED - 1:
            raise ValueError(f"wanted three different tokens, found {', '.join(self.special_tokens())}")
        return self

    def special_tokens(self) -> list[str]:
        """Return the three markers."""
        return [self.prefix_token, self.suffix_token, self.middle_token]

    def row_tokens(self, seq_len: int) -> int:
        """Return what is left beside the room for the markers."""
        return seq_len - ADDED * self.documents_per_row

    def make(self, row: Row, seed: int, seq_len: int, ids: SpecialIds, partner: Row | None = None) -> Example:
        """Return ids, labels and documents."""
        import numpy as np

        from pipeline.training.objectives.draws import Draws
        from pipeline.training.objectives.pieces import find_pieces, pad_text

        draws, pieces = Draws(seed), find_pieces(row)
        chosen = self._choose(pieces, draws)
        inputs, labels, documents = [row.inputs[:0]], [row.tokens[:0]], [row.documents[:0]]
        for number, (start, stop) in enumerate(pieces):
            text = row.tokens[start:stop]
            text = self._rearrange(text, ids, draws) if number in chosen else text
            labels.append(text)
            inputs += [row.inputs[start : start + 1], text[:-1]]
            documents.append(np.full(len(text), number, np.int32))
        return pad_text(np.concatenate(inputs), np.concatenate(labels), np.concatenate(documents), seq_len, ids)

    def _choose(self, pieces: list[tuple[int, int]], draws: Draws) -> set[int]:
        """Return the numbers of the documents to rearrange."""
        shares, order = draws.uniform(len(pieces)).tolist(), draws.order(len(pieces)).tolist()
        fit = [n for n in order if shares[n] < self.rate and pieces[n][1] - pieces[n][0] >= SHORTEST]
        return set(fit[: self.documents_per_row])

    def _rearrange(self, tokens: Array, ids: SpecialIds, draws: Draws) -> Array:
        """Return the tokens of a document in their new order."""
        import numpy as np

        before, after, between = ([ids[token]] for token in self.special_tokens())
        text = tokens[:-1] if tokens[-1] == ids.end_of_text else tokens
        begin, end = sorted(draws.below(len(text) + 1, 2).tolist())
        prefix, middle, suffix = text[:begin], text[begin:end], text[end:]
        parts = [before, after, suffix, between, prefix, middle]
        if not draws.chance(self.spm_share):
            parts = [before, prefix, after, suffix, between, middle]
        return np.concatenate([*parts, [ids.end_of_text]]).astype(np.int64)
