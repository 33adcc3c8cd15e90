"""Span corruption: spans of the text are replaced by sentinels, and predicted behind them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from pipeline.training.objectives.objective import Objective, Row, SpecialIds

if TYPE_CHECKING:
    from pipeline.models.config import AnyModel
    from pipeline.training.objectives.objective import Example

FIRST_SENTINEL = "<extra_id_0>"


def sentinels(pattern: str, count: int) -> list[str]:
    """Return the names of sentinels from 0 on; `{}` in the pattern is the number."""
    return [pattern.replace("{}", str(number)) for number in range(count)]


class SpanCorruption(Objective):
    """T5's training (Raffel et al. 2020): the encoder reads the text with sentinels in place of spans.

        text     Thank you for inviting me to your party last week
        inputs   Thank you <extra_id_0> me to your party <extra_id_1> week <end of text>
        targets  <extra_id_0> for inviting <extra_id_1> last <end of text>

    Rows hold so much text that the inputs fill the encoder exactly. A span lies in one document: what goes over an end
    is moved aside, and where there is no room the two documents see one another.

    Attributes:
        noise_density: Share of the tokens that are taken out.
        mean_span: Tokens of a span, on average.
        sentinel: Names of the sentinels, `{}` is their number; the tokenizer has them as special tokens, for which
            "<extra_id_{0..99}>" is short.
        num_sentinels: How many there are; each span of a row takes one.
    """

    families: ClassVar[frozenset[str]] = frozenset({"encoder_decoder"})
    term_names: ClassVar[dict[str, str]] = {"tokens": "spans"}

    kind: Literal["span_corruption"] = "span_corruption"
    noise_density: float = Field(default=0.15, gt=0, le=0.95)
    mean_span: float = Field(default=3.0, ge=1)
    sentinel: str = Field(default="<extra_id_{}>", pattern=r"\{\}")
    num_sentinels: int = Field(default=100, ge=1)

    def special_tokens(self) -> list[str]:
        """Return the sentinels."""
        return sentinels(self.sentinel, self.num_sentinels)

    def row_tokens(self, seq_len: int) -> int:
        """Return how many tokens of text leave `seq_len` inputs: for 512 with the defaults 568, as in T5."""
        from pipeline.training.objectives.spans import longest_input

        return longest_input(seq_len - 1, self.noise_density, self.mean_span, True)

    def target_len(self, seq_len: int) -> int:
        """Return the positions of the decoder: for 512 with the defaults 114, as in T5."""
        from pipeline.training.objectives.spans import count_spans

        return sum(count_spans(self.row_tokens(seq_len), self.noise_density, self.mean_span)) + 1

    def make(self, row: Row, seed: int, seq_len: int, ids: SpecialIds, partner: Row | None = None) -> Example:
        """Return ids and documents of the encoder; decoder_ids, decoder_documents and labels of the decoder."""
        from pipeline.training.objectives.draws import Draws
        from pipeline.training.objectives.pieces import num_tokens
        from pipeline.training.objectives.spans import close, draw_spans, encode_decode, keep_inside, take_out

        count = num_tokens(row)
        values, documents = row.tokens[:count], row.documents[:count]
        spans = draw_spans(count, self.noise_density, self.mean_span, Draws(seed))
        spans, documents = keep_inside(spans, documents)
        markers = [ids[token] for token in sentinels(self.sentinel, len(spans))]
        inputs, inputs_of, targets, targets_of = take_out(values, documents, spans, markers)
        inputs, inputs_of = close(inputs, inputs_of, ids.end_of_text)
        if spans:  # else nothing is predicted
            targets, targets_of = close(targets, targets_of, ids.end_of_text)
        return encode_decode(inputs, inputs_of, targets, targets_of, (seq_len, self.target_len(seq_len)), ids)

    def check(self, config: AnyModel, seq_len: int) -> Iterator[tuple[str, str]]:
        """Refuse too few sentinels, and targets longer than the model's positions."""
        from pipeline.training.objectives.spans import count_spans

        yield from super().check(config, seq_len)
        _, spans = count_spans(self.row_tokens(seq_len), self.noise_density, self.mean_span)
        if spans > self.num_sentinels:
            yield "objective.num_sentinels", f"a row of {seq_len} inputs has {spans} spans, found {self.num_sentinels}"
        if self.target_len(seq_len) > config.max_seq_len:
            yield (
                "objective.noise_density",
                f"rows of {seq_len} inputs have {self.target_len(seq_len)} targets, more than the model's max_seq_len "
                f"of {config.max_seq_len}",
            )
