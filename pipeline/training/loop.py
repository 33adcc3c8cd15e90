"""The training loop, from top to bottom: restore, then for every step feed, reduce, log, validate, save, stop.

Everything that a step does follows from its number: its rows, its learning rate, its random numbers. So a run that
is killed anywhere and started again ends, on the same layout, in the same bits.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import Preempted, TrainingError
from pipeline.parallel.engine import EngineSettings, Precision, build_engine
from pipeline.parallel.mesh import BatchShape, Mesh, shape_batch
from pipeline.settings import Settings
from pipeline.stage import Context
from pipeline.text.tokenizers import TOKENIZER
from pipeline.track import METRICS
from pipeline.training.averaging import AnyAverage, evaluation_weights
from pipeline.training.checkpoint import load_checkpoint, save_checkpoint
from pipeline.training.feed import Feeder
from pipeline.training.optim import AnyOptimizer
from pipeline.training.schedule import AnySchedule
from pipeline.training.step import Batch, Step, take_step

if TYPE_CHECKING:
    import torch


class Recipe(Settings):
    """What training does, whatever is trained.

    Attributes:
        batch_rows: Rows (sequences or examples) of one global batch.
        validate_every_steps: Steps between two validations; null validates at the end only.
        average: What is evaluated and kept in the end, if not the weights themselves.
    """

    steps: int
    batch_rows: int
    optimizer: AnyOptimizer
    schedule: AnySchedule
    clip_norm: float | None
    precision: Precision
    validate_every_steps: int | None
    seed: int
    average: AnyAverage | None = None

    @classmethod
    def of(cls, stage: Settings, **more: Any) -> "Recipe":
        """Return the recipe of a stage: its settings of the same names, and `more`."""
        shared = {name: getattr(stage, name) for name in cls.model_fields if name in type(stage).model_fields}
        return cls(**shared, **more)


@dataclass
class Trainee:
    """A model with the functions that feed and test it.

    Attributes:
        feed: From a step, a rank and the shape of a batch to what that rank feeds.
        validate: From the model to numbers, the same on every rank.
        checkpoints: Where its checkpoints go.
        coefficients: What each term of the loss is multiplied with; 1 for those not named.
        term_names: How the log calls each term; those not named keep the model's name.
        lr_scales: What the learning rate of a weight is multiplied with, by its name; 1 for those not named.
        after_step: Called with the model after every step, on every rank; what it returns is logged.
        prefix: Put before the name of every logged number.
        label: The same for what a person reads.
        first_step: Added to every logged step, where one artifact holds several trainings.
    """

    model: "torch.nn.Module"
    feed: Callable[[int, int, BatchShape], Batch]
    validate: Callable[["torch.nn.Module"], Mapping[str, float]]
    checkpoints: Path
    coefficients: Mapping[str, float] = field(default_factory=dict)
    term_names: Mapping[str, str] = field(default_factory=dict)
    lr_scales: Mapping[str, float] = field(default_factory=dict)
    after_step: Callable[["torch.nn.Module"], Mapping[str, float]] = lambda module: {}
    prefix: str = ""
    label: str = ""
    first_step: int = 0


@dataclass
class Trained:
    """What came out of training: the engine with the last weights, and the numbers of the last validation."""

    engine: Any
    average: AnyAverage | None = None
    validation: Mapping[str, float] = field(default_factory=dict)

    @contextmanager
    def evaluated(self) -> Iterator["torch.nn.Module"]:
        """Give the model with the weights that are to be evaluated and kept; every rank must come here."""
        with evaluation_weights(self.engine, self.average):
            yield self.engine.module


def train(ctx: Context, mesh: Mesh, recipe: Recipe, trainee: Trainee) -> Trained:
    """Train until the last step, from the newest checkpoint if there is one.

    Raises:
        TrainingError: If the loss is no longer finite, or a checkpoint does not fit this layout.
        Preempted: When a stop was asked for; the state is saved.
    """
    run, zero = ctx.settings, ctx.settings.parallel.zero
    shape = shape_batch(recipe.batch_rows, run.microbatch_sequences, mesh.data)
    settings = EngineSettings(shape, zero, recipe.precision, recipe.clip_norm, run.parallel.deepspeed)
    optimizer = recipe.optimizer.build(trainee.model, trainee.lr_scales)
    if recipe.average is not None:
        recipe.average.attach(optimizer)
    engine = build_engine(trainee.model, optimizer, settings, mesh)
    start = load_checkpoint(engine, trainee.checkpoints, zero, ctx.log)
    if 0 < start < recipe.steps:
        rate = _rate(recipe, start)
        ctx.log(f"{trainee.label}continues after step {start} of {recipe.steps}, learning rate {rate:.2e}")
    trained = Trained(engine, recipe.average)
    progress = ctx.progress(recipe.steps, f"{trainee.label}steps", start)
    with Feeder(lambda step: trainee.feed(step, mesh.data_rank, shape), start + 1, recipe.steps) as feeder:
        for step in range(start + 1, recipe.steps + 1):
            numbers, stop = _do_step(ctx, mesh, recipe, trainee, engine, feeder, step)
            last = step == recipe.steps
            if last or (recipe.validate_every_steps and step % recipe.validate_every_steps == 0):
                trained.validation = _validate(ctx, trainee, trained, step)
                numbers |= trained.validation
            _log(ctx, trainee, step, numbers)
            progress.advance(1, f"loss {numbers['loss']:.3f}  {numbers['tokens_per_s']:,.0f} tokens/s")
            if stop or last or step % run.checkpoints.every_steps == 0:
                save_checkpoint(engine, trainee.checkpoints, step, zero, run.checkpoints.keep)
            if stop and not last:
                raise Preempted(f"{ctx.task} after step {step} of {recipe.steps}, state saved")
    progress.close()
    if start == recipe.steps:  # an earlier try did all steps but was ended before the end
        trained.validation = _validate(ctx, trainee, trained, start)
    return trained


def write_model(ctx: Context, tokenizer: Path, save: Callable[[Path], list[str]]) -> None:
    """Put a model, its tokenizer and the metrics of its training into the output, each file in one durable step.

    Args:
        save: Writes the model's files into a directory and returns their names.
    """
    with ctx.scratch() as scratch:
        for name in save(scratch):
            with ctx.output.write(name) as path:
                (scratch / name).rename(path)
    with ctx.output.write(TOKENIZER) as path:
        path.write_bytes(tokenizer.read_bytes())
    if (ctx.directory / METRICS).exists():
        ctx.output.add(METRICS)


def _do_step(
    ctx: Context,
    mesh: Mesh,
    recipe: Recipe,
    trainee: Trainee,
    engine: Any,
    feeder: Feeder[Batch],
    step: int,
) -> tuple[dict[str, float], bool]:
    """Feed one batch and update the weights; return the step's numbers, and whether some rank was asked to stop."""
    began = time.perf_counter()
    batch, waited_s = feeder.take()
    _seed(recipe.seed, step, mesh.data_rank)
    for group in engine.optimizer.param_groups:
        group["lr"] = _rate(recipe, step) * group.get("lr_scale", 1.0)
    done = take_step(engine, mesh, batch, trainee.coefficients)
    losses = _name_losses(done, trainee)
    _check_finite(ctx, trainee, step, losses)
    (stops,) = mesh.sum([ctx.should_stop()], engine.device)
    routed = trainee.after_step(engine.module)
    seconds = time.perf_counter() - began
    return {
        **losses,
        "lr": _rate(recipe, step),
        "grad_norm": done.grad_norm,
        "tokens_per_s": done.tokens / seconds,
        "data_wait_fraction": waited_s / seconds,
        **routed,
    }, stops > 0


def _name_losses(done: Step, trainee: Trainee) -> dict[str, float]:
    """Return the loss that was minimized, and where it has several terms each of them."""
    if len(done.terms) == 1:
        return {"loss": done.loss}
    named = {f"loss.{trainee.term_names.get(term, term)}": mean for term, mean in done.terms.items()}
    return {"loss": done.loss} | named


def _validate(ctx: Context, trainee: Trainee, trained: Trained, step: int) -> Mapping[str, float]:
    with trained.evaluated() as module:
        numbers = trainee.validate(module)
    _check_finite(ctx, trainee, step, numbers)
    return numbers


def _check_finite(ctx: Context, trainee: Trainee, step: int, numbers: Mapping[str, float]) -> None:
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise TrainingError(
                f"{ctx.task}: the {trainee.prefix}{name} of step {step} is {value}; the checkpoints before it stay in "
                f"{trainee.checkpoints}; a lower optimizer.lr or a clip_norm often helps"
            )


def _rate(recipe: Recipe, step: int) -> float:
    return recipe.optimizer.lr * recipe.schedule.factor(step, recipe.steps)


def _seed(seed: int, step: int, rank: int) -> None:
    """Make dropout a function of (seed, step, rank): nothing to save, and the same after a resume."""
    import torch

    torch.manual_seed(((seed * 1_000_003 + step) * 1_000_003 + rank) % 2**63)


def _log(ctx: Context, trainee: Trainee, step: int, numbers: Mapping[str, float]) -> None:
    tracker = ctx.tracker(trainee.first_step + step - 1)
    tracker.log(trainee.first_step + step, {f"{trainee.prefix}{name}": value for name, value in numbers.items()})
