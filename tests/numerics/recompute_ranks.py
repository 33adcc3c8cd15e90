"""Trains a tiny decoder with dropout on some ranks with every kind of activation checkpointing, and compares the bits.

`python recompute_ranks.py WORLD-TENSOR…`: for each layout the ranks are forked; each ends with an error if a loss, a
norm or a final weight differs between what keeps everything and what computes something again.
"""

import sys
from functools import partial

import deepspeed  # noqa: F401 (here, so that no rank has to)
import torch
from forking import run_ranks

from pipeline.models.config import Decoder
from pipeline.models.initial import init_weights
from pipeline.models.layers import Block
from pipeline.models.transformer import Transformer
from pipeline.models.weights import weights
from pipeline.parallel.engine import EngineSettings, build_engine, process_group
from pipeline.parallel.gathering import full_weights
from pipeline.parallel.mesh import shape_batch
from pipeline.parallel.recompute import recompute
from pipeline.parallel.tensor import split
from pipeline.training.step import Batch, take_step

STEPS, ROWS, LENGTH = 3, 4, 8
CONFIG = Decoder(
    vocab_size=64, d_model=16, num_layers=2, num_heads=2, max_seq_len=LENGTH, qk_norm=True, dropout=0.2, predict_ahead=1
)


def train(mesh, zero, kind, sequence):
    model = Transformer(CONFIG)
    init_weights(model, 0)
    split(model, weights(CONFIG), mesh, sequence)
    recompute([module for module in model.modules() if isinstance(module, Block)], kind)
    shape = shape_batch(ROWS, 1, mesh.data)
    extra = {"zero_optimization": {"stage3_param_persistence_threshold": 20}} if zero == 3 else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine = build_engine(model, optimizer, EngineSettings(shape, zero, "fp32", 0.5, extra), mesh)
    numbers = []
    for step in range(STEPS):
        ids = torch.randint(0, 64, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step))
        torch.manual_seed(1000 * step + mesh.data_rank)
        mine = [{"ids": ids[m, :-1], "labels": ids[m, 1:]} for m in shape.microbatches(mesh.data_rank)]
        count = shape.rows_per_rank * LENGTH
        done = take_step(engine, mesh, Batch(mine, {"labels": count}, count), {})
        numbers += [done.loss, done.grad_norm]
    found = full_weights(engine, mesh)
    engine.destroy()
    return numbers, found


def run_rank(tensor, rank):
    with process_group(tensor) as mesh:
        for zero in (0, 1, 2, 3):
            for sequence in (False, True)[:tensor]:
                numbers, kept = train(mesh, zero, None, sequence)
                assert numbers[0] != numbers[2]
                for kind in ("full", "selective"):
                    again, found = train(mesh, zero, kind, sequence)
                    assert again == numbers, (zero, sequence, kind, again, numbers)
                    apart = [name for name in kept if not torch.equal(kept[name], found[name])]
                    assert not apart, (zero, sequence, kind, apart)


def main():
    torch.set_num_threads(1)
    failed = False
    for layout in sys.argv[1:]:
        world, tensor = map(int, layout.split("-"))
        failed |= not run_ranks(world, partial(run_rank, tensor))
    sys.exit(failed)


if __name__ == "__main__":
    main()
