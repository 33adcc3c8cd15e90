"""How the next token is chosen: the settings of generation. Imports no torch."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from pipeline.models.config import AnyModel
from pipeline.settings import Choice

RepetitionPenalty = Annotated[float | None, Field(default=None, ge=0.01, le=100)]


class Greedy(Choice):
    """Always the likeliest token.

    Attributes:
        repetition_penalty: Makes tokens less likely that the row has already: positive logits are divided by it, and
            negative ones multiplied (Keskar et al. 2019, arXiv:1909.05858, section 4.1, divide all). The prompt counts,
            what only an encoder reads does not. The token that ends a text is spared, because prompts begin with it.
            Null is without.
    """

    kind: Literal["greedy"] = "greedy"
    repetition_penalty: RepetitionPenalty = None


class Sample(Choice):
    """Drawn by the model's probabilities, after all that is set here, in this order.

    Attributes:
        repetition_penalty: As of greedy.
        temperature: Divides the logits; below 1 the likely tokens become likelier.
        top_k: Only so many of the likeliest tokens can be drawn; null is all.
        top_p: Only the fewest of the likeliest tokens whose probabilities sum to p, of those that `top_k` leaves, can
            be drawn (nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751); null is all.
        min_p: Only tokens at least p times as likely as the likeliest can be drawn (Nguyen et al. 2024,
            arXiv:2407.01082); null is all.
    """

    kind: Literal["sample"] = "sample"
    temperature: float = Field(default=0.8, gt=0)
    top_k: int | None = Field(default=None, ge=1)
    top_p: float | None = Field(default=0.95, gt=0, le=1)
    min_p: float | None = Field(default=None, gt=0, le=1)
    repetition_penalty: RepetitionPenalty = None


class BeamSearch(Choice):
    """The likeliest text that a search finds which follows `num_beams` beginnings at a time.

    Attributes:
        length_penalty: The logarithm of a text's probability is divided by its number of tokens to the power of this
            (Wu et al. 2016, arXiv:1609.08144, section 7, in the form of Murray and Chiang 2018, arXiv:1808.10006): 0 is
            the likeliest text, which is a short one; more favours long ones.
        repetition_penalty: As of greedy.
    """

    kind: Literal["beam"] = "beam"
    num_beams: int = Field(default=4, ge=2, le=1024)
    length_penalty: float = Field(default=1.0, ge=-10, le=10)
    repetition_penalty: RepetitionPenalty = None


class FillMask(Choice):
    """What an encoder puts in the place of every mask, all of them at once.

    Attributes:
        mask_token: What a prompt has in the place of a token; a special token of the tokenizer.
        candidates: How many of the likeliest tokens are told for each.
    """

    kind: Literal["fill_mask"] = "fill_mask"
    mask_token: str = Field(default="[MASK]", min_length=1)
    candidates: int = Field(default=5, ge=1)


Writing = Greedy | Sample | BeamSearch
AnyDecoding = Annotated[Greedy | Sample | BeamSearch | FillMask, Field(discriminator="kind")]


def check_decoding(decoding: AnyDecoding, config: AnyModel) -> Iterator[tuple[str, str]]:
    """Yield (setting, problem) for what a model cannot do."""
    filling = isinstance(decoding, FillMask)
    if config.kind == "encoder" and not filling:
        yield (
            "decoding.kind",
            f"'{decoding.kind}' continues texts, and an encoder reads whole ones; wanted 'fill_mask', or a model of "
            "kind 'decoder' or 'encoder_decoder'",
        )
    if config.kind != "encoder" and filling:
        yield (
            "decoding.kind",
            f"'fill_mask' needs a model of kind 'encoder', found '{config.kind}'; wanted 'greedy', 'sample' or 'beam'",
        )
    if isinstance(decoding, FillMask) and config.vocab_size is not None and decoding.candidates > config.vocab_size:
        problem = f"{decoding.candidates} is more than the model's vocabulary of {config.vocab_size}"
        yield "decoding.candidates", problem
