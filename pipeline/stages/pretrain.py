"""Pretraining: from token parts to a language model."""

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from pipeline.artifact import Artifact
from pipeline.errors import ArtifactError, ConfigError
from pipeline.models.config import Decoder
from pipeline.parallel.engine import EngineSettings, Precision, deepspeed_json
from pipeline.parallel.mesh import shape_batch
from pipeline.settings import Input
from pipeline.stage import CHECKPOINTS, Context, Run, Stage, Stats, TaskName
from pipeline.stages.tokenize import Tokenize
from pipeline.text.corpus import HELD
from pipeline.text.mixture import AnyMixture, Temperature, check_names
from pipeline.text.packing import AnyPacking, Contiguous, WarmUp, check_warmup
from pipeline.text.tokenizers import TOKENIZER
from pipeline.training.optim import AdamW, AnyOptimizer
from pipeline.training.schedule import AnySchedule, Cosine

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    from pipeline.models.transformer import Transformer
    from pipeline.parallel.mesh import BatchShape, DataParallelUnit
    from pipeline.stages.finetune import Finetune
    from pipeline.text.loader import Loader
    from pipeline.text.stream import TokenStream
    from pipeline.training.loop import Batch
    from pipeline.training.metrics import Score

VALIDATION_ROWS = 16  # sequences that a validation feeds at once


class Pretrain(Stage):
    """Trains a language model on rows of tokens: a mixture of sources, packed, in an order that is pure mathematics.

    Attributes:
        tokens: The tokens to train on; several under names of your own, which `mixture` uses: {web: "@a", code: "@b"}.
        mixture: How the sources share the training; by default in proportion to their sizes.
        max_epochs: How often a source may be gone through at most, unless `mixture` says the epochs itself; null has
            no limit. Up to about four times is nearly as good as new text (Muennighoff et al. 2023, arXiv:2305.16264).
        packing: How documents become rows of `seq_len` tokens.
        document_mask: Whether the documents of a row are kept apart: none sees another, positions count from each
            one's beginning.
        seq_len: Tokens of a training sequence.
        seq_len_warmup: Shorter sequences at the beginning: each row is cut into several, the batch stays the same.
        batch_tokens: Tokens of one optimizer step, over all ranks.
        clip_norm: Largest global gradient norm; null does not clip.
        validation_sequences: How many held-out sequences of each source a validation during training looks at; the
            validation loss is the mean over all their tokens.
        validate_every_steps: Steps between two validations; null validates at the end only.
    """

    version: ClassVar[int] = 2
    produces: ClassVar[str] = "model"
    ranks: ClassVar[Literal["one", "units", "group"]] = "group"

    kind: Literal["pretrain"] = "pretrain"
    tokens: Annotated[str | Annotated[dict[TaskName, str], Field(min_length=1)], Input("tokens")]
    mixture: AnyMixture = Temperature()
    max_epochs: float | None = Field(default=4.0, gt=0)
    packing: AnyPacking = Contiguous()
    document_mask: bool = True
    model: Decoder = Decoder()
    seq_len: int = Field(default=256, ge=1)
    seq_len_warmup: list[WarmUp] = []
    batch_tokens: int = Field(default=8192, ge=1)
    steps: int = Field(ge=1, le=10**12)
    optimizer: AnyOptimizer = AdamW()
    schedule: AnySchedule = Cosine()
    clip_norm: float | None = Field(default=1.0, gt=0)
    precision: Precision = "fp32"
    validation_sequences: int = Field(default=64, ge=1)
    validate_every_steps: int | None = Field(default=100, ge=1)
    seed: int = Field(default=0, ge=0)

    def check(self, upstream: Mapping[str, Stage], run: Run) -> Iterator[tuple[str, str]]:
        """Refuse sequences longer than the model's, unknown sources, and batches that do not divide."""
        if self.seq_len > self.model.max_seq_len:
            yield "seq_len", f"{self.seq_len} is longer than the model's max_seq_len of {self.model.max_seq_len}"
        yield from check_warmup(self.seq_len_warmup, self.seq_len)
        makers = list(upstream.values())
        if makers and all(isinstance(maker, Tokenize) and not maker.held_out_fraction for maker in makers):
            yield "tokens", "nothing is held out to validate on; give tokenize a held_out_fraction above 0"
        for name, problem in check_names(self.mixture, list(self.sources)):
            yield f"mixture.{name}", problem
        if self.batch_tokens % self.seq_len:
            yield "batch_tokens", f"{self.batch_tokens} does not divide into sequences of {self.seq_len} tokens"
            return
        yield from check_engine(self.batch_tokens // self.seq_len, "batch_tokens", self, run)

    @property
    def sources(self) -> dict[str, str]:
        """The setting that names the tokens of each source, by the source's name; a single one is called "tokens"."""
        return (
            {name: f"tokens.{name}" for name in self.tokens} if isinstance(self.tokens, dict) else {"tokens": "tokens"}
        )

    def disk_bytes(self, input_bytes: int, run: Run) -> int:
        """Weights once, and weights with two moments in fp32 for every checkpoint and the one being written."""
        vocab_size = self.model.vocab_size or 2**16
        params = self.model.model_copy(update={"vocab_size": vocab_size}).num_params()
        return 4 * params * (1 + 4 * (run.keep_checkpoints + 1))

    @classmethod
    def headline(cls, stats: Stats) -> tuple[str, str]:
        """Return steps and tokens seen, and the held-out loss."""
        seen = f"{stats['steps']:,} steps, {stats['tokens']:,} tokens"
        return seen, f"validation loss {stats['validation_loss']:.3f}"

    def run(self, ctx: Context) -> None:
        """Train; rank 0 writes the model, its tokenizer and its metrics."""
        from pipeline.models.transformer import Transformer, init_weights
        from pipeline.parallel.engine import full_weights, process_group
        from pipeline.training.loop import Recipe, Trainee, train

        tokens = {name: ctx.inputs[setting] for name, setting in self.sources.items()}
        config = self._with_vocabulary(ctx.task, tokens)
        try:
            loader = self.open_loader(tokens)
        except ConfigError as error:
            raise ConfigError(*(f"{ctx.task}.{problem}" for problem in error.problems)) from None
        held = self._open_held(ctx.task, tokens)
        model = Transformer(config)
        init_weights(model, self.seed)
        ctx.log(f"{config.num_params():,} parameters")
        for line in self._describe(loader, held):
            ctx.log(line)
        with process_group() as mpu:
            trainee = Trainee(
                model=model,
                feed=lambda step, rank, shape: self._feed(loader, step, rank, shape),
                validate=lambda module: self._validate(module, held, mpu),
                checkpoints=ctx.directory / CHECKPOINTS,
            )
            trained = train(ctx, mpu, Recipe.of(self, batch_rows=self.batch_tokens // self.seq_len), trainee)
            weights = full_weights(trained.engine)
        if ctx.rank == 0:
            ctx.output.stats |= trained.validation
            for (name, count), size in zip(loader.counts(self.steps).items(), loader.sizes, strict=True):
                ctx.output.stats[f"epochs.{name}"] = count / size
            self._write(ctx, config, weights, next(iter(tokens.values())))

    def open_loader(self, tokens: Mapping[str, Artifact]) -> "Loader":
        """Return the loader of tokens artifacts, by source: what it gives follows from these settings and the step.

        Raises:
            ArtifactError: If they were made with different tokenizers, are damaged, or one holds less than a row.
            ConfigError: If the mixture holds less than the steps ask for.
        """
        from pipeline.text.loader import Loader, Order
        from pipeline.text.stream import open_stream

        first, *others = tokens.values()
        for other in others:
            check_tokenizer(first, other)
        order = Order(
            mixture=self.mixture,
            packing=self.packing,
            seq_len=self.seq_len,
            batch_rows=self.batch_tokens // self.seq_len,
            steps=self.steps,
            seed=self.seed,
            warmup=self.seq_len_warmup,
            max_epochs=self.max_epochs,
        )
        return Loader({name: open_stream(artifact) for name, artifact in tokens.items()}, order)

    def _open_held(self, task: str, tokens: Mapping[str, Artifact]) -> "dict[str, TokenStream]":
        """Return the held-out documents of the sources that have any."""
        from pipeline.text.stream import open_stream

        held = {name: open_stream(artifact, HELD) for name, artifact in tokens.items() if artifact.parts(HELD)}
        if not held:
            fractions = ", ".join(str(artifact.manifest.stage["held_out_fraction"]) for artifact in tokens.values())
            raise ArtifactError(
                f"{task}.tokens: no document is held out for validation (held_out_fraction of tokenize: {fractions}); "
                "hold out more or use more text"
            )
        return held

    def _describe(self, loader: "Loader", held: "Mapping[str, TokenStream]") -> Iterator[str]:
        """Yield a line for every source: how much there is of it, and how much of it is trained on."""
        counts = loader.counts(self.steps).items()
        for (name, count), stream, size in zip(counts, loader.streams, loader.sizes, strict=True):
            share = count * self.seq_len / (self.steps * self.batch_tokens)
            yield (
                f"{name}: {100 * share:.3g} % of training, {count / size:.2f} epochs of {stream.num_tokens:,} tokens "
                f"in {size:,} rows ({100 * stream.num_tokens / (size * self.seq_len):.4g} % full); "
                f"{held[name].num_tokens if name in held else 0:,} tokens held out"
            )

    def _with_vocabulary(self, task: str, tokens: Mapping[str, Artifact]) -> Decoder:
        """Return the model's settings with the vocabulary of the tokens."""
        source = next(iter(tokens.values()))
        needed, asked = source.stats["vocab_size"], self.model.vocab_size
        if asked is not None and asked < needed:
            raise ConfigError(
                f"{task}.model.vocab_size: wanted at least {needed}, the vocabulary of {source.path}, found {asked}; "
                "leave it null to take that"
            )
        return self.model if asked else self.model.model_copy(update={"vocab_size": needed})

    def _feed(self, loader: "Loader", step: int, rank: int, shape: "BatchShape") -> "Batch":
        import torch

        from pipeline.text.loader import IGNORED
        from pipeline.training.loop import Batch

        first = rank * shape.rows_per_rank
        rows = loader.read(step, slice(first, first + shape.rows_per_rank), documents=self.document_mask)
        fed: list[npt.NDArray[Any]] = [rows.inputs, rows.labels]
        if rows.documents is not None:
            fed.append(rows.documents)
        size = len(rows.labels) // shape.accumulation  # while the length warms up, several rows for each sample
        microbatches: list[tuple[torch.Tensor, ...]] = [
            tuple(torch.from_numpy(array[start : start + size]) for array in fed)
            for start in range(0, len(rows.labels), size)
        ]
        return Batch(microbatches, weight=int((rows.labels != IGNORED).sum()), tokens=rows.labels.size)

    def _validate(
        self, module: "torch.nn.Module", held: "Mapping[str, TokenStream]", mpu: "DataParallelUnit"
    ) -> dict[str, float]:
        """Score held-out sequences of every source spread evenly over its stream, shared among the ranks."""
        from pipeline.training.metrics import Score

        scores = {name: self._score(module, stream, mpu) for name, stream in held.items()}
        numbers = {}
        if len(scores) > 1:
            for name, score in scores.items():
                numbers[f"validation_loss.{name}"] = score.loss
                numbers[f"validation_bits_per_byte.{name}"] = score.bits_per_byte(held[name])
        whole = Score(sum(s.nats for s in scores.values()), sum(s.tokens for s in scores.values()))
        num_bytes = sum(s.tokens * held[name].num_bytes / held[name].num_tokens for name, s in scores.items())
        return numbers | {
            "validation_loss": whole.loss,
            "validation_bits_per_byte": whole.nats / num_bytes / math.log(2),
        }

    def _score(self, module: "torch.nn.Module", held: "TokenStream", mpu: "DataParallelUnit") -> "Score":
        import torch
        import torch.distributed as dist

        from pipeline.training.metrics import Score, num_windows, score

        total = num_windows(held, self.seq_len)
        count = min(self.validation_sequences, total)
        windows: list[int | None] = [i * total // count for i in range(count)]
        windows += [None] * (-count % mpu.world)
        mine = windows[mpu.rank :: mpu.world]
        found = score(module, held, self.seq_len, VALIDATION_ROWS, held.end_of_text, mine, self.document_mask)
        device = next(module.parameters()).device
        sums = torch.tensor([found.nats, found.tokens], dtype=torch.float64, device=device)
        dist.all_reduce(sums, group=mpu.data_group)
        return Score(sums[0].item(), int(sums[1].item()))

    def _write(self, ctx: Context, config: Decoder, weights: "Mapping[str, torch.Tensor]", tokens: Artifact) -> None:
        from pipeline.models.transformer import Transformer, save_model
        from pipeline.training.loop import write_model

        write_model(ctx, tokens.file(TOKENIZER), lambda directory: save_model(directory, Transformer(config), weights))
        ctx.output.stats |= {
            "steps": self.steps,
            "tokens": self.steps * self.batch_tokens,
            "parameters": config.num_params(),
            "vocab_size": config.vocab_size,
            "end_of_text_id": tokens.stats["end_of_text_id"],
        }


def check_tokenizer(wanted: Artifact, tokens: Artifact) -> None:
    """Refuse tokens that were not made with the tokenizer of another artifact. Raises ArtifactError."""
    if wanted.manifest.files.get(TOKENIZER) != tokens.manifest.files.get(TOKENIZER):
        raise ArtifactError(
            f"{tokens.place}: its tokenizer (vocabulary of {tokens.stats['vocab_size']}) is not the one of "
            f"{wanted.place} (vocabulary of {wanted.stats['vocab_size']}); tokenize with that one"
        )


def load_language_model(source: Artifact) -> "Transformer":
    """Load the model of an artifact, after a check of its files. Raises ArtifactError if it is a classifier."""
    from pipeline.models.transformer import Transformer, load_model

    for name in source.names:
        source.file(name)
    model = load_model(source.path)
    if not isinstance(model, Transformer):
        raise ArtifactError(f"{source.path}: wanted a language model, found a classifier")
    return model


def check_engine(rows: int, field: str, stage: "Pretrain | Finetune", run: Run) -> Iterator[tuple[str, str]]:
    """Yield what DeepSpeed's settings cannot be made of: a batch that does not divide, a contradiction."""
    try:
        shape = shape_batch(rows, run.microbatch_sequences, run.ranks)
    except ConfigError as error:
        yield field, str(error)
        return
    try:
        deepspeed_json(
            EngineSettings(shape, run.parallel.zero, stage.precision, stage.clip_norm, run.parallel.deepspeed)
        )
    except ConfigError as error:
        yield from ((field, problem) for problem in error.problems)
