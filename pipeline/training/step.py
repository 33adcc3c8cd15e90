"""One optimizer step: forward and backward of every microbatch, then the update, if nobody objects."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline.parallel.mesh import Mesh

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch.

    Attributes:
        microbatches: The arguments that the model is called with, one time after another; it returns the summed losses
            of all terms.
        weights: How many there are of each unit that a term counts (labels, rows, …); the term is divided by their sum
            over all data-parallel ranks.
        tokens: Number of tokens in them.
    """

    microbatches: list[dict[str, "torch.Tensor"]]
    weights: dict[str, int]
    tokens: int


@dataclass(frozen=True)
class Step:
    """What came of a step, the same on every rank.

    Attributes:
        terms: The mean of each term of the loss over the whole batch.
        loss: Their sum, each times its coefficient: what was minimized.
        grad_norm: Global norm of the gradient before clipping; infinite where it is not finite.
        tokens: Number of tokens in the whole batch.
        updated: Whether the weights were changed.
    """

    terms: Mapping[str, float]
    loss: float
    grad_norm: float
    tokens: float
    updated: bool


def take_step(
    engine: Any,
    mesh: Mesh,
    batch: Batch,
    coefficients: Mapping[str, float],
    before_update: Callable[[], None] = lambda: None,
    may_update: Callable[[float, float], bool] = lambda loss, grad_norm: True,
) -> Step:
    """Do one optimizer step.

    DeepSpeed averages over microbatches and data-parallel ranks; each loss is scaled so that the average is the sum of
    all losses over the numbers of labels and rows in the whole batch, however these are spread.

    Args:
        engine: From `build_engine`.
        coefficients: What each term of the loss is multiplied with; 1 for those not named.
        before_update: Called when all gradients are there, before any weight changes.
        may_update: Called with the loss and the global norm of the gradient before any weight changes; where it says no
            nothing changes. It must say the same on every rank.
    """
    import torch

    from pipeline.models.transformer import unit_of_loss

    engine.train()
    *counts, tokens = mesh.sum([*batch.weights.values(), batch.tokens], engine.device)
    weights = dict(zip(batch.weights, counts, strict=True))
    scale = len(batch.microbatches) * mesh.data
    sums: dict[str, torch.Tensor] = {}
    means: dict[str, float] = {}
    loss = 0.0

    def count(term: str) -> float:
        return max(weights[unit_of_loss(term)], 1)

    for number, microbatch in enumerate(batch.microbatches, 1):
        arguments = {name: tensor.to(engine.device, non_blocking=True) for name, tensor in microbatch.items()}
        terms: dict[str, torch.Tensor] = engine(**arguments)
        scaled = [value * (coefficients.get(term, 1.0) / count(term) * scale) for term, value in terms.items()]
        engine.backward(torch.stack(scaled).sum())
        for term, value in terms.items():
            sums[term] = sums[term] + value.detach() if term in sums else value.detach()
        if number == len(batch.microbatches):
            before_update()
            shares = [total / count(term) for term, total in zip(sums, _numbers(sums), strict=True)]
            means = dict(zip(sums, mesh.sum(shares, engine.device), strict=True))
            loss = sum(coefficients.get(term, 1.0) * mean for term, mean in means.items())
            engine.gate.begin(partial(may_update, loss))
        engine.step()
    return Step(means, loss, engine.gate.grad_norm, tokens, engine.gate.updated)


def seed_step(seed: int, step: int, data_rank: int) -> None:
    """Make the random numbers of a step a function of these three: nothing to save, and the same after a resume."""
    import torch

    torch.manual_seed(((seed * 1_000_003 + step) * 1_000_003 + data_rank) % 2**63)


def _numbers(scalars: Mapping[str, "torch.Tensor"]) -> list[float]:
    """Return the values of scalars on a device, fetched at once."""
    import torch

    fetched: list[float] = torch.stack(list(scalars.values())).tolist()
    return fetched
