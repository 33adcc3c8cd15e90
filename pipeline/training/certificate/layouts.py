"""Which layouts a certificate tries. Arithmetic alone: known before anything runs."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import combinations, product
from typing import Any, Literal

from pipeline.errors import ConfigError
from pipeline.parallel.engine import EngineSettings, deepspeed_json
from pipeline.parallel.engine import Precision as EnginePrecision
from pipeline.parallel.mesh import BatchShape
from pipeline.stage import Parallel

Precision = Literal["fp64", "fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp64", "fp32", "bf16")
Recompute = Literal["full", "selective"] | None
DEGREES = (1, 2, 4)  # of tensor parallelism
RECOMPUTES: tuple[Recompute, ...] = (None, "full", "selective")
OFFLOADS: tuple[Literal["cpu"] | None, ...] = (None, "cpu")
LEAST_ROWS = 8  # of a batch


@dataclass(frozen=True)
class Layout:
    """One way to spread a training over ranks; the names are those of `run.parallel`.

    Attributes:
        precision: "fp64" is for ZeRO 0 alone: the optimizers of the other stages keep fp32.
        data: Ranks that feed different rows.
        accumulation: Microbatches of a step on each rank.
    """

    precision: Precision
    zero: int
    data: int = 1
    tensor: int = 1
    accumulation: int = 1
    sequence: bool = False
    activation_checkpointing: Recompute = None
    offload: Literal["cpu"] | None = None

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.data * self.tensor

    @property
    def name(self) -> str:
        """Return it in words, such as "fp32 zero 1, data 2 x tensor 2, sequence"."""
        parts = [f"{self.precision} zero {self.zero}", f"data {self.data} x tensor {self.tensor}"]
        parts += [f"accumulation {self.accumulation}"] if self.accumulation > 1 else []
        parts += ["sequence"] if self.sequence else []
        parts += [f"{self.activation_checkpointing} recomputation"] if self.activation_checkpointing else []
        parts += [f"offload {self.offload}"] if self.offload else []
        return ", ".join(parts)

    def parallel(self, like: Parallel) -> Parallel:
        """Return it as the settings of a run, with what `like` says of DeepSpeed."""
        names = ("zero", "tensor", "sequence", "activation_checkpointing", "offload")
        return like.model_copy(update={name: getattr(self, name) for name in names})

    @property
    def engine_precision(self) -> EnginePrecision:
        """The precision that DeepSpeed is told; what is fp64 are the weights that it is given."""
        return "bf16" if self.precision == "bf16" else "fp32"

    def engine(self, shape: BatchShape, like: Parallel, clip_norm: float | None) -> EngineSettings:
        """Return the settings of its engine."""
        return EngineSettings.of(shape, self.parallel(like), self.engine_precision, clip_norm)

    @property
    def choices(self) -> dict[str, Any]:
        """Return what was chosen of each factor; the degrees are one, since they depend on one another."""
        chosen = {name: value for name, value in asdict(self).items() if name not in ("precision", "data", "tensor")}
        return {"mesh": (self.data, self.tensor), **chosen}


def worlds(ranks: int) -> list[int]:
    """Return how many processes the layouts use, most first: all, half of them, and so on down to one."""
    found = [ranks]
    while found[-1] > 1:
        found.append(found[-1] // 2 if found[-1] % 2 == 0 else 1)
    return found


def batch_rows(ranks: int) -> int:
    """Return how many rows a batch has, so that every layout can share them, in two microbatches or in one."""
    return 2 * ranks * -(-LEAST_ROWS // (2 * ranks))


def possible(ranks: int, precision: Precision, like: Parallel, offload: bool = True) -> Iterator[Layout]:
    """Yield every layout that so many processes can hold in a precision, those with most processes first.

    Args:
        like: What else is said of the layouts; those that cannot be trained with it are left out.
        offload: Whether the optimizer's state may be elsewhere than the weights.
    """
    shape = BatchShape(1, 1, 1, 1)  # which says nothing of what can be combined
    zeros = (0,) if precision == "fp64" else (0, 1, 2, 3)
    for world, tensor in product(worlds(ranks), DEGREES):
        if world % tensor:
            continue
        for zero, accumulation, again, where in product(zeros, (1, 2), RECOMPUTES, OFFLOADS[: 1 + offload]):
            for sequence in (False, True) if tensor > 1 else (False,):
                layout = Layout(precision, zero, world // tensor, tensor, accumulation, sequence, again, where)
                with suppress(ConfigError):
                    deepspeed_json(layout.engine(shape, like, None))
                    yield layout


def covering(layouts: Sequence[Layout]) -> list[Layout]:
    """Return some of the layouts, in their order, so that any two choices that occur together in one still do.

    Few faults need three choices at once to show (Kuhn, Wallace and Gallo 2004, "Software fault interactions and
    implications for software testing", IEEE TSE 30(6)). Taken greedily: each time the one with most that is new, of
    these the one whose choices were made least often.
    """
    pairs = {layout: set(combinations(layout.choices.items(), 2)) for layout in layouts}
    missing: set[Any] = set().union(*pairs.values())
    chosen: set[Layout] = set()
    made: Counter[Any] = Counter()
    while missing:
        best = max(
            layouts, key=lambda layout: (len(pairs[layout] & missing), -sum(made[c] for c in layout.choices.items()))
        )
        chosen.add(best)
        made.update(best.choices.items())
        missing -= pairs[best]
    return [layout for layout in layouts if layout in chosen]
