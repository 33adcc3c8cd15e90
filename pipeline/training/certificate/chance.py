"""Random numbers under a layout: which ranks must draw the same for dropout, and which must not."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import combinations
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.parallel.mesh import Mesh
from pipeline.training.certificate.layouts import Layout
from pipeline.training.certificate.trial import Trial, built, copies_apart, feed
from pipeline.training.certificate.verdict import BOUNDS, Row
from pipeline.training.step import seed_step, take_step

DROPOUT = 0.1
STEPS = 2
KINDS: tuple[Literal["full", "selective"], ...] = ("full", "selective")  # of recomputation
ATTENTION = "attention"  # what its draws are called


def try_chance(trial: Trial, mesh: Mesh) -> Iterator[Row]:
    """Yield what is wrong with the random numbers of a mesh, with and without sequence parallelism.

    Dropout cannot be compared with one process, which draws other numbers. But tensor-parallel ranks must drop the same
    of what all of them hold, or their copies of it would come apart, and must not drop the same of what each has of its
    own (Megatron-LM's rule: Shoeybi et al. 2019, section 3; Korthikanti et al. 2022, section 4.2); data-parallel ranks,
    which have other rows, must never draw the same; and what is computed again must drop the same again.
    """
    trial = replace(trial, model=trial.model.model_copy(update={"dropout": DROPOUT}))
    for sequence in (False, True) if mesh.tensor > 1 else (False,):
        began = time.perf_counter()
        layout = Layout("fp32", 1, mesh.data, mesh.tensor, sequence=sequence)
        draws: dict[str, list[Tensor]] = defaultdict(list)
        losses, apart = _train(trial, layout, mesh, draws)
        problems = [problem for place in draws for problem in _problems(layout, mesh, place, torch.stack(draws[place]))]
        if apart:
            problems.append(f"the ranks' copies of '{apart[0]}' are not the same")
        for kind in KINDS:
            others, _ = _train(trial, replace(layout, activation_checkpointing=kind), mesh, {})
            if any(abs(one - other) > BOUNDS["fp32"].loss * one for one, other in zip(losses, others, strict=True)):
                problems.append(f"{kind} recomputation does not drop the same again")
        name = f"random numbers, {layout.name.split(', ', 1)[1]}"
        yield Row(name, time.perf_counter() - began, problems=tuple(problems))


def _train(trial: Trial, layout: Layout, mesh: Mesh, draws: dict[str, list[Tensor]]) -> tuple[list[float], list[str]]:
    """Train a few steps; return their losses, and which copies came apart.

    Args:
        draws: Gets what each dropout draws, but under recomputation, which draws twice.
    """
    losses = []
    with built(trial, layout, mesh) as engine:
        with _recorded(engine.module, draws) if layout.activation_checkpointing is None else nullcontext():
            for step in range(1, STEPS + 1):
                seed_step(trial.seed, step, mesh.data_rank)
                losses.append(take_step(engine, mesh, feed(trial, layout, mesh, step), trial.coefficients).loss)
        return losses, copies_apart(engine, mesh)


def _problems(layout: Layout, mesh: Mesh, place: str, drawn: Tensor) -> Iterator[str]:
    """Yield what is wrong with the draws of one dropout, (number of draws, numbers of each)."""
    of_each = place == ATTENTION or (layout.sequence and ".blocks." in place)
    same = _equal(drawn, mesh.tensor_group)
    if of_each and same.any():
        yield f"tensor ranks draw the same numbers for the dropout of '{place}', where each has its own part"
    if not of_each and not same.all():
        yield f"tensor ranks draw other numbers for the dropout of '{place}', which all of them hold"
    if _equal(drawn, mesh.data_group).any():
        yield f"data ranks draw the same numbers for the dropout of '{place}'"
    if len(torch.unique(drawn, dim=0)) < len(drawn):
        yield f"the dropout of '{place}' draws the same numbers again"


@contextmanager
def _recorded(model: nn.Module, draws: dict[str, list[Tensor]]) -> Iterator[None]:
    """Keep, for the time of the block, the numbers that each dropout would draw first, by the name of its place."""

    def record(place: str, device: torch.device) -> None:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            draws[place].append(torch.rand(4, device=device))

    attend = F.scaled_dot_product_attention

    def recording(query: Tensor, *others: Any, **settings: Any) -> Tensor:
        if settings.get("dropout_p"):
            record(ATTENTION, query.device)
        return attend(query, *others, **settings)

    dropouts = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Dropout)]
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: record(name, inputs[0].device))
        for name, module in dropouts
    ]
    F.scaled_dot_product_attention = recording
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attend
        for hook in hooks:
            hook.remove()


def _equal(drawn: Tensor, group: Any) -> Tensor:
    """Return of each pair of ranks and each draw whether they drew the same."""
    world = dist.get_world_size(group)
    gathered = [torch.empty_like(drawn) for _ in range(world)]
    dist.all_gather(gathered, drawn, group=group)
    pairs = [(one == other).all(1) for one, other in combinations(gathered, 2)]
    return torch.stack(pairs) if pairs else torch.empty(0, len(drawn), dtype=torch.bool)
