"""What the guard and the heartbeat cost a step of a run in which nothing goes wrong.

    python bench/guard.py [--steps 12] [--threads 1]

A step as the training loop does it, with and without its share of both, in turns, in one process; then that share by
itself, a thousand times, with a window that is full. The goal is under 1 % of a step. The quickstart's model is one of
the smallest that is worth training; the tiny one is what the tests train.
"""

import argparse
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tables import print_lines

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.models.config import Decoder
from pipeline.models.initial import init_weights
from pipeline.models.transformer import Transformer
from pipeline.parallel.engine import EngineSettings, build_engine, process_group
from pipeline.parallel.mesh import Mesh, shape_batch
from pipeline.training.guard import Guard, Watch
from pipeline.training.heartbeat import Heart
from pipeline.training.optim import AdamW
from pipeline.training.step import Batch, take_step

CALLS = 1000
PHASES = ("feed", "forward and backward", "update")
VOCABULARY = 4096


@dataclass(frozen=True)
class Case:
    """A model and its batch."""

    name: str
    config: Decoder
    rows: int
    seq_len: int


CASES = [
    Case("tiny", Decoder(vocab_size=VOCABULARY, d_model=32, num_layers=1, num_heads=2, max_seq_len=64), 4, 32),
    Case(
        "quickstart",
        Decoder(vocab_size=VOCABULARY, d_model=192, num_layers=4, num_heads=6, num_kv_heads=2, d_ff=512),
        rows=8,
        seq_len=256,
    ),
]


@dataclass
class Times:
    """Seconds of each step, with and without what is measured."""

    bare: list[float] = field(default_factory=list)
    guarded: list[float] = field(default_factory=list)


class Guarded:
    """What the loop adds to a step."""

    def __init__(self, heart: Heart) -> None:
        self.heart, self.watch, self.step = heart, Watch(Guard()), 0
        chooser = random.Random(0)
        for step in range(Guard().window):
            self.watch.judge(step, 3 + chooser.gauss(0, 0.1), math.exp(chooser.gauss(0, 0.2)))

    def begin(self) -> None:
        """Begin a step."""
        self.step += 1
        self.heart.beat(PHASES[0], self.step)
        self.heart.beat(PHASES[1])

    def before_update(self) -> None:
        """Begin the update."""
        self.heart.beat(PHASES[2])

    def may_update(self, loss: float, grad_norm: float) -> bool:
        """Judge the step; whatever its loss, the window gets one that is usual."""
        return self.watch.judge(self.step, 3.0 + 0.01 * (self.step % 7), 1.0) is None


def main() -> None:
    """Measure both cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="of each kind")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lines = [["", "step ms", "with both ms", "judging µs", "heartbeats µs", "together", "goal"]]
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        mesh = stack.enter_context(process_group(at=(work / "meet").as_uri()))
        heart = stack.enter_context(Heart(work / "heartbeats", 0, 1, 600.0, 1, leave=lambda error: None))
        for case in CASES:
            lines.append(measure(case, mesh, Guarded(heart), arguments.steps))
    print_lines(lines)
    print(f"{os.cpu_count()} processors, torch {torch.__version__}, medians; 'together' is of a step without both")


def measure(case: Case, mesh: Mesh, guarded: Guarded, steps: int) -> list[str]:
    """Return the line of a case."""
    times = train(case, mesh, guarded, steps)
    step_s = statistics.median(times.bare)
    judge_s = per_call(lambda: guarded.may_update(3.0, 1.0))
    beat_s = len(PHASES) * per_call(lambda: guarded.heart.beat("update"))
    milliseconds = [f"{1e3 * statistics.median(kind):.2f}" for kind in (times.bare, times.guarded)]
    parts = [f"{1e6 * seconds:.1f}" for seconds in (judge_s, beat_s)]
    return [case.name, *milliseconds, *parts, f"{100 * (judge_s + beat_s) / step_s:.3f} %", "< 1 %"]


def train(case: Case, mesh: Mesh, guarded: Guarded, steps: int) -> Times:
    """Do steps of both kinds in turns."""
    model = Transformer(case.config)
    init_weights(model, 0)
    settings = EngineSettings(shape_batch(case.rows, None, 1), 1, "fp32", 1.0, {})
    engine = build_engine(model, AdamW().build(model, {}), settings, mesh)
    ids = torch.randint(VOCABULARY, (case.rows, case.seq_len))
    batch = Batch([{"ids": ids, "labels": ids}], {"labels": ids.numel()}, ids.numel())
    times = Times()
    for step in range(2 * steps + 4):
        began = time.perf_counter()
        if step % 2:
            guarded.begin()
            take_step(engine, mesh, batch, {}, guarded.before_update, guarded.may_update)
        else:
            take_step(engine, mesh, batch, {})
        if step >= 4:  # the first are slower
            (times.guarded if step % 2 else times.bare).append(time.perf_counter() - began)
    engine.destroy()
    return times


def per_call(call: Callable[[], object]) -> float:
    """Return the median seconds of a call."""
    seconds = []
    for _ in range(CALLS):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
