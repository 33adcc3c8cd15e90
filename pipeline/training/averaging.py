"""Averages of the weights over training, for evaluation: they do not change what is learned.

They are kept beside the optimizer's own state, as long as the weights and cut like them: so every checkpoint has them,
and they are the same for any number of ranks and any ZeRO stage.
"""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from pipeline.settings import Choice
from pipeline.training.optim import AnyOptimizer, ScheduleFreeAdamW

if TYPE_CHECKING:
    import torch

    State = dict[str, Any]


class Average(Choice):
    """An average of the weights; `attach` it to the optimizer before the first step or the loading of a checkpoint."""

    def attach(self, optimizer: "torch.optim.Optimizer") -> None:
        """Keep the average from now on: after each of the optimizer's steps its state is updated."""
        optimizer.register_step_post_hook(self._update)

    def check(self, optimizer: AnyOptimizer) -> Iterator[tuple[str, str]]:
        """Yield (setting, problem) for what cannot work."""
        if isinstance(optimizer, ScheduleFreeAdamW):
            yield "average", f"'{optimizer.kind}' keeps an average itself and evaluates that; leave average null"

    @property
    @abstractmethod
    def state_copies(self) -> int:
        """Return how many numbers it keeps for each weight."""

    @abstractmethod
    def point(self, weights: "torch.Tensor", state: "State") -> "torch.Tensor":
        """Return the average, a new tensor, given the newest weights and their state."""

    @abstractmethod
    def _keep(self, weights: "torch.Tensor", state: "State") -> None:
        """Take the weights after one more step into the state."""

    def _update(self, optimizer: "torch.optim.Optimizer", args: Any, kwargs: Any) -> None:
        # Note: DeepSpeed calls step once for each group, and shows the optimizer only that one
        for group in optimizer.param_groups:
            for weights in group["params"]:
                if weights.grad is not None:
                    self._keep(weights.detach(), optimizer.state[weights])


class EMA(Average):
    """The exponential moving average (Polyak and Juditsky 1992, with the decay that forgets the first weights).

    Attributes:
        decay: Share of the old average that stays at each step. Early on it is at most (1 + n) / (10 + n) after n
            steps, so that the first weights, which are random, are soon forgotten (as TensorFlow's moving average).
    """

    kind: Literal["ema"] = "ema"
    decay: float = Field(default=0.999, gt=0, lt=1)

    @property
    def state_copies(self) -> int:
        """Return how many numbers it keeps for each weight."""
        return 1

    def point(self, weights: "torch.Tensor", state: "State") -> "torch.Tensor":
        """Return the average, a new tensor, given the newest weights and their state."""
        average: torch.Tensor = state.get("average", weights)
        return average.detach().clone()

    def _keep(self, weights: "torch.Tensor", state: "State") -> None:
        if "average" not in state:
            state |= {"average": weights.clone(), "averaged": 0}
        state["averaged"] += 1
        decay = min(self.decay, (1 + state["averaged"]) / (10 + state["averaged"]))
        state["average"].lerp_(weights, 1 - decay)


class Last(Average):
    """The mean of the weights at the last few of regular points of training (Vaswani et al. 2017, section 6.1).

    The points are steps of training and not the checkpoints that `run` asks for, which may not change a result.
    Kaddour (2022, arXiv:2209.14981) shows what the average gains while training goes on.

    Attributes:
        count: How many points; each costs a copy of the weights, shared among the ranks.
        every_steps: Steps between two of them.
    """

    kind: Literal["last"] = "last"
    count: int = Field(default=5, ge=2, le=100)
    every_steps: int = Field(default=100, ge=1)

    @property
    def state_copies(self) -> int:
        """Return how many numbers it keeps for each weight."""
        return self.count

    def point(self, weights: "torch.Tensor", state: "State") -> "torch.Tensor":
        """Return the average, a new tensor, given the newest weights and their state; before the first point, these."""
        kept = [state[name] for name in map(self._name, range(self.count)) if name in state]
        if not kept:
            return weights.detach().clone()
        total: torch.Tensor = kept[0].detach().clone()
        for other in kept[1:]:
            total += other
        return total.div_(len(kept))

    def _keep(self, weights: "torch.Tensor", state: "State") -> None:
        state["averaged"] = state.get("averaged", 0) + 1
        point, rest = divmod(state["averaged"], self.every_steps)
        if rest == 0:
            name = self._name(point % self.count)
            if name in state:
                state[name].copy_(weights)
            else:
                state[name] = weights.clone()

    def _name(self, slot: int) -> str:
        return f"weights_{slot}"


AnyAverage = Annotated[EMA | Last, Field(discriminator="kind")]


@contextmanager
def evaluation_weights(engine: Any, average: AnyAverage | None) -> Iterator[None]:
    """Put the weights to evaluate into an engine's model for the time of the block, then those in training back.

    These are the average, or with a schedule-free optimizer the point it has for that; else nothing changes. Every rank
    must come here. Inside, `full_weights` gives them too.
    """
    import torch

    from pipeline.parallel.engine import refresh_weights
    from pipeline.parallel.partitions import flat_partitions

    optimizer = engine.basic_optimizer
    if average is None and not hasattr(optimizer, "evaluation_point"):
        yield
        return
    training = {}
    with torch.no_grad():
        for weights in flat_partitions(engine):
            training[weights] = weights.detach().clone()
            point = average.point(weights, optimizer.state[weights]) if average else optimizer.evaluation_point(weights)
            weights.copy_(point)
        refresh_weights(engine)
    yield  # Note: after an error the run is over, and putting weights back would wait for ranks that are gone
    with torch.no_grad():
        for weights, trained in training.items():
            weights.copy_(trained)
        refresh_weights(engine)
