"""What can be refused of a model and tokens once they are made, by their manifests and small files alone."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from pipeline.artifact import Artifact
from pipeline.errors import ArtifactError, ConfigError
from pipeline.models.config import AnyModel
from pipeline.stage import Run
from pipeline.stages.engine_checks import check_engine
from pipeline.stages.loading import check_tokenizer, model_settings
from pipeline.stages.preparing import INIT_FROM, TEACHER, settle_model
from pipeline.text.corpus import HELD
from pipeline.text.packing import Contiguous
from pipeline.text.tokenizers import TOKENIZER, load
from pipeline.training.objectives import Objective

if TYPE_CHECKING:
    from pipeline.stages.pretrain import Pretrain
    from pipeline.text.stream import TokenStream

Problem = tuple[str, str]


def check_pretraining(stage: "Pretrain", inputs: Mapping[str, Artifact], run: Run) -> Iterator[Problem]:
    """Yield (setting, problem) for what the tokens that are made do not have, or not in common with the models.

    How many rows there are is known where packing is contiguous; else documents have to be read.

    Raises:
        ArtifactError: If an input is damaged.
    """
    from pipeline.text.stream import open_stream

    made = {name: inputs[setting] for name, setting in stage.sources.items() if setting in inputs}
    if not made:
        return
    streams = {name: open_stream(artifact, prove=False) for name, artifact in made.items()}
    first, *others = made
    for name in others:
        yield from check_same_tokenizer(made[first], made[name], stage.sources[name])
    for field in (INIT_FROM, TEACHER):
        if field in inputs:
            yield from check_same_tokenizer(
                inputs[field], made[first], stage.sources[first], may_grow=field == INIT_FROM
            )
    config = settle_model(stage, inputs, made[first])
    yield from _check_vocabulary(config, inputs.get(TEACHER), made[first])
    yield from check_engine(stage.batch_rows, "batch_tokens", stage, run, config, stage.lengths)
    yield from check_special_ids(stage.objective, made[first])
    if len(made) == len(stage.sources):
        yield from _check_amount(stage, streams)
        if not any(artifact.parts(HELD) for artifact in made.values()):
            fractions = ", ".join(str(artifact.manifest.stage["held_out_fraction"]) for artifact in made.values())
            yield (
                "tokens",
                f"no document is held out for validation (held_out_fraction of tokenize: {fractions}); hold out more "
                "or use more text",
            )


def check_same_tokenizer(
    wanted: Artifact, tokens: Artifact, field: str, *, may_grow: bool = False
) -> Iterator[Problem]:
    """Yield the problem of tokens, named by the setting `field`, that `check_tokenizer` refuses."""
    try:
        check_tokenizer(wanted, tokens, may_grow=may_grow)
    except ArtifactError as error:
        yield field, str(error)


def check_special_ids(objective: Objective, tokens: Artifact) -> Iterator[Problem]:
    """Yield the problem of a token that an objective needs and the tokenizer of tokens lacks."""
    from pipeline.training.objectives.vocabulary import special_ids

    if names := objective.special_tokens():
        try:
            special_ids(load(tokens.file(TOKENIZER)), names, tokens.stats["end_of_text_id"])
        except ArtifactError as error:
            yield _divide(str(error))


def _check_vocabulary(config: AnyModel, teacher: Artifact | None, tokens: Artifact) -> Iterator[Problem]:
    size = tokens.stats["vocab_size"]
    if config.real_vocab_size < size:
        yield (
            "model.vocab_size",
            f"wanted at least {size}, the vocabulary of {tokens.path}, found {config.vocab_size}; leave it null to "
            "take that",
        )
    if teacher is not None and (size := model_settings(teacher).real_vocab_size) > config.real_vocab_size:
        yield "model.vocab_size", f"wanted at least {size}, the teacher's, found {config.real_vocab_size}"


def _check_amount(stage: "Pretrain", streams: "Mapping[str, TokenStream]") -> Iterator[Problem]:
    """Yield the problem of tokens that are fewer than a row, or than the steps ask for."""
    from pipeline.text.loader import Loader

    if not isinstance(stage.packing, Contiguous):
        return
    try:
        Loader(streams, stage.order)
    except ArtifactError as error:
        yield "seq_len", str(error)
    except ConfigError as error:
        yield from map(_divide, error.problems)


def _divide(line: str) -> Problem:
    """Return the setting and the problem that a line of both says."""
    setting, _, problem = line.partition(": ")
    return setting, problem
