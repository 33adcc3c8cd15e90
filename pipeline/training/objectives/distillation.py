"""Knowledge distillation: another objective, with a teacher's predictions as further targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from pipeline.settings import Input
from pipeline.training.objectives.causal import Causal
from pipeline.training.objectives.denoisers import Denoisers
from pipeline.training.objectives.fill_in_middle import FillInMiddle
from pipeline.training.objectives.masked import Masked
from pipeline.training.objectives.next_sentence import NextSentence
from pipeline.training.objectives.objective import Objective, Row, SpecialIds
from pipeline.training.objectives.prefix import Prefix
from pipeline.training.objectives.sentence_order import SentenceOrder
from pipeline.training.objectives.span_corruption import SpanCorruption

if TYPE_CHECKING:
    from pipeline.models.config import AnyModel
    from pipeline.text.loader import Rows
    from pipeline.training.objectives.objective import Example

TeachableObjective = Annotated[
    Causal | Prefix | FillInMiddle | Masked | NextSentence | SentenceOrder | SpanCorruption | Denoisers,
    Field(discriminator="kind"),
]


class Distillation(Objective):
    """Another objective whose labels are joined by a teacher's predictions for them (Hinton et al. 2015).

    The loss is (1 - weight) * the other objective's + weight * temperature**2 * KL(teacher || student), both softened
    by the temperature. Examples are the other objective's.

    Attributes:
        teacher: The model that predicts; it has the same tokenizer.
        temperature: What both models' logits are divided by; above 1 the teacher's second choices count more.
        weight: Share of the teacher in the loss.
    """

    kind: Literal["distillation"] = "distillation"
    objective: TeachableObjective = Causal()
    teacher: Annotated[str, Input("model")]
    temperature: float = Field(default=2.0, gt=0)
    weight: float = Field(default=0.5, gt=0, le=1)

    @property
    def families(self) -> frozenset[str]:
        """Which models the other objective can train."""
        return self.objective.families

    @property
    def term_names(self) -> Mapping[str, str]:
        """The other objective's names, and the teacher's."""
        return {**self.objective.term_names, "distill": "distill"}

    @property
    def partner(self) -> bool:
        """Whether the other objective needs a second row."""
        return self.objective.partner

    @property
    def needs_documents(self) -> bool:
        """Whether the other objective must know the documents of a row."""
        return self.objective.needs_documents

    def special_tokens(self) -> list[str]:
        """Return what the other objective needs."""
        return self.objective.special_tokens()

    def row_tokens(self, seq_len: int) -> int:
        """Return what the other objective takes."""
        return self.objective.row_tokens(seq_len)

    def target_len(self, seq_len: int) -> int:
        """Return what the other objective's decoder has."""
        return self.objective.target_len(seq_len)

    def make(self, row: Row, seed: int, seq_len: int, ids: SpecialIds, partner: Row | None = None) -> Example:
        """Return the other objective's example."""
        return self.objective.make(row, seed, seq_len, ids, partner)

    def make_many(
        self, rows: Rows, seeds: Sequence[int], seq_len: int, ids: SpecialIds, partners: Rows | None = None
    ) -> Example:
        """Return the other objective's examples."""
        return self.objective.make_many(rows, seeds, seq_len, ids, partners)

    def check(self, config: AnyModel, seq_len: int) -> Iterator[tuple[str, str]]:
        """Refuse what the other objective refuses."""
        for setting, problem in self.objective.check(config, seq_len):
            inner = setting.startswith("objective.")
            yield (f"objective.{setting}" if inner else setting), problem
