"""What DeepSpeed costs: our step through the engine, on one rank, against a bare PyTorch loop with the same model.

    python bench/engine.py [--rounds 15] [--threads 1] [--quick]

Model, rows, optimizer and clipping are the same. All take turns in one process, step by step, so that whatever else
the machine does meets all of them; the medians count. What they have learned in the end is compared too. On one rank
in fp32 training leaves ZeRO out, which would share out nothing; its stages are measured all the same.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch
from tables import print_lines
from torch import Tensor, nn

PROJECT = Path(__file__).parent.parent
sys.path.insert(0, str(PROJECT))

from pipeline.models.config import Decoder  # noqa: E402
from pipeline.models.initial import init_weights  # noqa: E402
from pipeline.models.transformer import Transformer  # noqa: E402
from pipeline.parallel.engine import EngineSettings, build_engine, process_group  # noqa: E402
from pipeline.parallel.mesh import Mesh, shape_batch  # noqa: E402
from pipeline.stage import Parallel  # noqa: E402
from pipeline.training.optim import AdamW  # noqa: E402
from pipeline.training.step import Batch, take_step  # noqa: E402

BARE, OURS = "bare PyTorch loop", "engine, as training sets it"
STAGES: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)
CLIP, WARM_UP = 1.0, 3
GOAL = 1.05
SHAPE = Decoder(vocab_size=4096, d_model=256, num_layers=4, num_heads=4, max_seq_len=256)
QUICK = Decoder(vocab_size=256, d_model=64, num_layers=2, num_heads=2, max_seq_len=64)
ROWS = 4
Way = Callable[[Tensor], float]  # from ids to the loss of a step
Seconds = tuple[float, float]  # on the wall's clock, and the processor's


def build(config: Decoder) -> Transformer:
    """Return the model with its first weights."""
    model = Transformer(config)
    init_weights(model, 0)
    return model


def bare(config: Decoder) -> Way:
    """Return a step in plain torch."""
    model = build(config).train()
    optimizer = AdamW(lr=1e-3).build(model)

    def step(ids_BT: Tensor) -> float:
        loss = model(ids_BT[:, :-1], ids_BT[:, 1:])["tokens"] / ids_BT[:, 1:].numel()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        number: float = loss.item()
        return number

    return step


def through_engine(config: Decoder, mesh: Mesh, settings: EngineSettings) -> Way:
    """Return what training does."""
    model = build(config)
    engine = build_engine(model, AdamW(lr=1e-3).build(model), settings, mesh)

    def step(ids_BT: Tensor) -> float:
        labels_BT = ids_BT[:, 1:]
        batch = Batch([{"ids": ids_BT[:, :-1], "labels": labels_BT}], {"labels": labels_BT.numel()}, labels_BT.numel())
        return take_step(engine, mesh, batch, {}).loss

    return step


def batches(config: Decoder, count: int) -> Iterator[Tensor]:
    """Yield ids of some rows, always the same."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield torch.randint(config.real_vocab_size, (ROWS, config.max_seq_len + 1), generator=generator)


def measure(ways: dict[str, Way], config: Decoder, rounds: int) -> tuple[dict[str, list[Seconds]], dict[str, float]]:
    """Return the seconds of every step, and the last losses."""
    seconds: dict[str, list[Seconds]] = {name: [] for name in ways}
    losses: dict[str, float] = {}
    names = [*ways]
    for number, ids_BT in enumerate(batches(config, WARM_UP + rounds)):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            wall, cpu = time.perf_counter(), time.process_time()
            losses[name] = ways[name](ids_BT)
            if number >= WARM_UP:
                seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return seconds, losses


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a small model, in seconds")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = QUICK if args.quick else SHAPE
    with process_group() as mesh:
        ways = {BARE: bare(config)}
        stages = [EngineSettings.of(shape_batch(ROWS, None, 1), Parallel(zero=zero), "fp32", CLIP) for zero in STAGES]
        ways[OURS] = through_engine(config, mesh, stages[1].simplified())
        ways |= {f"engine, ZeRO {each.zero}": through_engine(config, mesh, each) for each in stages}
        seconds, losses = measure(ways, config, args.rounds)
    print(f"torch {torch.__version__}, {args.threads} thread(s), {config.num_params():,} parameters")
    print(
        f"{ROWS} rows of {config.max_seq_len} tokens, {args.rounds} rounds; medians, also of the shares in each round\n"
    )
    lines = [("", "wall ms", "of the bare loop", "goal", "CPU ms", "of the bare loop", "last loss")]
    for name, steps in seconds.items():
        cells = []
        for clock in (0, 1):
            shares = [mine[clock] / its[clock] for mine, its in zip(steps, seconds[BARE], strict=True)]
            middle = 1e3 * statistics.median(step[clock] for step in steps)
            cells.append((f"{middle:.1f}", f"{statistics.median(shares):.3f}x"))
        goal = f"<= {GOAL}" if name == OURS else ""
        lines.append((name, *cells[0], goal, *cells[1], f"{losses[name]:.6f}"))
    print_lines(lines)


if __name__ == "__main__":
    main()
