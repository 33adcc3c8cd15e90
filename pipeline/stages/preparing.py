"""What pretraining needs before its first step: the model with its first weights, and how it is fed and tested."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline.artifact import Artifact
from pipeline.errors import ConfigError
from pipeline.models.config import AnyModel, Decoder, EncoderDecoder
from pipeline.parallel.engine import EngineSettings, Precision, partitioner
from pipeline.parallel.mesh import shape_batch
from pipeline.stage import Stage
from pipeline.stages.import_tokenizer import ImportTokenizer
from pipeline.stages.loading import load_language_model, model_settings, open_language_model
from pipeline.stages.train_tokenizer import TrainTokenizer
from pipeline.text.corpus import HELD
from pipeline.text.packing import WarmUp
from pipeline.text.tokenizer_files import Bytes, Tiktoken
from pipeline.text.tokenizers import TOKENIZER, load
from pipeline.training.objectives import Distillation, Objective

if TYPE_CHECKING:
    import torch

    from pipeline.models.classifier import Classifier
    from pipeline.models.transformer import Transformer
    from pipeline.parallel.mesh import Mesh
    from pipeline.stage import Context
    from pipeline.stages.pretrain import Pretrain
    from pipeline.text.loader import Loader
    from pipeline.text.stream import TokenStream
    from pipeline.training.objectives.batch import Examples

TEACHER = "objective.teacher"
INIT_FROM = "init_from"


def settle_model(stage: "Pretrain", inputs: Mapping[str, Artifact], tokens: Artifact) -> AnyModel:
    """Return the settings of the model, with the vocabulary of the tokens or of the model it goes on with."""
    source = inputs.get(INIT_FROM)
    taken = None if source is None else model_settings(source)
    config = stage.model or (taken or Decoder()).model_copy(update={"vocab_size": None})
    if config.vocab_size is not None:
        return config
    vocab_size = tokens.stats["vocab_size"]
    known = vocab_size if taken is None else max(vocab_size, taken.real_vocab_size)
    return config.model_copy(update={"vocab_size": known})


def build_model(stage: "Pretrain", config: AnyModel, ctx: "Context", mesh: "Mesh") -> "Transformer":
    """Return this rank's part of the model with its first weights.

    Raises:
        ConfigError: If the weights of `init_from` do not fit, or the tensor-parallel ranks cannot share the model.
    """
    import torch

    from pipeline.models.initial import first_weight
    from pipeline.models.loss import TokenLoss
    from pipeline.models.transfer import compare, take_over
    from pipeline.models.transformer import Transformer

    if isinstance(stage.objective, Distillation):
        model: Transformer = _student(stage.objective, config, ctx.inputs[TEACHER])
    else:
        with torch.device("meta"):
            model = Transformer(config)
    ctx.log(f"{config.num_params():,} parameters")
    found: Mapping[str, torch.Tensor] = {}
    num_ids = 0
    if INIT_FROM in ctx.inputs:
        source, found = open_language_model(ctx.inputs[INIT_FROM])
        num_ids = min(config.real_vocab_size, source.config.real_vocab_size)
        fresh, unused = compare(model, source)
        if fresh:
            ctx.log(f"not in {INIT_FROM}, so they begin anew: {', '.join(fresh)}")
        if unused:
            ctx.log(f"of {INIT_FROM} not used: {', '.join(unused)}")

    def value(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        first = first_weight(config, name, shape, stage.seed)
        return take_over(name, first, found[name], num_ids) if name in found else first

    give_weights(model, value, stage.precision, ctx, mesh)
    model.token_loss = TokenLoss(stage.label_smoothing, stage.z_loss)
    return model


def give_weights(
    model: "Transformer | Classifier",
    value: "Callable[[str, tuple[int, ...]], torch.Tensor]",
    precision: Precision,
    ctx: "Context",
    mesh: "Mesh",
) -> None:
    """Make a model on the device "meta" this rank's part of itself, and give it its weights one by one.

    With ZeRO stage 3 each is cut at once among the data-parallel ranks too.

    Args:
        value: From the name and the shape of a whole parameter or buffer to its values.

    Raises:
        ConfigError: If the tensor-parallel ranks cannot share the model.
    """
    from pipeline.models.classifier import Classifier
    from pipeline.models.weights import tensor_problems, weights
    from pipeline.parallel.tensor import materialize, split

    parallel = ctx.settings.parallel
    trunk = model.trunk if isinstance(model, Classifier) else model
    if problems := list(tensor_problems(trunk.config, mesh.tensor)):
        raise ConfigError(*(f"run.parallel.tensor: {problem}" for problem in problems))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    split(trunk, weights(trunk.config), mesh, parallel.sequence)
    settle = None
    if parallel.zero == 3:
        batch = shape_batch(mesh.data, 1, mesh.data)  # which says nothing about the weights
        settle = partitioner(EngineSettings.of(batch, parallel, precision, None), mesh)
    materialize(model, lambda name: value(name, shapes[name]), mesh, settle)


@dataclass(frozen=True)
class Question:
    """What a model is asked: settings of pretraining, or of an evaluation."""

    objective: Objective
    seq_len: int
    document_mask: bool

    def check(self, config: AnyModel) -> Iterator[tuple[str, str]]:
        """Yield (setting, problem) for what a model cannot be asked."""
        if self.seq_len > config.max_seq_len:
            yield "seq_len", f"{self.seq_len} is longer than the model's max_seq_len of {config.max_seq_len}"
        yield from self.objective.check(config, self.seq_len)


def make_examples(asked: Question, seed: int, tokens: Artifact, config: AnyModel) -> "Examples":
    """Return what makes examples of rows. Raises ArtifactError if the tokenizer lacks a token that they need."""
    import numpy as np

    from pipeline.training.objectives.batch import Examples
    from pipeline.training.objectives.objective import SpecialIds
    from pipeline.training.objectives.vocabulary import special_ids

    names, end, size = asked.objective.special_tokens(), tokens.stats["end_of_text_id"], tokens.stats["vocab_size"]
    if names:
        ids = special_ids(load(tokens.file(TOKENIZER)), names, end)
    else:  # then it asks nothing of the vocabulary
        nothing = np.zeros(size, np.bool_)
        ids = SpecialIds({}, end, size, nothing, nothing, nothing)
    if isinstance(config, EncoderDecoder):
        ids = replace(ids, decoder_start=config.decoder_start_id)
    return Examples(asked.objective, ids, asked.seq_len, asked.document_mask, seed)


def open_held(tokens: Mapping[str, Artifact]) -> "dict[str, TokenStream]":
    """Return the held-out documents of the sources that have any."""
    from pipeline.text.stream import open_stream

    return {name: open_stream(artifact, HELD) for name, artifact in tokens.items() if artifact.parts(HELD)}


def describe(stage: "Pretrain", loader: "Loader", held: "Mapping[str, TokenStream]") -> Iterator[str]:
    """Yield a line for every source, how much there is of it and is trained on, and one for lengths that change."""
    counts = loader.counts(stage.steps).items()
    for (name, count), stream, size in zip(counts, loader.streams, loader.sizes, strict=True):
        share = count / (stage.steps * stage.batch_rows)
        yield (
            f"{name}: {100 * share:.3g} % of training, {count / size:.2f} epochs of {stream.num_tokens:,} tokens "
            f"in {size:,} rows ({100 * stream.num_tokens / (size * loader.order.seq_len):.4g} % full); "
            f"{held[name].num_tokens if name in held else 0:,} tokens held out"
        )
    if stage.seq_len_warmup:
        yield from _describe_warmup(stage.seq_len_warmup, stage)


def check_special_tokens(objective: Objective, field: str, maker: Stage | None) -> Iterator[tuple[str, str]]:
    """Yield the problem of special tokens that the tokenizer of `field` will lack, as far as its stage says so."""
    known = None
    if isinstance(maker, TrainTokenizer):
        known = set(maker.special_tokens)
    elif isinstance(maker, ImportTokenizer) and isinstance(maker.vocabulary, Bytes | Tiktoken):
        fixed = maker.vocabulary.special_ids if isinstance(maker.vocabulary, Tiktoken) else {}
        known = {*maker.special_tokens, *fixed}
    missing = [] if known is None else [token for token in objective.special_tokens() if token not in known]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        yield (
            "objective",
            f"'{objective.kind}' needs the special token '{missing[0]}'{more}, which the tokenizer of {field} will not "
            "have; name it in its special_tokens",
        )


def _student(objective: Distillation, config: AnyModel, source: Artifact) -> "Transformer":
    import torch

    from pipeline.models.distillation import Student

    teacher = load_language_model(source)
    with torch.device("meta"):
        return Student(config, teacher, objective.temperature)


def _describe_warmup(warmup: list[WarmUp], stage: "Pretrain") -> Iterator[str]:
    """Yield which steps have sequences of which length."""
    first, stretches = 1, []
    for part in warmup:
        last = min(-(-part.tokens // stage.batch_tokens), stage.steps)
        if last >= first:
            stretches.append(f"{part.seq_len} tokens in steps {first:,} to {last:,}")
            first = last + 1
    if first <= stage.steps:
        stretches.append(f"{stage.seq_len} tokens from step {first:,} on")
    yield f"sequence length: {', '.join(stretches)}"


def coefficients(objective: Objective, config: AnyModel) -> dict[str, float]:
    """Return what each term of the loss is multiplied with in training, where that is not 1."""
    found: dict[str, float] = {}
    if config.experts is not None:
        found |= {"balance": config.experts.balance_loss, "router_z": config.experts.router_z_loss}
    if isinstance(objective, Distillation):
        ahead = range(1, 1 + (config.predict_ahead if isinstance(config, Decoder) else 0))
        own = ["tokens", "sentence", *(f"ahead_{number}" for number in ahead)]
        found |= dict.fromkeys(own, 1 - objective.weight) | {"distill": objective.weight}
    return found
