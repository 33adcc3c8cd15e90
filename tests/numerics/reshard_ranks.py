"""Trains made-up weights on layouts of ranks, one after another, each going on from the checkpoint of the one before.

`python reshard_ranks.py PHASES.json OUTPUT.jsonl`: forks the ranks of each phase; every rank appends a line: its phase
and rank, the step that it went on after, the notes that it found, and the error that ended it. A phase is a mapping
with the fields of `Phase`. Gradients are given, and exact in any order.
"""

import json
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import deepspeed  # noqa: F401 (here, so that no rank has to)
import torch
from forking import start_ranks
from optim_slices_ranks import ROWS, gradients, make_model, set_rates, slice_of
from torch import nn

from pipeline.errors import PipelineError
from pipeline.parallel.engine import EngineSettings, build_engine, process_group
from pipeline.parallel.mesh import shape_batch
from pipeline.stage import Checkpoints
from pipeline.training.averaging import EMA, Last
from pipeline.training.checkpoints import background
from pipeline.training.checkpoints.saver import Saver
from pipeline.training.optim import Adafactor, AdamW, Lion, Muon, ScheduleFreeAdamW

OPTIMIZERS = {
    "adamw": (AdamW(lr=3e-2), None),
    "ema": (AdamW(lr=3e-2), EMA(decay=0.6)),
    "muon": (Muon(lr=5e-2, weight_decay=0.1), Last(count=2, every_steps=2)),
    "lion": (Lion(lr=1e-2, weight_decay=0.1), None),
    "adafactor": (Adafactor(lr=0.1, weight_decay=0.1), None),
    "schedule_free_adamw": (ScheduleFreeAdamW(lr=3e-2), None),
}
FROZEN, SLEEP_S = (3, 8), 1.0


@dataclass
class Phase:
    """What the ranks do.

    Attributes:
        zero: ZeRO stage; `tensor` of the `world` ranks share the weights.
        directory: Of the checkpoints that they go on from and save.
        until: The last step.
        then: Where the state after it is saved once more, in full.
        full_on: The rank that has no room on its disk.
        sleep_on: The rank that takes its time with its files.
    """

    directory: str
    zero: int = 1
    tensor: int = 1
    world: int = 1
    kind: str = "fp32"
    optimizer: str = "adamw"
    until: int = 3
    then: str | None = None
    checkpoints: dict = field(default_factory=lambda: {"every_steps": 1})
    full_on: int | None = None
    sleep_on: int | None = None


def build(mesh, phase):
    """Return an engine with this rank's slices."""
    optimizer_settings, average = OPTIMIZERS[phase.optimizer]
    model = make_model(mesh.place, torch.float64 if phase.kind == "fp64" else torch.float32)
    model.register_buffer("balance", torch.zeros(3))
    model.register_buffer("counts", torch.zeros(2, dtype=torch.int64))
    frozen = torch.arange(24.0).view(FROZEN)
    model.frozen = nn.Parameter(slice_of(frozen, 1, mesh.place), requires_grad=False)
    if mesh.tensor > 1:
        model.frozen.tensor_model_parallel = model.frozen.model_parallel = True
        model.frozen.partition_dim = 1
    optimizer = optimizer_settings.build(model)
    if average:
        average.attach(optimizer)
    extra = {"zero_optimization": {"stage3_param_persistence_threshold": 20}} if phase.zero else {}
    if phase.zero == 3:
        extra["zero_optimization"]["sub_group_size"] = 100
    precision = "bf16" if phase.kind == "bf16" else "fp32"
    settings = EngineSettings(shape_batch(ROWS, None, mesh.data), phase.zero, precision, None, extra)
    return build_engine(model, optimizer, settings, mesh)


def train(mesh, phase, report):
    """Go on from the newest checkpoint."""
    engine = build(mesh, phase)

    def saver_in(directory, settings):
        return Saver(engine, Path(directory), mesh, phase.zero, settings, 10**6, log=report["log"].append)

    saver = saver_in(phase.directory, Checkpoints(**phase.checkpoints))
    found = saver.restore()
    start = found.step if found else 0
    report |= {"start": start, "notes": found.notes if found else None, "ranks": str(found.ranks) if found else None}
    misbehave(mesh, phase)
    for step in range(start + 1, phase.until + 1):
        set_rates(engine.optimizer, OPTIMIZERS[phase.optimizer][0], step)
        (mine,) = shape_batch(ROWS, None, mesh.data).microbatches(mesh.data_rank)
        given = gradients(step, mine, mesh.place) | {"frozen": torch.zeros(FROZEN[0], FROZEN[1] // mesh.tensor)}
        engine.backward(engine(given) * mesh.data)
        saver.before_update()
        if mesh.sum_all([float(saver.failed)], engine.device)[0]:
            saver.raise_failure()
        engine.step()
        engine.module.balance.fill_(step / 3)
        engine.module.counts.fill_(step)
        if saver.due(step, time.monotonic()):
            saver.save(step, {"seen": [step, 1 / step]}, validation_loss=abs(step - 3.5))
    report["stall_before_finish_s"] = saver.stall_s
    saver.finish()
    report["stall_s"] = saver.stall_s
    if phase.then:
        whole = saver_in(phase.then, Checkpoints(every_steps=1))
        whole.save(phase.until, {})
        whole.finish()


def misbehave(mesh, phase):
    """Make the disk of this rank fail as the phase says."""
    if phase.full_on == mesh.rank:
        os.write = filling(os.write)
    if phase.sleep_on == mesh.rank:
        background.write_part = slow(background.write_part)


def filling(write):
    def full(descriptor, data):
        if len(data) > 1000:
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    return full


def slow(write_part):
    def waiting(*arguments):
        time.sleep(SLEEP_S)
        return write_part(*arguments)

    return waiting


def run_rank(phase, number, output, rank):
    report = {"phase": number, "rank": int(os.environ["RANK"]), "log": []}
    try:
        with process_group(phase.tensor) as mesh:
            train(mesh, phase, report)
    except PipelineError as error:
        report |= {"error": str(error), "class": type(error).__name__}
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, json.dumps(report).encode() + b"\n")


def run(phase, number, output):
    """Run the ranks of a phase; where one ends badly the others are ended, as the launcher does."""
    ranks = set(start_ranks(phase.world, partial(run_rank, phase, number, output)))
    failed = False
    while ranks:
        child, status = os.wait()
        ranks.discard(child)
        if status and not failed:
            failed = True
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    return failed


def main():
    phases = [Phase(**phase) for phase in json.loads(Path(sys.argv[1]).read_text())]
    for number, phase in enumerate(phases):
        failed = run(phase, number, sys.argv[2])
        if failed:
            sys.exit(f"phase {number} failed: {phase}")


if __name__ == "__main__":
    main()
