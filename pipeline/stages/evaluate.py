"""Evaluation of a language model on the documents that its pretraining held out."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from pipeline.artifact import write_json
from pipeline.errors import ConfigError, Preempted
from pipeline.models.config import AnyModel
from pipeline.progress import Progress
from pipeline.settings import Input, decode
from pipeline.stage import Context, Run, Stage, Stats
from pipeline.stages.finetune import refuse_classifier
from pipeline.stages.input_checks import check_same_tokenizer, check_special_ids
from pipeline.stages.loading import load_language_model, model_settings, planned_model
from pipeline.stages.preparing import Question, make_examples
from pipeline.stages.pretrain import Pretrain
from pipeline.text.corpus import HELD
from pipeline.text.tokenizers import TOKENIZER, load
from pipeline.training.objectives import AnyObjective, Causal, Distillation, Masked, Objective, SpanCorruption

if TYPE_CHECKING:
    from pipeline.artifact import Artifact
    from pipeline.text.stream import TokenStream

PLAIN: dict[str, Objective] = {"decoder": Causal(), "encoder": Masked(), "encoder_decoder": SpanCorruption()}


class Evaluate(Stage):
    """Held-out loss and perplexity; of a causal model also bits per byte, beside a model that knows byte counts only.

    The documents are those that the tokens artifact holds out; which, follows from each one's text alone. What is
    random in an objective is the same every time.

    Attributes:
        objective: What the model is asked to do; null is what it was trained to do, and of a model from elsewhere
            causal, masked or span_corruption, by its family.
        seq_len: Positions of a sequence; null is that of its training, and of a model from elsewhere all that it reads.
    """

    version: ClassVar[int] = 2
    produces: ClassVar[str] = "report"

    kind: Literal["evaluate"] = "evaluate"
    model: Annotated[str, Input("model")]
    tokens: Annotated[str, Input("tokens")]
    objective: AnyObjective | None = None
    seq_len: int | None = Field(default=None, ge=1)

    def check(self, upstream: Mapping[str, Stage], run: Run) -> Iterator[tuple[str, str]]:
        """Refuse classifiers, and what the model cannot be asked."""
        yield from refuse_classifier(upstream)
        made_by = upstream["model"]
        if (config := planned_model(made_by)) is not None:
            yield from self._question(made_by, config).check(config)

    def check_inputs(self, inputs: Mapping[str, "Artifact"], run: Run) -> Iterator[tuple[str, str]]:
        """Refuse what model and tokens do not have in common, and tokens of which none are held out."""
        source, tokens = inputs.get("model"), inputs.get("tokens")
        if tokens is not None and not tokens.parts(HELD):
            yield "tokens", f"{tokens.place} holds out no document; tokenize with a larger held_out_fraction"
        if source is None:
            return
        config = model_settings(source)
        asked = self._question(_made_by(source), config)
        yield from asked.check(config)
        if tokens is not None:
            yield from check_same_tokenizer(source, tokens, "tokens")
            yield from check_special_ids(asked.objective, tokens)

    def disk_bytes(self, input_bytes: int, run: Run) -> int:
        """A small file."""
        return 1 << 20

    @classmethod
    def headline(cls, stats: Stats) -> tuple[str, str]:
        """Return how much was read, and bits per byte beside the byte-unigram model's, or the loss with its terms."""
        amount = f"{stats['documents']:,} documents, {stats['tokens']:,} tokens"
        if "bits_per_byte" in stats:
            unigram = stats["byte_unigram_bits_per_byte"]
            return amount, f"{stats['bits_per_byte']:.3f} bits per byte (byte unigram {unigram:.3f})"
        terms = {name: value for name, value in stats.items() if name.startswith("loss.")}
        shown = terms or {f"loss.{stats['objective']}": stats["loss"]}
        return amount, "loss " + ", ".join(f"{name.removeprefix('loss.')} {value:.3f}" for name, value in shown.items())

    def run(self, ctx: Context) -> None:
        """Score all held-out documents and write `metrics.json`."""
        from pipeline.text.stream import open_stream
        from pipeline.training.metrics import FED_ROWS, num_windows, score
        from pipeline.training.validation import SEED, name_terms, predicts_text

        source, tokens = ctx.inputs["model"], ctx.inputs["tokens"]
        ctx.refuse(self.check_inputs(ctx.inputs, ctx.settings))
        model = load_language_model(source)
        asked = self._question(_made_by(source), model.config)
        held = open_stream(tokens, HELD)
        examples = make_examples(asked, SEED, tokens, model.config)
        windows = num_windows(held, asked.objective.row_tokens(asked.seq_len))
        progress = ctx.progress(-(-windows // FED_ROWS), "batches")
        result = score(model, held, examples, beat=lambda: _count(ctx, progress))
        progress.close()
        metrics: Stats = {"loss": result.loss, "perplexity": result.perplexity}
        metrics |= {f"loss.{name}": mean for name, mean in name_terms(asked.objective, result).items()}
        if predicts_text(asked.objective):
            metrics |= {
                "bits_per_byte": result.bits_per_byte(held),
                "byte_unigram_bits_per_byte": _byte_unigram(held, tokens),
            }
        metrics |= {"documents": held.num_documents, "tokens": held.num_tokens, "bytes": held.num_bytes}
        metrics["predicted"] = result.tokens
        with ctx.output.write("metrics.json") as path:
            write_json(path, metrics)
        ctx.output.stats |= metrics | {"objective": asked.objective.kind}

    def _question(self, made_by: Stage | None, config: AnyModel) -> Question:
        """Return what a model is asked, given the stage that made it if that is known."""
        trained = made_by if isinstance(made_by, Pretrain) else None
        objective: Objective = self.objective or (trained.objective if trained else PLAIN[config.kind])
        if isinstance(objective, Distillation):
            objective = objective.objective
        seq_len = self.seq_len or (trained.seq_len if trained else config.max_seq_len)
        return Question(objective, seq_len, trained.document_mask if trained else True)


def _count(ctx: Context, progress: Progress) -> None:
    """Count a batch that begins, unless somebody asked for a stop."""
    if ctx.should_stop():
        raise Preempted(f"{ctx.task} after {progress.done:,.0f} of {progress.total:,.0f} batches; it will begin again")
    progress.advance()


def _made_by(source: "Artifact") -> Stage | None:
    """Return the stage that made a model, if it was pretraining of this version."""
    settings = source.manifest.stage
    if settings.get("kind") != "pretrain":
        return None
    try:
        return decode(Pretrain, settings)
    except ConfigError:
        return None


def _byte_unigram(held: "TokenStream", tokens: "Artifact") -> float:
    """Return the entropy of single bytes in the held-out text itself: no byte-unigram model can do better on it."""
    tokenizer = load(tokens.file(TOKENIZER))
    counts: Counter[int] = Counter()
    for start, stop in held.documents():
        counts.update(tokenizer.decode(held.read(start, stop - start - 1).tolist()).encode())  # without its last token
    total = counts.total()
    return -sum(n / total * math.log2(n / total) for n in counts.values())
