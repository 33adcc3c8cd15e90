"""A training without DeepSpeed and without a group of ranks, enough of one for a saver."""

from pathlib import Path

import torch
from torch import nn

from pipeline.parallel.mesh import Place
from pipeline.stage import Checkpoints
from pipeline.training.checkpoints.format import read_index
from pipeline.training.checkpoints.reslice import Source
from pipeline.training.checkpoints.saver import Saver

FILES = {"config.json": b"{}", "tokenizer.json": b"[]"}


class Mesh:
    """Stands for the mesh of one of some data-parallel ranks, which hear nothing of one another."""

    tensor, tensor_rank, tensor_group = 1, 0, None

    def __init__(self, rank=0, world=1):
        self.place, self.rank, self.data_rank, self.data = Place(rank, world), rank, rank, world
        self.answers = []

    def sum_all(self, numbers, device):
        return self.answers.pop(0) if self.answers else list(numbers)


class Engine:
    """Stands for an engine without ZeRO: the optimizer works on the parameters themselves."""

    device = torch.device("cpu")

    def __init__(self, mesh, seed=0, width=3):
        torch.manual_seed(seed)
        self.mpu, self.module = mesh, nn.Linear(5, width)
        self.module.register_buffer("counts", torch.zeros(2, dtype=torch.int64))
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.1)

    def zero_optimization(self):
        return False

    def step(self, step):
        """Do a step that follows from its number."""
        generator = torch.Generator().manual_seed(step)
        for parameter in self.module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        self.optimizer.step()
        self.module.counts.fill_(step)


def make(directory, rank=0, world=1, steps=1000, seed=0, width=3, **how):
    """Return an engine and its saver; `how` are settings of checkpoints, and arguments of the saver."""
    settings = Checkpoints(**{name: how.pop(name) for name in list(how) if name in Checkpoints.model_fields})
    mesh = Mesh(rank, world)
    engine = Engine(mesh, seed, width)
    return engine, Saver(engine, Path(directory), mesh, 0, settings, steps, extras=FILES, **how)


def train(engine, saver, first, last, loss=lambda step: None):
    """Train and save as the loop does, but wait for every checkpoint."""
    for step in range(first, last + 1):
        saver.before_update()
        engine.step(step)
        if saver.due(step, 0.0):
            saver.save(step, {"step": step}, loss(step))
            while not saver._writing.wait(10):
                pass


def tensors(checkpoint):
    """Return every tensor of a checkpoint, whole, and the numbers of the optimizer."""
    index = read_index(checkpoint)
    source = Source(checkpoint, index)
    found = {(n, state): source.whole(n, state) for n, record in index.tensors.items() for state in record.squares}
    return found, index.scalars


def same(one, other):
    """Return whether two checkpoints hold the same bits."""
    (ours, scalars), (theirs, others) = tensors(one), tensors(other)
    return scalars == others and ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
