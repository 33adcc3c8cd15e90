"""Pretraining: from token parts to a language model."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from pipeline.artifact import Artifact
from pipeline.errors import ArtifactError, ConfigError
from pipeline.models.config import Decoder
from pipeline.parallel.engine import EngineSettings, Precision, deepspeed_json
from pipeline.parallel.mesh import shape_batch
from pipeline.settings import Input
from pipeline.stage import CHECKPOINTS, Context, Run, Stage, Stats
from pipeline.text.tokenizers import TOKENIZER
from pipeline.training.optim import AdamW, AnyOptimizer
from pipeline.training.schedule import AnySchedule, Cosine

if TYPE_CHECKING:
    import torch

    from pipeline.models.transformer import Transformer
    from pipeline.parallel.mesh import BatchShape, DataParallelUnit
    from pipeline.stages.finetune import Finetune
    from pipeline.text.loader import SequenceLoader, TokenStream
    from pipeline.training.loop import Batch

VALIDATION_ROWS = 16  # sequences that a validation feeds at once


class Pretrain(Stage):
    """Trains a language model on packed sequences of the documents that are not held out.

    Attributes:
        seq_len: Tokens of a training sequence.
        batch_tokens: Tokens of one optimizer step, over all ranks.
        clip_norm: Largest global gradient norm; null does not clip.
        validation_fraction: Share of the documents that is held out, chosen by the hash of their text.
        validation_sequences: How many held-out sequences a validation during training looks at.
        validate_every_steps: Steps between two validations; null validates at the end only.
    """

    version: ClassVar[int] = 1
    produces: ClassVar[str] = "model"
    ranks: ClassVar[Literal["one", "units", "group"]] = "group"

    kind: Literal["pretrain"] = "pretrain"
    tokens: Annotated[str, Input("tokens")]
    model: Decoder = Decoder()
    seq_len: int = Field(default=256, ge=1)
    batch_tokens: int = Field(default=8192, ge=1)
    steps: int = Field(ge=1)
    optimizer: AnyOptimizer = AdamW()
    schedule: AnySchedule = Cosine()
    clip_norm: float | None = Field(default=1.0, gt=0)
    precision: Precision = "fp32"
    validation_fraction: float = Field(default=0.02, gt=0, lt=1)
    validation_sequences: int = Field(default=64, ge=1)
    validate_every_steps: int | None = Field(default=100, ge=1)
    seed: int = Field(default=0, ge=0)

    def check(self, upstream: Mapping[str, Stage], run: Run) -> Iterator[tuple[str, str]]:
        """Refuse sequences longer than the model's, and batches that do not divide."""
        if self.seq_len > self.model.max_seq_len:
            yield "seq_len", f"{self.seq_len} is longer than the model's max_seq_len of {self.model.max_seq_len}"
        if self.batch_tokens % self.seq_len:
            yield "batch_tokens", f"{self.batch_tokens} does not divide into sequences of {self.seq_len} tokens"
            return
        yield from check_engine(self.batch_tokens // self.seq_len, "batch_tokens", self, run)

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
        from pipeline.text.loader import SequenceLoader, TokenStream
        from pipeline.training.loop import Recipe, Trainee, train

        tokens = ctx.inputs["tokens"]
        config = self._with_vocabulary(ctx)
        paths = [tokens.file(name) for name in tokens.parts()]
        rows = self.batch_tokens // self.seq_len
        loader = SequenceLoader(TokenStream(paths, self.validation_fraction, held=False), self.seq_len, rows, self.seed)
        held = TokenStream(paths, self.validation_fraction, held=True)
        if not held.num_documents:
            raise ArtifactError(
                f"{ctx.task}.validation_fraction: {self.validation_fraction} of {loader.stream.num_documents} "
                "documents holds out none; hold out more or use more text"
            )
        model = Transformer(config)
        init_weights(model, self.seed)
        ctx.log(
            f"{config.num_params():,} parameters; {loader.stream.num_tokens:,} training tokens in "
            f"{loader.stream.num_documents:,} documents, {held.num_tokens:,} held out in {held.num_documents:,}"
        )
        recipe = Recipe.of(self, batch_rows=rows)
        with process_group() as mpu:
            trainee = Trainee(
                model=model,
                feed=lambda step, rank, shape: self._feed(loader, step, rank, shape),
                validate=lambda module: self._validate(module, held, mpu, tokens.stats["end_of_text_id"]),
                checkpoints=ctx.directory / CHECKPOINTS,
            )
            trained = train(ctx, mpu, recipe, trainee)
            weights = full_weights(trained.engine)
        if ctx.rank == 0:
            ctx.output.stats |= trained.validation
            self._write(ctx, config, weights)

    def _with_vocabulary(self, ctx: Context) -> Decoder:
        """Return the model's settings with the vocabulary of the tokens."""
        needed, asked = ctx.inputs["tokens"].stats["vocab_size"], self.model.vocab_size
        if asked is not None and asked < needed:
            raise ConfigError(
                f"{ctx.task}.model.vocab_size: wanted at least {needed}, the vocabulary of "
                f"{ctx.inputs['tokens'].path}, found {asked}; leave it null to take that"
            )
        return self.model if asked else self.model.model_copy(update={"vocab_size": needed})

    def _feed(self, loader: "SequenceLoader", step: int, rank: int, shape: "BatchShape") -> "Batch":
        import torch

        from pipeline.training.loop import Batch

        rows = loader.rows(step)
        microbatches: list[tuple[torch.Tensor, ...]] = []
        for mine in shape.microbatches(rank):
            inputs, labels = loader.read(rows[mine])
            microbatches.append((torch.from_numpy(inputs), torch.from_numpy(labels)))
        return Batch(microbatches, weight=self.batch_tokens, tokens=self.batch_tokens)

    def _validate(
        self, module: "torch.nn.Module", held: "TokenStream", mpu: "DataParallelUnit", end_of_text: int
    ) -> dict[str, float]:
        """Score held-out sequences spread evenly over the stream, shared among the ranks."""
        import torch
        import torch.distributed as dist

        from pipeline.training.metrics import Score, num_windows, score

        total = num_windows(held, self.seq_len)
        count = min(self.validation_sequences, total)
        windows: list[int | None] = [i * total // count for i in range(count)]
        windows += [None] * (-count % mpu.world)
        mine = score(module, held, self.seq_len, VALIDATION_ROWS, end_of_text, windows[mpu.rank :: mpu.world])
        device = next(module.parameters()).device
        sums = torch.tensor([mine.nats, mine.tokens], dtype=torch.float64, device=device)
        dist.all_reduce(sums, group=mpu.data_group)
        whole = Score(sums[0].item(), int(sums[1].item()))
        return {"validation_loss": whole.loss, "validation_bits_per_byte": whole.bits_per_byte(held)}

    def _write(self, ctx: Context, config: Decoder, weights: "Mapping[str, torch.Tensor]") -> None:
        from pipeline.models.transformer import Transformer, save_model
        from pipeline.training.loop import write_model

        tokenizer = ctx.inputs["tokens"].file(TOKENIZER)
        write_model(ctx, tokenizer, lambda directory: save_model(directory, Transformer(config), weights))
        ctx.output.stats |= {
            "steps": self.steps,
            "tokens": self.steps * self.batch_tokens,
            "parameters": config.num_params(),
            "vocab_size": config.vocab_size,
            "end_of_text_id": ctx.inputs["tokens"].stats["end_of_text_id"],
        }


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
