"""Trains a tiny model with every optimizer on some ranks: what it learns depends neither on their number nor on ZeRO.

`python optim_ranks.py DIRECTORY ZERO WORLD PRECISION`: forks the ranks; for each optimizer and average rank 0 leaves
DIRECTORY/NAME.pt with the losses, the weights and the weights to evaluate of a whole training, those of one that was
stopped half-way and continued from its checkpoint, and the number of matrices that lie on more than one rank.
ZERO 0 is no DeepSpeed at all: torch alone, in one process.
"""

import os
import socket
import sys
import traceback
from pathlib import Path

import deepspeed  # noqa: F401 (here, so that no rank has to)
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.parallel.engine import EngineSettings, build_engine, full_weights, process_group
from pipeline.parallel.mesh import shape_batch
from pipeline.parallel.partitions import flat_partitions
from pipeline.training.averaging import EMA, Last, evaluation_weights
from pipeline.training.checkpoint import load_checkpoint, save_checkpoint
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


def train(mesh, directory, zero, precision, settings, average, stop=None):
    """Train from the newest checkpoint until the end, or save one after step `stop`."""
    model = Tiny()
    optimizer = settings.build(model, SCALES)
    if average:
        average.attach(optimizer)
    shape = shape_batch(ROWS, 1, mesh.data)
    extra = {"zero_optimization": {"stage3_param_persistence_threshold": 20}}
    if zero == 3:
        extra["zero_optimization"]["sub_group_size"] = 100
    engine = build_engine(model, optimizer, EngineSettings(shape, zero, precision, CLIP, extra), mesh)
    start = load_checkpoint(engine, directory, zero, print)
    losses = []
    for step in range(start + 1, (stop or STEPS) + 1):
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
    if stop:
        save_checkpoint(engine, directory, stop, zero, keep=1)
    weights = full_weights(engine)
    with torch.no_grad(), evaluation_weights(engine, average):
        evaluated = full_weights(engine)
        ids, labels = rows(0)
        loss = engine.module(ids, labels).item()
    flats = flat_partitions(engine)
    matrices = [matrix for flat in flats.values() for matrix in flat.matrices() if len(matrix.shape) == 2]
    cut = sum(matrix.share(mesh.data_rank) not in (0, matrix.bounds[-1]) for matrix in matrices)
    engine.destroy()
    return {"losses": losses, "weights": weights, "evaluated": evaluated, "evaluated_loss": loss, "cut": cut}


def run_rank(directory, zero, precision):
    with process_group() as mesh:
        for name, (settings, average) in CASES.items():
            if precision == "bf16" and name not in ("muon", "adafactor", "ema"):
                continue
            found = train(mesh, directory / "none", zero, precision, settings, average)
            train(mesh, directory / name, zero, precision, settings, average, stop=STOP)
            continued = train(mesh, directory / name, zero, precision, settings, average)
            if mesh.data_rank == 0:
                torch.save({**found, "continued": continued}, directory / f"{name}.pt")


def start(rank, world, port, directory, zero, precision):
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.set_num_threads(1)
        run_rank(directory, zero, precision)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def main():
    directory, zero, world, precision = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    directory.mkdir(parents=True)
    if zero == 0:
        torch.set_num_threads(1)
        for name, (settings, average) in CASES.items():
            torch.save(train_alone(settings, average), directory / f"{name}.pt")
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [start(rank, world, port, directory, zero, precision) for rank in range(world)]
    statuses = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
    sys.exit(any(statuses))


if __name__ == "__main__":
    main()
