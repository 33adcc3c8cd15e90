"""What training is told: the recipe, whatever is trained, and the model with what feeds and tests it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.parallel.engine import Precision
from pipeline.parallel.mesh import BatchShape
from pipeline.settings import Settings
from pipeline.training.averaging import AnyAverage, evaluation_weights
from pipeline.training.guard import Guard
from pipeline.training.ledger import Piece
from pipeline.training.optim import AnyOptimizer
from pipeline.training.schedule import AnySchedule
from pipeline.training.step import Batch

if TYPE_CHECKING:
    import torch

    from pipeline.parallel.recompute import Kind


class Recipe(Settings):
    """What training does, whatever is trained.

    Attributes:
        batch_rows: Rows (sequences or examples) of one global batch.
        validate_every_steps: Steps between two validations; null validates at the end only.
        average: What is evaluated and kept in the end, if not the weights themselves.
        guard: What is done about steps that go wrong.
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
    guard: Guard = Guard()

    @classmethod
    def of(cls, stage: Settings, **more: Any) -> "Recipe":
        """Return the recipe of a stage: its settings of the same names, and `more`."""
        shared = {name: getattr(stage, name) for name in cls.model_fields if name in type(stage).model_fields}
        return cls(**shared, **more)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, from 1."""
        return self.optimizer.lr * self.schedule.factor(step, self.steps)


@dataclass
class Trainee:
    """A model with the functions that feed and test it.

    Attributes:
        feed: From a step, a data-parallel rank and the shape of a batch to what that rank feeds.
        validate: From the model to numbers, the same on every rank.
        checkpoints: Where its checkpoints go.
        files: What makes a model of each checkpoint beside the weights: files, or what they contain, by name.
        about: What the manifest of such a model says of it.
        num_params: Weights of the whole model.
        coefficients: What each term of the loss is multiplied with; 1 for those not named.
        term_names: How the log calls each term; those not named keep the model's name.
        lr_scales: What the learning rate of a weight is multiplied with, by its name; 1 for those not named.
        after_step: Called with the model after every step that changed it, on every rank; what it returns is logged.
        forget_step: Called instead of it after a step that must change nothing.
        documents: The pieces of documents in the batch of a step.
        name: Tells this training from others of the same artifact.
        label: Put before what a person reads.
        first_step: Added to every logged step, where one artifact holds several trainings.
    """

    model: "torch.nn.Module"
    feed: Callable[[int, int, BatchShape], Batch]
    validate: Callable[["torch.nn.Module"], Mapping[str, float]]
    checkpoints: Path
    files: Mapping[str, Path | bytes] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    num_params: int = 0
    coefficients: Mapping[str, float] = field(default_factory=dict)
    term_names: Mapping[str, str] = field(default_factory=dict)
    lr_scales: Mapping[str, float] = field(default_factory=dict)
    after_step: Callable[["torch.nn.Module"], Mapping[str, float]] = lambda module: {}
    forget_step: Callable[["torch.nn.Module"], None] = lambda module: None
    documents: Callable[[int], Iterable[Piece]] = lambda step: ()
    name: str = ""
    label: str = ""
    first_step: int = 0

    @property
    def prefix(self) -> str:
        """What is put before the name of every logged number."""
        return f"{self.name}/" if self.name else ""


@dataclass
class Trained:
    """What came out of training.

    Attributes:
        engine: Has the last weights.
        validation: The numbers of the last validation.
        tokens: How many were learned from; those of steps that were passed over are not.
        passed_over: How many steps the guard passed over.
    """

    engine: Any
    average: AnyAverage | None = None
    validation: Mapping[str, float] = field(default_factory=dict)
    tokens: int = 0
    passed_over: int = 0

    @contextmanager
    def evaluated(self) -> Iterator["torch.nn.Module"]:
        """Give the model with the weights that are to be evaluated and kept; every rank must come here."""
        with evaluation_weights(self.engine, self.average):
            yield self.engine.module


def prepare_layers(model: "torch.nn.Module", precision: Precision, recomputed: "Kind | None") -> None:
    """Change how the layers of a model compute, before DeepSpeed has it. Raises ConfigError for what cannot be."""
    from pipeline.models.layers import Block
    from pipeline.parallel.recompute import recompute

    if precision == "fp8":
        from pipeline.parallel.fp8 import multiply_in_fp8

        multiply_in_fp8(model)
    recompute([module for module in model.modules() if isinstance(module, Block)], recomputed)
