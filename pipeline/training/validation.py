"""Validation while a language model trains: its losses on held-out text of every source, shared among the ranks."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.training.metrics import MEASURED, Score, num_windows, score
from pipeline.training.objectives import Causal, Distillation, Objective

if TYPE_CHECKING:
    import torch

    from pipeline.parallel.mesh import Mesh
    from pipeline.text.stream import TokenStream
    from pipeline.training.objectives.batch import Examples

HELPERS = ("balance", "router_z", "distill")  # terms that only help to train
SEED = 0  # of what is random in held-out examples: the same question every time, whatever the training's seed


@dataclass(frozen=True)
class Validation:
    """What a model is tested on.

    Attributes:
        held: The held-out documents of every source that has any.
        examples: Makes the examples.
        beat: Called now and then, equally often on every rank.
        sequences: How many windows of each source are looked at, spread evenly over its stream.
    """

    held: "Mapping[str, TokenStream]"
    examples: "Examples"
    sequences: int
    beat: Callable[[], None] = lambda: None

    def run(self, module: "torch.nn.Module", mesh: "Mesh") -> dict[str, float]:
        """Return the losses by name, the same on every rank.

        `validation_loss` is that of all sources; where there are several each has one under its name, and where the
        loss is a sum of several terms each of them too, behind that.
        """
        scores = {name: self._score(module, stream, mesh) for name, stream in self.held.items()}
        numbers: dict[str, float] = {}
        for name, found in scores.items():
            suffix = f".{name}" if len(scores) > 1 else ""
            terms = name_terms(self.examples.objective, found, MEASURED if suffix else None)
            numbers |= {f"validation_loss{suffix}.{term}": mean for term, mean in terms.items()}
            if suffix:
                numbers[f"validation_loss{suffix}"] = found.loss
                if predicts_text(self.examples.objective):
                    numbers[f"validation_bits_per_byte{suffix}"] = found.bits_per_byte(self.held[name])
        whole = sum(scores.values(), Score())
        numbers["validation_loss"] = whole.loss
        if predicts_text(self.examples.objective):
            held = self.held
            num_bytes = sum(s.tokens * held[name].num_bytes / held[name].num_tokens for name, s in scores.items())
            numbers["validation_bits_per_byte"] = whole.sums["tokens"] / num_bytes / math.log(2)
        return numbers

    def _score(self, module: "torch.nn.Module", stream: "TokenStream", mesh: "Mesh") -> Score:
        total = num_windows(stream, self.examples.objective.row_tokens(self.examples.seq_len))
        count = min(self.sequences, total)
        windows: list[int | None] = [i * total // count for i in range(count)]
        windows += [None] * (-count % mesh.data)
        mine = windows[mesh.data_rank :: mesh.data]
        return _sum(score(module, stream, self.examples, mine, beat=self.beat), module, mesh)


def name_terms(objective: Objective, found: Score, only: Collection[str] | None = None) -> dict[str, float]:
    """Return the mean of each term of a loss by its name in the log; nothing where there is only one.

    Args:
        only: Those that are wanted; null is all but those of routers and teachers.
    """
    wanted = found.terms.keys() - set(HELPERS) if only is None else only
    terms = {term: mean for term, mean in found.terms.items() if term in wanted}
    if len(terms) == 1:
        return {}
    return {objective.term_names.get(term, term): mean for term, mean in terms.items()}


def predicts_text(objective: Objective) -> bool:
    """Return whether an objective predicts every token from those before it, so that bits per byte mean something."""
    return isinstance(objective.objective if isinstance(objective, Distillation) else objective, Causal)


def _sum(found: Score, module: "torch.nn.Module", mesh: "Mesh") -> Score:
    """Sum a score over the ranks, of which all have the same terms."""
    device, count = next(module.parameters()).device, len(found.sums)
    totals = mesh.sum([*found.sums.values(), *found.weights.values()], device)
    return Score(
        dict(zip(found.sums, totals[:count], strict=True)), dict(zip(found.weights, totals[count:], strict=True))
    )
