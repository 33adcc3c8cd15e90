"""Objectives: what a model is trained to do, each a pure function from a row of tokens and a seed to an example."""

from typing import Annotated

from pydantic import Field

from pipeline.training.objectives.causal import Causal
from pipeline.training.objectives.denoisers import Denoisers
from pipeline.training.objectives.distillation import Distillation, TeachableObjective
from pipeline.training.objectives.fill_in_middle import FillInMiddle
from pipeline.training.objectives.masked import Masked
from pipeline.training.objectives.next_sentence import NextSentence
from pipeline.training.objectives.objective import Objective, Row, SpecialIds
from pipeline.training.objectives.prefix import Prefix
from pipeline.training.objectives.sentence_order import SentenceOrder
from pipeline.training.objectives.span_corruption import SpanCorruption

AnyObjective = Annotated[
    Causal | Prefix | FillInMiddle | Masked | NextSentence | SentenceOrder | SpanCorruption | Denoisers | Distillation,
    Field(discriminator="kind"),
]

__all__ = [
    "AnyObjective",
    "Causal",
    "Denoisers",
    "Distillation",
    "FillInMiddle",
    "Masked",
    "NextSentence",
    "Objective",
    "Prefix",
    "Row",
    "SentenceOrder",
    "SpanCorruption",
    "SpecialIds",
    "TeachableObjective",
]
