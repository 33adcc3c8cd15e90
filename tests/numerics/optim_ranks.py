"""Trains a tiny model with every optimizer on some ranks: what it learns depends neither on their number nor on ZeRO.

`python optim_ranks.py DIRECTORY ZERO-RANKS-PRECISION…`: DIRECTORY/alone/NAME.pt is from plain torch in one process. For
each layout it forks the ranks; for each optimizer and average rank 0 leaves DIRECTORY/LAYOUT/NAME.pt with the losses,
the weights and the weights to evaluate of a whole training, those of one that was stopped half-way and continued from
what it kept, and the number of matrices that lie on more than one rank.
"""

import sys
from copy import deepcopy
from functools import partial
from pathlib import Path

import deepspeed  # noqa: F401 (here, so that no rank has to)
import torch
import torch.nn.functional as F
from forking import run_ranks
from torch import nn

from pipeline.parallel.engine import EngineSettings, build_engine, process_group, refresh_weights
from pipeline.parallel.gathering import full_weights
from pipeline.parallel.mesh import shape_batch
from pipeline.parallel.partitions import flat_partitions
from pipeline.training.averaging import EMA, Last, evaluation_weights
from pipeline.training.optim import Adafactor, AdamW, Lion, Muon, ScheduleFreeAdamW

STEPS, STOP, ROWS, CLIP = 8, 5, 4, 0.5
CASES = {
    "adamw": (AdamW(lr=3e-2), None),
    "muon": (Muon(lr=5e-2, adamw_lr_scale=0.6), None),
    "lion": (Lion(lr=1e-2, weight_decay=0.1), None),
    "adafactor": (Adafactor(lr=0.1, weight_decay=0.1), None),
    "schedule_free_adamw": (ScheduleFreeAdamW(lr=3e-2), None),
    "ema": (AdamW(lr=3e-2), EMA(decay=0.6)),
    "last": (Muon(lr=5e-2), Last(count=2, every_steps=2)),
}
SCALES = {"block.up.weight": 0.5, "norm.weight": 2.0}


class Tiny(nn.Module):
    """An embedding, a norm, a block of two matrices, two stacks of experts and an output layer, under our names."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.block = nn.ModuleDict({"up": nn.Linear(6, 10, bias=False), "down": nn.Linear(10, 6)})
        self.experts = nn.ParameterDict({"up": torch.zeros(3, 7, 6), "down": torch.zeros(3, 6, 7)})
        self.head = nn.Linear(6, 11, bias=False)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data.normal_(0, 0.3, generator=generator)

    def forward(self, ids, labels):
        """Return the summed loss; the experts are mixed evenly."""
        x = self.embedding(ids)
        x = x + self.block["down"](F.gelu(self.block["up"](self.norm(x))))
        hidden = F.gelu(torch.einsum("btd,efd->betf", x, self.experts["up"]))
        x = x + torch.einsum("betf,edf->btd", hidden, self.experts["down"])
        return F.cross_entropy(self.head(x).flatten(0, 1).float(), labels.flatten(), reduction="sum")


def rows(step):
    ids = torch.randint(0, 11, (ROWS, 9), generator=torch.Generator().manual_seed(step % 2))  # seen again: it learns
    return ids[:, :-1], ids[:, 1:]


def set_rates(optimizer, settings, step):
    for group in optimizer.param_groups:
        group["lr"] = settings.lr * min(step / 3, 1) * group["lr_scale"]


def train_alone(settings, average):
    """Train in plain torch."""
    model = Tiny()
    optimizer = settings.build(model, SCALES)
    if average:
        average.attach(optimizer)
    losses = []
    for step in range(1, STEPS + 1):
        set_rates(optimizer, settings, step)
        loss = model(*rows(step)) / (ROWS * 8)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
    point = {}
    for name, p in model.named_parameters():
        if average:
            point[name] = average.point(p, optimizer.state[p])
        else:
            point[name] = optimizer.evaluation_point(p) if hasattr(optimizer, "evaluation_point") else p.detach()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    first = {name: p.detach() for name, p in Tiny().named_parameters()}
    return {"losses": losses, "first": first, "weights": weights, "evaluated": point}


def train(mesh, zero, precision, settings, average, kept=None, stop=STEPS):
    """Train from what an earlier training kept until the end, or until step `stop`."""
    model = Tiny()
    optimizer = settings.build(model, SCALES)
    if average:
        average.attach(optimizer)
    shape = shape_batch(ROWS, 1, mesh.data)
    extra = {"zero_optimization": {"stage3_param_persistence_threshold": 20}}
    if zero == 3:
        extra["zero_optimization"]["sub_group_size"] = 100
    engine = build_engine(model, optimizer, EngineSettings(shape, zero, precision, CLIP, extra), mesh)
    start = 0 if kept is None else put_back(engine, kept)
    losses = []
    for step in range(start + 1, stop + 1):
        set_rates(engine.optimizer, settings, step)
        ids, labels = rows(step)
        loss = torch.zeros(())
        for microbatch in shape.microbatches(mesh.data_rank):
            part = engine(ids[microbatch], labels[microbatch])
            engine.backward(part * shape.accumulation * mesh.data / (ROWS * 8))
            engine.step()
            loss += part.detach() / (ROWS * 8)
        torch.distributed.all_reduce(loss)
        losses.append(loss.item())
        if step == 3:  # must change nothing
            with evaluation_weights(engine, average):
                engine.module(ids, labels)
    found = {"losses": losses, "kept": keep(engine, stop), "cut": count_cut(engine)}
    found["weights"] = full_weights(engine, mesh)
    with torch.no_grad(), evaluation_weights(engine, average):
        found["evaluated"] = full_weights(engine, mesh)
        found["evaluated_loss"] = engine.module(*rows(0)).item()
    engine.destroy()
    return found


def keep(engine, step):
    """Return all that a training has to go on with, after a step."""
    flats = flat_partitions(engine)
    return step, [(flat.detach().clone(), deepcopy(engine.basic_optimizer.state[flat])) for flat in flats]


def put_back(engine, kept):
    """Set what was kept; return its step."""
    step, vectors = kept
    with torch.no_grad():
        for flat, (weights, state) in zip(flat_partitions(engine), vectors, strict=True):
            flat.copy_(weights)
            engine.basic_optimizer.state[flat] = state
        refresh_weights(engine)
    return step


def count_cut(engine):
    """Return how many matrices lie on more than one rank."""
    found = [(layout, m) for layout in flat_partitions(engine).values() for m in layout.matrices() if len(m.shape) == 2]
    return sum(matrix.share(layout.rank) not in (0, matrix.bounds[-1]) for layout, matrix in found)


def run_rank(directory, zero, precision, rank):
    with process_group() as mesh:
        for name, (settings, average) in CASES.items():
            if precision == "bf16" and name not in ("muon", "adafactor", "ema"):
                continue
            found = train(mesh, zero, precision, settings, average)
            stopped = train(mesh, zero, precision, settings, average, stop=STOP)
            found["continued"] = train(mesh, zero, precision, settings, average, stopped["kept"])
            if mesh.rank == 0:
                torch.save(found, directory / f"{name}.pt")


def main():
    root = Path(sys.argv[1])
    torch.set_num_threads(1)
    (root / "alone").mkdir(parents=True)
    for name, (settings, average) in CASES.items():
        torch.save(train_alone(settings, average), root / "alone" / f"{name}.pt")
    for layout in sys.argv[2:]:
        (root / layout).mkdir()
        zero, world, precision = layout.split("-")
        if not run_ranks(int(world), partial(run_rank, root / layout, int(zero), precision)):
            sys.exit(1)


if __name__ == "__main__":
    main()
