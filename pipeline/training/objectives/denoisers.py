"""UL2's mixture of denoisers: span corruption of several strengths, and continuing a text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from pipeline.settings import Settings
from pipeline.training.objectives.objective import IGNORED, Objective, Row, SpecialIds
from pipeline.training.objectives.span_corruption import sentinels

if TYPE_CHECKING:
    from pipeline.models.config import AnyModel
    from pipeline.training.objectives.draws import Draws
    from pipeline.training.objectives.objective import Array, Example


class Denoiser(Settings):
    """One way to corrupt a text.

    Attributes:
        mode: The token that tells the model which kind of denoiser it is; null puts none.
        noise_density: Share of the tokens that are taken out.
        mean_span: Tokens of a span, on average; null takes one span from the end, without a sentinel.
        weight: Share of the examples, relative to the others'.
    """

    mode: str | None = Field(default=None, min_length=1)
    noise_density: float = Field(gt=0, le=0.95)
    mean_span: float | None = Field(default=None, ge=1)
    weight: float = Field(default=1.0, gt=0)

    def count(self, num_tokens: int) -> tuple[int, int]:
        """Return how many inputs and targets a text has: mode, sentinels and ends of text included."""
        from pipeline.training.objectives.spans import count_spans

        noise, spans = count_spans(num_tokens, self.noise_density, self.mean_span)
        markers = 0 if self.mean_span is None else spans
        return num_tokens - noise + markers + 1 + (self.mode is not None), noise + markers + 1


# Tay et al. 2022 (arXiv:2205.05131), table 1: two regular denoisers, one sequential, four extreme.
UL2 = [
    Denoiser(mode="[NLU]", noise_density=0.15, mean_span=3),
    Denoiser(mode="[NLU]", noise_density=0.15, mean_span=8),
    Denoiser(mode="[S2S]", noise_density=0.25),
    Denoiser(mode="[NLG]", noise_density=0.5, mean_span=3),
    Denoiser(mode="[NLG]", noise_density=0.5, mean_span=8),
    Denoiser(mode="[NLG]", noise_density=0.15, mean_span=64),
    Denoiser(mode="[NLG]", noise_density=0.5, mean_span=64),
]


class Denoisers(Objective):
    """A mixture of denoisers, each with the token of its mode before the inputs (UL2, Tay et al. 2022).

    Each row is corrupted by one of them, as in span corruption. All rows have the same number of tokens, so that the
    gentlest denoiser fills the encoder; the inputs of the others are shorter.

    Note: a row has one mode, so its documents see one another whatever `document_mask` says; packing `padded` gives
    each document a row.

    Attributes:
        denoisers: UL2's seven by default.
        decoder_only: Whether a decoder is trained: it reads the inputs as a prefix that all of the row sees, then
            predicts the targets.
        sentinel: Names of the sentinels, `{}` is their number.
        num_sentinels: How many there are; each span of a row takes one.
    """

    term_names: ClassVar[dict[str, str]] = {"tokens": "denoised"}

    kind: Literal["denoisers"] = "denoisers"
    denoisers: list[Denoiser] = Field(default=UL2, min_length=1)
    decoder_only: bool = False
    sentinel: str = Field(default="<extra_id_{}>", pattern=r"\{\}")
    num_sentinels: int = Field(default=256, ge=1)

    @property
    def families(self) -> frozenset[str]:
        """Which models it can train, as `decoder_only` says."""
        return frozenset({"decoder" if self.decoder_only else "encoder_decoder"})

    def special_tokens(self) -> list[str]:
        """Return the modes and the sentinels."""
        modes = dict.fromkeys(denoiser.mode for denoiser in self.denoisers if denoiser.mode)
        return [*modes, *sentinels(self.sentinel, self.num_sentinels)]

    def row_tokens(self, seq_len: int) -> int:
        """Return how many tokens of text fit, whichever denoiser gets them."""
        from pipeline.training.objectives.spans import longest_input

        return min(
            longest_input(
                seq_len - 1 - (denoiser.mode is not None),
                denoiser.noise_density,
                denoiser.mean_span,
                denoiser.mean_span is not None,
                self.decoder_only,
            )
            for denoiser in self.denoisers
        )

    def target_len(self, seq_len: int) -> int:
        """Return the positions of the decoder."""
        return max(denoiser.count(self.row_tokens(seq_len))[1] for denoiser in self.denoisers)

    def make(self, row: Row, seed: int, seq_len: int, ids: SpecialIds, partner: Row | None = None) -> Example:
        """Return what span corruption returns; for a decoder ids, labels, documents and prefix."""
        import numpy as np

        from pipeline.training.objectives.draws import Draws
        from pipeline.training.objectives.pieces import num_tokens
        from pipeline.training.objectives.spans import encode_decode

        draws = Draws(seed)
        inputs, targets = self._corrupt(row.tokens[: num_tokens(row)], draws, ids)
        if self.decoder_only:
            return _join(inputs, targets, seq_len, ids)
        inputs_of, targets_of = np.zeros(len(inputs), np.int32), np.zeros(len(targets), np.int32)
        return encode_decode(inputs, inputs_of, targets, targets_of, (seq_len, self.target_len(seq_len)), ids)

    def check(self, config: AnyModel, seq_len: int) -> Iterator[tuple[str, str]]:
        """Refuse too few sentinels, and targets longer than the model's positions."""
        from pipeline.training.objectives.spans import count_spans

        yield from super().check(config, seq_len)
        size = self.row_tokens(seq_len)
        spans = max(count_spans(size, each.noise_density, each.mean_span)[1] for each in self.denoisers)
        if spans > self.num_sentinels:
            yield "objective.num_sentinels", f"a row of {seq_len} inputs has {spans} spans, found {self.num_sentinels}"
        if not self.decoder_only and self.target_len(seq_len) > config.max_seq_len:
            yield (
                "objective.denoisers",
                f"rows of {seq_len} inputs have up to {self.target_len(seq_len)} targets, more than the model's "
                f"max_seq_len of {config.max_seq_len}",
            )

    def _corrupt(self, values: Array, draws: Draws, ids: SpecialIds) -> tuple[Array, Array]:
        """Return inputs and targets, each with an end of text; no targets if there is nothing to take out."""
        import numpy as np

        from pipeline.training.objectives.spans import draw_spans, take_out

        denoiser = self._pick(float(draws.uniform(1)[0]))
        spans = draw_spans(len(values), denoiser.noise_density, denoiser.mean_span, draws)
        marked = denoiser.mean_span is not None
        markers = [ids[token] for token in sentinels(self.sentinel, len(spans))] if marked else []
        inputs, _, targets, _ = take_out(values, np.zeros(len(values), np.int32), spans, markers)
        mode = [ids[denoiser.mode]] if denoiser.mode else []
        end = [ids.end_of_text]
        return np.concatenate([mode, inputs, end]).astype(np.int64), np.append(targets, end[: len(spans)])

    def _pick(self, share: float) -> Denoiser:
        """Return the denoiser at a share of the sum of all weights."""
        place = share * sum(denoiser.weight for denoiser in self.denoisers)
        for denoiser in self.denoisers:
            place -= denoiser.weight
            if place < 0:
                return denoiser
        return self.denoisers[-1]


def _join(inputs: Array, targets: Array, seq_len: int, ids: SpecialIds) -> Example:
    """Return inputs and targets as one text for a decoder, which sees the inputs as a whole."""
    import numpy as np

    from pipeline.training.objectives.pieces import pad_text

    whole = np.concatenate([inputs, targets])
    labels = np.where(np.arange(len(whole)) < len(inputs), IGNORED, whole)
    shifted = np.concatenate([[ids.end_of_text], whole[:-1]])
    example = pad_text(shifted, labels, np.zeros(len(whole), np.int32), seq_len, ids)
    return {**example, "prefix": np.arange(seq_len) <= len(inputs)}
