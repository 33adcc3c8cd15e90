"""Trains made-up weights, which tensor-parallel ranks share by hand-made slices, on gradients that are given.

`python optim_slices_ranks.py DIRECTORY ZERO-TENSOR-RANKS-TYPE…`: of each optimizer DIRECTORY/alone-TYPE/NAME.pt is from
plain torch in one process. For each layout it forks the ranks, each of which leaves DIRECTORY/LAYOUT/NAME-RANK.pt: the
weights and those to evaluate (whole, of rank 0), what Adafactor keeps, the weights that tensor-parallel ranks do not
share, and how many matrices this rank alone made orthogonal.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param
from forking import run_ranks
from torch import nn

from pipeline.parallel.engine import EngineSettings, build_engine, process_group
from pipeline.parallel.exchange import WholeMatrices
from pipeline.parallel.gathering import full_weights
from pipeline.parallel.mesh import Place, shape_batch
from pipeline.training.averaging import EMA, Last, evaluation_weights
from pipeline.training.optim import Adafactor, Muon, ScheduleFreeAdamW
from pipeline.training.optim.flat import whole_parameter

STEPS, ROWS, CLIP = 6, 4, 5.0  # the norm of a gradient is some 25
CASES = {
    "muon": (Muon(lr=5e-2, weight_decay=0.1), EMA(decay=0.6)),
    "adafactor": (Adafactor(lr=0.1, weight_decay=0.1), Last(count=2, every_steps=2)),
    "schedule_free_adamw": (ScheduleFreeAdamW(lr=3e-2), None),
}
WEIGHTS = {  # shape of the whole, and the dimension along which it is shared
    "embedding.weight": ((12, 7), 0),
    "relative.weight": ((5, 4), 1),
    "norm.weight": ((7,), None),
    "block.query.weight": ((8, 8), 0),
    "block.out.weight": ((8, 8), 1),
    "block.up.weight": ((12, 7), 0),
    "block.up.bias": ((12,), 0),
    "block.down.weight": ((7, 12), 1),
    "block.down.bias": ((7,), None),
    "dense.weight": ((8, 8), None),
    "experts.up": ((3, 8, 5), 1),
    "experts.down": ((3, 5, 8), 2),
    "head.weight": ((12, 7), 0),
}


class Holder(nn.Module):
    """Holds slices of weights; the gradients of its output are those that it is given."""

    def forward(self, gradients):
        """Take gradients by the names of parameters, as they are in this module."""
        total = sum((p * gradients[name].to(p.dtype)).sum() for name, p in self.named_parameters(recurse=False))
        for name, module in self.named_children():
            inside = {key.removeprefix(f"{name}."): g for key, g in gradients.items() if key.startswith(f"{name}.")}
            total = total + module(inside)
        return total


def slice_of(whole, dim, place):
    return whole if dim is None else whole.chunk(place.tensor, dim)[place.tensor_rank].clone()


def make_model(place, dtype):
    """Return the model with this rank's slices."""
    model, generator = Holder(), torch.Generator().manual_seed(0)
    for name, (shape, dim) in WEIGHTS.items():
        whole, holder = torch.randn(shape, generator=generator) * 0.3, model
        whole = whole.bfloat16()  # so that every type begins at the same point
        *path, last = name.split(".")
        for part in path:
            if part not in dict(holder.named_children()):
                holder.add_module(part, Holder())
            holder = holder.get_submodule(part)
        parameter = nn.Parameter(slice_of(whole.to(dtype), dim, place))
        if dim is not None and place.tensor > 1:
            parameter.tensor_model_parallel = parameter.model_parallel = True
            parameter.partition_dim = dim
        holder.register_parameter(last, parameter)
    return model


def gradients(step, rows, place):
    """Return the sum of the rows' gradients: eighths, which are exact in any type, in any order."""
    sums = {}
    for number, (name, (shape, dim)) in enumerate(WEIGHTS.items()):
        generator = torch.Generator().manual_seed(1000 * step + number)
        of_rows = torch.randint(-8, 9, (ROWS, *shape), generator=generator) / 8
        sums[name] = slice_of(of_rows[rows].sum(0), dim, place)
    return sums


def set_rates(optimizer, settings, step):
    for group in optimizer.param_groups:
        group["lr"] = settings.lr * min(step / 3, 1) * group["lr_scale"]


def squares(states):
    """Return what Adafactor keeps of whole parameters."""
    named = {whole_parameter(name): value for state in states for name, value in state.items() if "/" in name}
    return {name: value.clone() for name, value in named.items()}


def train_alone(settings, average, dtype):
    """Train in plain torch."""
    model = make_model(Place(), dtype)
    optimizer = settings.build(model)
    if average:
        average.attach(optimizer)
    for step in range(1, STEPS + 1):
        set_rates(optimizer, settings, step)
        optimizer.zero_grad()
        model(gradients(step, slice(None), Place())).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    point = average.point if average else lambda p, state: optimizer.evaluation_point(p)
    evaluated = {name: point(p, optimizer.state[p]) for name, p in model.named_parameters()}
    kept = {name: optimizer.state[p].get("squares/") for name, p in model.named_parameters()}
    first = {name: p.detach() for name, p in make_model(Place(), dtype).named_parameters()}
    return {"first": first, "weights": weights, "evaluated": evaluated, "squares": kept}


def train(mesh, zero, kind, settings, average):
    """Train on this layout."""
    model = make_model(mesh.place, torch.float64 if kind == "fp64" else torch.float32)
    optimizer = settings.build(model)
    if average:
        average.attach(optimizer)
    shape = shape_batch(ROWS, None, mesh.data)
    extra = {"zero_optimization": {"stage3_param_persistence_threshold": 20}}
    if zero == 3:
        extra["zero_optimization"]["sub_group_size"] = 100
    precision = "fp32" if kind == "fp64" else kind
    engine = build_engine(model, optimizer, EngineSettings(shape, zero, precision, CLIP, extra), mesh)
    if kind == "fp16":
        engine.optimizer.loss_scaler.cur_scale = 16.0  # of which no gradient overflows
    num_alone, gather = [], WholeMatrices.gather

    def counting(self, flat):
        found = gather(self, flat)
        num_alone.append(len(found[0]))
        return found

    WholeMatrices.gather = counting
    (mine,) = shape.microbatches(mesh.data_rank)
    for step in range(1, STEPS + 1):
        set_rates(engine.optimizer, settings, step)
        engine.backward(engine(gradients(step, mine, mesh.place)) * mesh.data)
        engine.step()
    WholeMatrices.gather = gather
    alike = {name: replicated(p, zero) for name, p in model.named_parameters() if WEIGHTS[name][1] is None}
    weights = full_weights(engine, mesh)
    with evaluation_weights(engine, average):
        evaluated = full_weights(engine, mesh)
    kept = squares(optimizer.state.values())
    engine.destroy()
    return {"weights": weights, "evaluated": evaluated, "squares": kept, "alike": alike, "alone": sum(num_alone)}


def replicated(parameter, zero):
    """Return a parameter that every tensor-parallel rank has, as this one has it."""
    return parameter.detach().clone() if zero == 0 else safe_get_full_fp32_param(parameter).clone()


def run_rank(directory, zero, tensor, kind, rank):
    with process_group(tensor) as mesh:
        for name, (settings, average) in CASES.items():
            torch.save(train(mesh, zero, kind, settings, average), directory / f"{name}-{mesh.rank}.pt")


def main():
    root = Path(sys.argv[1])
    get_accelerator().is_fp16_supported = lambda: True  # on a CPU it is, only slow
    torch.set_num_threads(1)
    for dtype in ("fp32", "fp64"):
        (root / f"alone-{dtype}").mkdir(parents=True)
        for name, (settings, average) in CASES.items():
            found = train_alone(settings, average, torch.float64 if dtype == "fp64" else torch.float32)
            torch.save(found, root / f"alone-{dtype}" / f"{name}.pt")
    for layout in sys.argv[2:]:
        (root / layout).mkdir()
        zero, tensor, world, kind = layout.split("-")
        if not run_ranks(int(world), partial(run_rank, root / layout, int(zero), int(tensor), kind)):
            sys.exit(1)


if __name__ == "__main__":
    main()
