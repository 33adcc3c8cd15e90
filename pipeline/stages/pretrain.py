"""Pretraining: from token parts to a language model."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from pipeline.artifact import Artifact
from pipeline.errors import ConfigError
from pipeline.models.config import AnyModel, Decoder
from pipeline.models.transfer import describe_misfits, misfits
from pipeline.parallel.engine import Precision
from pipeline.settings import Input
from pipeline.stage import CHECKPOINTS, Context, Run, Stage, Stats, TaskName
from pipeline.stages.engine_checks import check_engine
from pipeline.stages.finetune import refuse_classifier
from pipeline.stages.input_checks import check_pretraining
from pipeline.stages.loading import check_tokenizer, model_settings, planned_model
from pipeline.stages.preparing import (
    INIT_FROM,
    TEACHER,
    Question,
    build_model,
    check_special_tokens,
    coefficients,
    describe,
    make_examples,
    open_held,
    settle_model,
)
from pipeline.stages.tokenize import Tokenize
from pipeline.stages.writing import write_model
from pipeline.text.mixture import AnyMixture, Temperature, check_names
from pipeline.text.packing import AnyPacking, Contiguous, WarmUp, check_warmup
from pipeline.text.tokenizers import TOKENIZER
from pipeline.training.averaging import AnyAverage
from pipeline.training.checkpoints.retention import checkpoint_bytes, most_at_once
from pipeline.training.guard import Guard
from pipeline.training.memory import state_bytes
from pipeline.training.objectives import AnyObjective, Causal
from pipeline.training.optim import AnyOptimizer, Muon
from pipeline.training.schedule import AnySchedule, Linear

if TYPE_CHECKING:
    import torch

    from pipeline.models.transformer import Transformer
    from pipeline.parallel.mesh import Mesh
    from pipeline.text.loader import Loader, Order
    from pipeline.training.objectives.batch import Examples
    from pipeline.training.trainee import Trained
    from pipeline.training.validation import Validation


class Pretrain(Stage):
    """Trains a language model on rows of tokens: a mixture of sources, packed, in an order that is pure mathematics.

    Attributes:
        tokens: The tokens to train on; several under names of your own, which `mixture` uses: {web: "@a", code: "@b"}.
        mixture: How the sources share the training; by default in proportion to their sizes.
        max_epochs: How often a source may be gone through at most, unless `mixture` says the epochs itself; null has
            no limit. Up to about four times is nearly as good as new text (Muennighoff et al. 2023, arXiv:2305.16264).
        packing: How documents become rows.
        document_mask: Whether the documents of a row are kept apart: none sees another, positions count from each
            one's beginning.
        objective: What the model is trained to do.
        model: Null is the one of `init_from`, and without that the plain decoder.
        init_from: A model whose weights are the first ones; its tokenizer must be that of the tokens. With a `model`
            too, the two may differ in what has no weights, in heads and in the padding of the vocabulary.
        seq_len: Positions of a training sequence, of an encoder-decoder those of its encoder.
        seq_len_warmup: Shorter sequences at the beginning: each row is cut into several, the batch stays the same.
        batch_tokens: Positions of one optimizer step, over all ranks.
        optimizer: The defaults, and those of `schedule`, suit some million parameters and some million tokens
            (`bench/quality.py`); larger models want smaller rates.
        label_smoothing: Share of the target that is spread over the whole vocabulary (Szegedy et al. 2016,
            arXiv:1512.00567); in training only.
        z_loss: Weight of the squared logarithm of the softmax's normalizer (PaLM, arXiv:2204.02311, section 5); in
            training only.
        average: An average of the weights to validate with and to keep; null takes the last weights.
        clip_norm: Largest global gradient norm; null does not clip.
        guard: What is done about steps whose loss or gradient is far off.
        validation_sequences: How many held-out sequences of each source a validation during training looks at; the
            validation loss is the mean over all their tokens.
        validate_every_steps: Steps between two validations; null validates at the end only.
    """

    version: ClassVar[int] = 3
    produces: ClassVar[str] = "model"
    ranks: ClassVar[Literal["one", "units", "group"]] = "group"

    kind: Literal["pretrain"] = "pretrain"
    tokens: Annotated[str | Annotated[dict[TaskName, str], Field(min_length=1)], Input("tokens")]
    mixture: AnyMixture = Temperature()
    max_epochs: float | None = Field(default=4.0, gt=0)
    packing: AnyPacking = Contiguous()
    document_mask: bool = True
    objective: AnyObjective = Causal()
    model: AnyModel | None = None
    init_from: Annotated[str | None, Input("model")] = None
    seq_len: int = Field(default=256, ge=1)
    seq_len_warmup: list[WarmUp] = []
    batch_tokens: int = Field(default=2048, ge=1)
    steps: int = Field(ge=1, le=10**12)
    optimizer: AnyOptimizer = Muon()
    schedule: AnySchedule = Linear()
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    z_loss: float = Field(default=0.0, ge=0)
    average: AnyAverage | None = None
    clip_norm: float | None = Field(default=1.0, gt=0)
    precision: Precision = "fp32"
    guard: Guard = Guard()
    validation_sequences: int = Field(default=64, ge=1)
    validate_every_steps: int | None = Field(default=100, ge=1)
    seed: int = Field(default=0, ge=0)

    def check(self, upstream: Mapping[str, Stage], run: Run) -> Iterator[tuple[str, str]]:
        """Refuse what the objective, the model and the tokens do not have in common, and batches that do not divide."""
        yield from self._check_tokens(upstream)
        yield from self._check_lengths()
        for field in (INIT_FROM, TEACHER):
            yield from refuse_classifier(upstream, field)
        planned = {field: planned_model(upstream[field]) for field in (INIT_FROM, TEACHER) if field in upstream}
        yield from self._check_models(planned.get(INIT_FROM), planned.get(TEACHER))
        yield from self.optimizer.check(run)
        if self.average is not None:
            yield from self.average.check(self.optimizer)
        if self.batch_tokens % self.seq_len:
            yield "batch_tokens", f"{self.batch_tokens} does not divide into sequences of {self.seq_len} tokens"
            return
        yield from check_engine(self.batch_rows, "batch_tokens", self, run, self.planned_model, self.lengths)

    def check_inputs(self, inputs: Mapping[str, Artifact], run: Run) -> Iterator[tuple[str, str]]:
        """Refuse what models and tokens do not have in common, too few tokens, and none that are held out."""
        made = {field: model_settings(inputs[field]) for field in (INIT_FROM, TEACHER) if field in inputs}
        yield from self._check_models(made.get(INIT_FROM), made.get(TEACHER))
        yield from check_pretraining(self, inputs, run)

    def _check_tokens(self, upstream: Mapping[str, Stage]) -> Iterator[tuple[str, str]]:
        makers = [upstream[field] for field in self.sources.values() if field in upstream]
        if makers and all(isinstance(maker, Tokenize) and not maker.held_out_fraction for maker in makers):
            yield "tokens", "nothing is held out to validate on; give tokenize a held_out_fraction above 0"
        for field in self.sources.values():
            yield from check_special_tokens(self.objective, field, upstream.get(f"{field}/tokenizer"))
        for name, problem in check_names(self.mixture, list(self.sources)):
            yield f"mixture.{name}", problem

    def _check_lengths(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with shorter sequences at the beginning."""
        yield from check_warmup(self.seq_len_warmup, self.seq_len)
        row_tokens = self.objective.row_tokens(self.seq_len)
        if self.seq_len_warmup and row_tokens != self.seq_len:
            yield (
                "seq_len_warmup",
                f"'{self.objective.kind}' makes {self.seq_len} positions of {row_tokens} tokens, so its rows cannot "
                "be cut into shorter ones; leave it empty",
            )

    def _check_models(self, source: AnyModel | None, teacher: AnyModel | None) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with the model, the one it begins with and its teacher, as far as they are known."""
        config = self.planned_model or source
        if config is None:
            return
        yield from self.question.check(config)
        if source is not None and (problems := list(misfits(config, source))):
            yield "model", describe_misfits(problems)
        if teacher is None:
            return
        if teacher.kind != config.kind:
            yield TEACHER, f"wanted a model of kind '{config.kind}', found one of kind '{teacher.kind}'"
        if self.seq_len > teacher.max_seq_len:
            yield TEACHER, f"reads {teacher.max_seq_len} positions, fewer than seq_len ({self.seq_len})"
        if (targets := self.objective.target_len(self.seq_len)) > teacher.max_seq_len:
            yield (
                TEACHER,
                f"its decoder reads {teacher.max_seq_len} positions, fewer than the {targets} targets of a row",
            )

    @property
    def planned_model(self) -> AnyModel | None:
        """The settings of the model, if nobody has to look into `init_from` for them."""
        return self.model or (Decoder() if self.init_from is None else None)

    @property
    def question(self) -> Question:
        """What the model is asked."""
        return Question(self.objective, self.seq_len, self.document_mask)

    @property
    def lengths(self) -> list[int]:
        """How long the sequences are that a model reads, and those that its decoder reads if it is another one."""
        return [self.seq_len, *(part.seq_len for part in self.seq_len_warmup), self.objective.target_len(self.seq_len)]

    @property
    def batch_rows(self) -> int:
        """Sequences of one batch."""
        return self.batch_tokens // self.seq_len

    @property
    def sources(self) -> dict[str, str]:
        """The setting that names the tokens of each source, by the source's name; a single one is called "tokens"."""
        return (
            {name: f"tokens.{name}" for name in self.tokens} if isinstance(self.tokens, dict) else {"tokens": "tokens"}
        )

    def disk_bytes(self, input_bytes: int, run: Run) -> int:
        """The weights, and for every checkpoint and the one being written them twice and what the optimizer keeps.

        Nothing where only `init_from` says how large the model is.
        """
        model = self.planned_model
        if model is None:
            return 0
        params = model.model_copy(update={"vocab_size": model.vocab_size or 2**16}).num_params()
        return 4 * params + most_at_once(run.checkpoints, self.steps) * checkpoint_bytes(params, self.state_copies)

    def memory_bytes(self, upstream: Mapping[str, Stage], run: Run) -> int | None:
        """Weights, gradients and what the optimizer keeps, without activations: see `state_bytes`.

        Not known where only an artifact says how large the model or its vocabulary is.
        """
        model = self.planned_model or (planned_model(upstream[INIT_FROM]) if INIT_FROM in upstream else None)
        if model is None:
            return None
        makers = [upstream.get(f"{field}/tokenizer") for field in self.sources.values()]
        vocab_size = model.vocab_size or next((getattr(maker, "vocab_size", None) for maker in makers), None)
        if vocab_size is None:
            return None
        params = model.model_copy(update={"vocab_size": vocab_size}).num_params()
        return state_bytes(params, self.state_copies, self.precision, run)

    @property
    def state_copies(self) -> int:
        """Numbers that optimizer and average keep for each weight."""
        return self.optimizer.state_copies + (self.average.state_copies if self.average else 0)

    @classmethod
    def headline(cls, stats: Stats) -> tuple[str, str]:
        """Return steps and tokens seen, and the held-out loss, with its terms if there are several."""
        seen = f"{stats['steps']:,} steps, {stats['tokens']:,} tokens"
        if stats.get("passed_over"):
            seen += f", {stats['passed_over']:,} steps passed over"
        terms = stats.get("terms", [])
        named = ", ".join(f"{name} {stats[f'validation_loss.{name}']:.3f}" for name in terms)
        return seen, f"validation loss {stats['validation_loss']:.3f}{f' ({named})' if named else ''}"

    def run(self, ctx: Context) -> None:
        """Train; rank 0 writes the model, its tokenizer and its metrics."""
        from pipeline.parallel.gathering import full_weights
        from pipeline.training.loop import joined
        from pipeline.training.validation import SEED, Validation

        tokens = {name: ctx.inputs[setting] for name, setting in self.sources.items()}
        first = next(iter(tokens.values()))
        ctx.refuse(self.check_inputs(ctx.inputs, ctx.settings))
        config = settle_model(self, ctx.inputs, first)
        try:
            loader = self.open_loader(tokens)
        except ConfigError as error:
            raise ConfigError(*(f"{ctx.task}.{problem}" for problem in error.problems)) from None
        held = open_held(tokens)
        examples = make_examples(self.question, self.seed, first, config)
        beat = lambda: ctx.beat("validate", None)  # noqa: E731
        validation = Validation(held, replace(examples, seed=SEED), self.validation_sequences, beat)
        for line in describe(self, loader, held):
            ctx.log(line)
        with joined(ctx) as mesh:
            try:
                model = build_model(self, config, ctx, mesh)
            except ConfigError as error:
                raise ConfigError(*(f"{ctx.task}.{problem}" for problem in error.problems)) from None
            trained = self._train(ctx, mesh, model, loader, examples, validation)
            with trained.evaluated():
                weights = full_weights(trained.engine, mesh)
        if ctx.rank == 0:
            self._write(ctx, config, weights, first)
            self._count(ctx, config, loader, trained, first)

    def open_loader(self, tokens: Mapping[str, Artifact]) -> "Loader":
        """Return the loader of tokens artifacts, by source: what it gives follows from these settings and the step.

        Raises:
            ArtifactError: If they were made with different tokenizers, are damaged, or one holds less than a row.
            ConfigError: If the mixture holds less than the steps ask for.
        """
        from pipeline.text.loader import Loader
        from pipeline.text.stream import open_stream

        first, *others = tokens.values()
        for other in others:
            check_tokenizer(first, other)
        return Loader({name: open_stream(artifact) for name, artifact in tokens.items()}, self.order)

    @property
    def order(self) -> "Order":
        """What fixes the order of training."""
        from pipeline.text.loader import Order

        return Order(
            mixture=self.mixture,
            packing=self.packing,
            seq_len=self.objective.row_tokens(self.seq_len),
            batch_rows=self.batch_rows,
            steps=self.steps,
            seed=self.seed,
            warmup=self.seq_len_warmup,
            max_epochs=self.max_epochs,
        )

    def _train(
        self,
        ctx: Context,
        mesh: "Mesh",
        model: "Transformer",
        loader: "Loader",
        examples: "Examples",
        validation: "Validation",
    ) -> "Trained":
        from pipeline.models.files import CONFIG_FILE, describe_model
        from pipeline.models.initial import lr_scales
        from pipeline.models.moe import after_step, forget_step
        from pipeline.training.feed import read_batch
        from pipeline.training.ledger import pieces
        from pipeline.training.loop import train
        from pipeline.training.trainee import Recipe, Trainee

        tokens = ctx.inputs[next(iter(self.sources.values()))]
        trainee = Trainee(
            model=model,
            feed=lambda step, rank, shape: read_batch(examples, loader, step, rank, shape),
            validate=lambda module: validation.run(module, mesh),
            checkpoints=ctx.directory / CHECKPOINTS,
            files={CONFIG_FILE: describe_model(model.config), TOKENIZER: tokens.file(TOKENIZER)},
            about={"precision": self.precision, "end_of_text_id": tokens.stats["end_of_text_id"]},
            num_params=model.config.num_params(),
            coefficients=coefficients(self.objective, model.config),
            term_names=self.objective.term_names,
            lr_scales=lr_scales(model, model.config),
            after_step=lambda module: after_step(module, mesh.data_group),
            forget_step=forget_step,
            documents=lambda step: pieces(loader, step),
        )
        return train(ctx, mesh, Recipe.of(self, batch_rows=self.batch_rows), trainee)

    def _write(self, ctx: Context, config: AnyModel, weights: "Mapping[str, torch.Tensor]", tokens: Artifact) -> None:
        import torch

        from pipeline.models.saved import save_model
        from pipeline.models.transformer import Transformer

        with torch.device("meta"):  # only its settings matter
            model = Transformer(config)
        write_model(ctx, tokens.file(TOKENIZER), lambda directory: save_model(directory, model, weights))

    def _count(self, ctx: Context, config: AnyModel, loader: "Loader", trained: "Trained", tokens: Artifact) -> None:
        """Put the numbers of the model and its training into the manifest."""
        from pipeline.training.metrics import MEASURED

        ctx.output.stats |= trained.validation
        for (name, count), size in zip(loader.counts(self.steps).items(), loader.sizes, strict=True):
            ctx.output.stats[f"epochs.{name}"] = count / size
        names = [self.objective.term_names.get(term, "") for term in MEASURED]
        terms = [name for name in names if f"validation_loss.{name}" in trained.validation]
        ctx.output.stats |= {
            "steps": self.steps,
            "tokens": trained.tokens,
            "passed_over": trained.passed_over,
            "parameters": config.num_params(),
            "vocab_size": config.vocab_size,
            "end_of_text_id": tokens.stats["end_of_text_id"],
            "seq_len": self.seq_len,
            "family": config.kind,
            "objective": self.objective.kind,
            "terms": terms if len(terms) > 1 else [],
        }
