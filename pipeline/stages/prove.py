"""The layout equivalence certificate: whatever the layout, training learns the same."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

import pipeline
from pipeline.artifact import write_json
from pipeline.errors import ConfigError, TrainingError
from pipeline.models.config import AnyModel, Decoder
from pipeline.models.weights import tensor_problems
from pipeline.parallel.engine import deepspeed_json
from pipeline.parallel.mesh import BatchShape
from pipeline.stage import Context, Run, Stage, Stats
from pipeline.training.certificate.layouts import DEGREES, PRECISIONS, Layout, batch_rows, covering, possible, worlds
from pipeline.training.certificate.verdict import BOUNDS, ERRORS, worst_first
from pipeline.training.optim import AdamW, AnyOptimizer

if TYPE_CHECKING:
    from pipeline.models.transformer import Transformer
    from pipeline.parallel.mesh import Mesh

CERTIFICATE = "certificate.json"
VOCAB_SIZE = 61  # of a model that leaves it to the tokens: a prime, so that the last of its rows are padding
SEQ_LEN = 16
CLIP_NORM = 1.8  # of the norms of the default training's gradients some are larger, some smaller
SHOWN = 3  # layouts that an error names


class Prove(Stage):
    """Trains one tiny model under every layout that the ranks can hold, and compares with one process in plain torch.

    Layouts differ in ZeRO stage, data and tensor parallelism, accumulation, sequence parallelism, activation
    checkpointing and offload, whatever `run.parallel` says of them; `run.parallel.deepspeed` is tried too. Losses,
    gradient norms and weights must be the same but for rounding, in fp64 where DeepSpeed can, in fp32 and in bf16.

    Attributes:
        model: It should be tiny: it is trained some sixty times. Tensor parallelism of 2 and 4 must be able to cut it.
            Dropout has trials of its own, in which every model has some.
        optimizer: AdamW's eps is to be larger than what rounding makes of gradients that are zero: by a smaller one it
            divides them until they are steps like all others.
        seq_len: Positions of a sequence.
        full: Every layout there is, and not only so many that any two choices meet in one.
    """

    version: ClassVar[int] = 1
    produces: ClassVar[str] = "certificate"
    ranks: ClassVar[Literal["one", "units", "group"]] = "group"

    kind: Literal["prove"] = "prove"
    model: AnyModel = Decoder(
        vocab_size=VOCAB_SIZE,
        vocab_multiple=8,
        d_model=32,
        num_layers=2,
        num_heads=8,
        num_kv_heads=4,
        d_ff=48,
        norm="layernorm",
        qk_norm=True,
        bias=True,
        init_std=0.1,
    )
    optimizer: AnyOptimizer = AdamW(lr=3e-3, eps=1e-4)
    steps: int = Field(default=24, ge=4)
    seq_len: int = Field(default=SEQ_LEN, ge=2)
    seed: int = Field(default=0, ge=0)
    full: bool = False

    @property
    def settled_model(self) -> AnyModel:
        """The model without dropout, and with a vocabulary if it has none of its own."""
        return self.model.model_copy(update={"vocab_size": self.model.vocab_size or VOCAB_SIZE, "dropout": 0.0})

    def layouts(self, run: Run) -> list[Layout]:
        """Return the layouts that are tried, those with most ranks first."""
        chosen: list[Layout] = []
        for precision in PRECISIONS:
            every = list(possible(run.ranks, precision, run.parallel, offload=not self.optimizer.needs_matrices))
            chosen += every if self.full else covering(every)
        return sorted(chosen, key=lambda layout: (-layout.world, layout.tensor, PRECISIONS.index(layout.precision)))

    def identity(self, run: Run) -> Mapping[str, Any]:
        """Return what else a certificate is about: the ranks, and the libraries."""
        libraries = {name: version(name) for name in ("torch", "deepspeed")}
        return {"ranks": run.ranks, "extra": run.parallel.deepspeed, "pipeline": pipeline.__version__, **libraries}

    def check(self, upstream: Mapping[str, Stage], run: Run) -> Iterator[tuple[str, str]]:
        """Refuse a model that the ranks cannot share, and sequences that it cannot read or they cannot share."""
        for degree in DEGREES:
            if degree > 1 and any(world % degree == 0 for world in worlds(run.ranks)):
                problems = tensor_problems(self.settled_model, degree, [self.seq_len])
                yield from (("model", f"under tensor parallelism of {degree}, {problem}") for problem in problems)
        if self.seq_len > self.model.max_seq_len:
            yield "seq_len", f"{self.seq_len} is longer than the model's max_seq_len ({self.model.max_seq_len})"
        yield from self.optimizer.check(run)
        try:
            deepspeed_json(Layout("fp32", 1).engine(BatchShape(1, 1, 1, 1), run.parallel, None))
        except ConfigError as error:
            yield from (("steps", problem) for problem in error.problems)

    def disk_bytes(self, input_bytes: int, run: Run) -> int:
        """A small file."""
        return 1 << 20

    @classmethod
    def headline(cls, stats: Stats) -> tuple[str, str]:
        """Return how many layouts were tried, and how far the weights of the worst are off in fp32."""
        tried = f"{stats['layouts']} layouts on up to {stats['ranks']} ranks"
        return tried, f"all like one process: weights at most {stats['worst.fp32.weights']:.0e} off in fp32"

    def run(self, ctx: Context) -> None:
        """Try every layout; rank 0 writes the table, and refuses to certify what is further off than rounding.

        Raises:
            TrainingError: Naming the layouts that are furthest off.
        """
        from pipeline.stages.preparing import coefficients
        from pipeline.training.certificate.rounds import certify
        from pipeline.training.certificate.trial import Trial
        from pipeline.training.objectives import Causal

        config, layouts = self.settled_model, self.layouts(ctx.settings)
        trial = Trial(
            model=config,
            make=lambda config, layout, mesh: self._make(ctx, config, layout, mesh),
            optimizer=self.optimizer,
            seed=self.seed,
            batch_rows=batch_rows(ctx.settings.ranks),
            seq_len=self.seq_len,
            clip_norm=CLIP_NORM,
            coefficients=coefficients(Causal(), config),
            like=ctx.settings.parallel,
        )
        rows = certify(ctx, trial, layouts, self.steps)
        if ctx.rank != 0:
            return
        with ctx.output.write(CERTIFICATE) as path:
            write_json(path, {"bounds": {p: asdict(b) for p, b in BOUNDS.items()}, "rows": [row.json for row in rows]})
        wrong = worst_first(rows)
        if wrong:
            named = "; ".join(f"{row.name}: {row.problems[0]}" for row in wrong[:SHOWN])
            raise TrainingError(
                f"{ctx.task}: {len(wrong)} of {len(rows)} rows are not what one process does ({named}); the table is "
                f"in {ctx.directory / CERTIFICATE}; do not train with a layout that is named there"
            )
        ctx.output.stats |= {"layouts": len(layouts), "rows": len(rows), "ranks": ctx.settings.ranks}
        for precision, name in product(PRECISIONS, ERRORS):
            if errors := [getattr(row, name) for row in rows if row.precision == precision]:
                ctx.output.stats[f"worst.{precision}.{name}"] = max(errors)

    def _make(self, ctx: Context, config: AnyModel, layout: Layout, mesh: "Mesh") -> "Transformer":
        """Return this rank's part of the model, made as pretraining makes it."""
        import torch

        from pipeline.models.initial import first_weight
        from pipeline.models.transformer import Transformer
        from pipeline.stages.preparing import give_weights

        with torch.device("meta"):
            model = Transformer(config)
        if layout.precision == "fp64":
            model.double()
        parallel = layout.parallel(ctx.settings.parallel)
        here = replace(ctx, settings=ctx.settings.model_copy(update={"parallel": parallel}))

        def value(name: str, shape: tuple[int, ...]) -> torch.Tensor:
            return first_weight(config, name, shape, self.seed)

        give_weights(model, value, layout.engine_precision, here, mesh)
        return model
