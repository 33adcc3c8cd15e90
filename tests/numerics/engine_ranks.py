"""Trains a tiny model through the engine, on some ranks that share layers, and in plain torch.

`python engine_ranks.py DIRECTORY WORLD-TENSOR…`: for each layout the ranks are forked, and rank 0 leaves
DIRECTORY/WORLD-TENSOR.pt: of every ZeRO stage and precision the losses, norms, updates, and final weights. Of six
steps the third is refused and the gradient of the fifth is not finite on one rank. Layout 0-0 is plain torch alone.
"""

import math
import sys
from functools import partial
from pathlib import Path

import deepspeed  # noqa: F401 (here, so that no rank has to)
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from forking import run_ranks
from torch import nn

from pipeline.parallel import fp8
from pipeline.parallel.engine import EngineSettings, build_engine, process_group
from pipeline.parallel.gathering import full_weights
from pipeline.parallel.mesh import shape_batch
from pipeline.training.step import Batch, take_step

STEPS, REFUSED, BROKEN, ROWS, LENGTH, CLIP = 6, 3, 5, 4, 8, 0.2
CASES = {  # ZeRO stage, type of the weights, precision, clipping, offload
    "0-float64": (0, torch.float64, "fp32", CLIP),
    "0-float64-unclipped": (0, torch.float64, "fp32", None),
    "0-fp32": (0, torch.float32, "fp32", CLIP),
    **{f"{zero}-fp32": (zero, torch.float32, "fp32", CLIP) for zero in (1, 2, 3)},
    "1-fp32-unclipped": (1, torch.float32, "fp32", None),
    **{f"{zero}-{half}": (zero, torch.float32, half, CLIP) for zero in (1, 2, 3) for half in ("bf16", "fp16")},
    **{f"{zero}-fp32-offload": (zero, torch.float32, "fp32", CLIP, "cpu") for zero in (1, 2, 3)},
    **{f"3-{half}-offload": (3, torch.float32, half, CLIP, "cpu") for half in ("bf16", "fp16", "fp8")},
    **{f"{zero}-fp8": (zero, torch.float32, "fp8", CLIP) for zero in (1, 2, 3)},
}


class Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class Row(nn.Linear):
    leave = None

    def forward(self, x):
        x = F.linear(x, self.weight)
        return (x if self.leave is None else self.leave(x)) + self.bias


class Tiny(nn.Module):
    """An embedding, a frozen matrix, two layers that tensor-parallel ranks share, a norm and an output layer."""

    def __init__(self, dtype, mesh=None):
        super().__init__()
        self.group = None if mesh is None or mesh.tensor == 1 else mesh.tensor_group
        self.embedding = nn.Embedding(11, 16)
        self.frozen = nn.Linear(16, 16, bias=False).requires_grad_(False)
        self.up = nn.Linear(16, 32)
        self.down = Row(32, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 11, bias=False)
        self.register_buffer("shift", torch.zeros(11))
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.empty(parameter.shape).normal_(0, 0.25, generator=generator).to(dtype)
        self.shift.normal_(0, 0.1, generator=generator)
        if self.group is not None:
            self.down.leave = lambda x: Leave.apply(x, self.group)
            for parameter, dim in ((self.up.weight, 0), (self.up.bias, 0), (self.down.weight, 1)):
                share(parameter, dim, mesh)

    def forward(self, ids, labels, factor):
        x = self.frozen(self.embedding(ids)) * factor.to(self.embedding.weight.dtype)
        inner = F.gelu(self.up(x if self.group is None else Enter.apply(x, self.group)))
        x = self.norm(x + self.down(inner))
        logits = (self.head(x) + self.shift.to(x.dtype)).flatten(0, 1)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return {"tokens": F.cross_entropy(logits, labels.flatten(), reduction="sum")}


def share(parameter, dim, mesh):
    parameter.data = parameter.data.chunk(mesh.tensor, dim)[mesh.tensor_rank].clone()
    parameter.tensor_model_parallel = parameter.model_parallel = True
    parameter.partition_dim = dim


def rows(step):
    ids = torch.randint(0, 11, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    return ids[:, :-1], ids[:, 1:]


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2, weight_decay=0.1)


def train_alone(dtype, clip):
    """Train in plain torch, without the steps that are to be left out."""
    model = Tiny(dtype)
    optimizer = optimizer_of(model)
    losses, norms = [], []
    for step in range(1, STEPS + 1):
        ids, labels = rows(step)
        loss = model(ids, labels, torch.ones(()))["tokens"] / (ROWS * LENGTH)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf if clip is None else clip)
        losses.append(loss.item())
        norms.append(norm.item())
        if step not in (REFUSED, BROKEN):
            optimizer.step()
    return {"losses": losses, "norms": norms, "weights": model.state_dict()}


def train(mesh, zero, dtype, precision, clip, offload=None):
    model = Tiny(dtype, mesh)
    shape = shape_batch(ROWS, 1, mesh.data)
    extra = {"zero_optimization": {"stage3_param_persistence_threshold": 20}} if zero == 3 else {}
    if precision == "fp8":
        fp8.multiply_in_fp8(model)
    settings = EngineSettings(shape, zero, precision, clip, extra, offload)
    engine = build_engine(model, optimizer_of(model), settings, mesh)
    steps = []
    for step in range(1, STEPS + 1):
        ids, labels = rows(step)
        bad = step == BROKEN and mesh.data_rank == mesh.data - 1
        factor = torch.tensor(math.inf if bad else 1.0)
        mine = [{"ids": ids[m], "labels": labels[m], "factor": factor} for m in shape.microbatches(mesh.data_rank)]
        count = shape.rows_per_rank * LENGTH
        batch = Batch(mine, {"labels": count}, count)
        steps.append(take_step(engine, mesh, batch, {}, may_update=lambda loss, norm, step=step: step != REFUSED))
    found = {
        "losses": [step.loss for step in steps],
        "norms": [step.grad_norm for step in steps],
        "updated": [step.updated for step in steps],
        "weights": full_weights(engine, mesh),
    }
    engine.destroy()
    return found


def run_rank(directory, world, tensor, rank):
    with process_group(tensor) as mesh:
        get_accelerator().is_fp16_supported = fp8.is_supported = lambda: True  # slow here, but not wrong
        found = {name: train(mesh, *case) for name, case in CASES.items()}
        assert mesh.rank == 0 or not found["0-fp32"]["weights"]
        if mesh.rank == 0:
            torch.save(found, directory / f"{world}-{tensor}.pt")


def main():
    directory, failed = Path(sys.argv[1]), False
    torch.set_num_threads(1)
    for layout in sys.argv[2:]:
        world, tensor = map(int, layout.split("-"))
        if not world:
            found = {name: train_alone(dtype, clip) for name, (_, dtype, _, clip, *_) in CASES.items()}
            torch.save(found, directory / f"{layout}.pt")
            continue
        failed |= not run_ranks(world, partial(run_rank, directory, world, tensor))
    sys.exit(failed)


if __name__ == "__main__":
    main()
