"""Which samples were in which step: the same whatever is killed, and however many processes share the work.

And where the same number shares it, the weights in the end are the same bit by bit.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
from support import PROJECT, command, run_pipeline

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("resume")]

STEPS = 60
KILLS = {1: 7, 2: 7, 4: 6}  # by number of processes: 20 in all
LAYOUTS = {1: [], 2: ["run.parallel.zero=3"], 4: ["run.parallel.tensor=2", "run.parallel.zero=2"]}
MODEL = "{kind:decoder,d_model:16,num_layers:1,num_heads:2,max_seq_len:32,dropout:0.1}"


def settings(tokens: Path, root: Path, world: int) -> list[object]:
    mixture = (
        "{kind:phases,phases:[{tokens:5000,mixture:{kind:weights,weights:{a:0.7,b:0.3}}},"
        "{mixture:{kind:temperature,temperature:2.0}}]}"
    )
    return [
        "stage=pretrain",
        f"stage.model={MODEL}",
        f"stage.tokens={{a:{tokens},b:{tokens}}}",
        f"stage.mixture={mixture}",
        "stage.max_epochs=null",
        "stage.seq_len=32",
        "stage.batch_tokens=256",
        f"stage.steps={STEPS}",
        "stage.validate_every_steps=null",
        "stage.validation_sequences=4",
        "run.checkpoints.every_steps=2",
        f"run.ranks={world}",
        f"root={root}",
        *LAYOUTS[world],
    ]


def freeze(tokens: Path, root: Path, world: int) -> Path:
    """Start a training by its command line, kill it, and return its frozen task."""
    process = subprocess.Popen(
        command(*settings(tokens, root, world)), cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (found := list(root.glob("model/*/work/task.json"))):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return found[0]


def train(tokens: Path, directory: Path, world: int, kills: list[int]) -> tuple[dict[int, list[list[int]]], bytes]:
    """Train with `world` processes that are killed after each of these steps.

    Returns:
        The sample ids by step, and the weights.
    """
    directory.mkdir(exist_ok=True)
    ledger = directory / f"{world}-{len(kills)}.jsonl"
    task = freeze(tokens, directory / ledger.stem, world)
    arguments = [sys.executable, PROJECT / "tests/numerics/forked_ranks.py", task, world, ledger, *kills]
    done = subprocess.run(
        list(map(str, arguments)), cwd=PROJECT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *killed, _ended = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert killed == [{"killed": True}] * len(kills)  # none had ended before
    run_pipeline(*settings(tokens, directory / ledger.stem, world))  # publishes: nothing is left to train
    (weights,) = (directory / ledger.stem).glob("model/*/model.safetensors")
    return read_ledger(ledger), weights.read_bytes()


def read_ledger(ledger: Path) -> dict[int, list[list[int]]]:
    """Return the sample ids of each step in their order; whoever read some of them, and how often, read the same."""
    read: dict[tuple[int, int], list[list[int]]] = {}
    for line in ledger.read_text().splitlines():
        row = json.loads(line)
        key = (row["step"], row["first"])
        assert read.setdefault(key, row["ids"]) == row["ids"], f"step {row['step']} was read in two ways"
    steps: dict[int, list[list[int]]] = defaultdict(list)
    for (step, _), ids in sorted(read.items()):
        steps[step] += ids
    return dict(steps)


def test_twenty_kills_over_one_two_and_four_processes_leave_order_and_weights_as_they_were(tiny_tokens, tmp_path):
    chooser = random.Random(0)
    order, _ = train(tiny_tokens, tmp_path, 1, [])
    assert sorted(order) == list(range(1, STEPS + 1))
    assert all(len(ids) == 8 for ids in order.values())
    for world, count in KILLS.items():
        undisturbed = train(tiny_tokens, tmp_path / "whole", world, [])
        kills = sorted(chooser.sample(range(1, STEPS - 5), count))
        disturbed = train(tiny_tokens, tmp_path, world, kills)
        assert disturbed[0] == undisturbed[0] == order
        assert disturbed[1] == undisturbed[1]  # bit by bit, dropout included
