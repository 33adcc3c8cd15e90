"""Which samples were in which step: the same whatever is killed, and however many processes share the work."""

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
MODEL = "{kind:decoder,d_model:16,num_layers:1,num_heads:2,max_seq_len:32}"


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


def train(tokens: Path, directory: Path, world: int, kills: list[float]) -> dict[int, list[list[int]]]:
    """Train with `world` processes that are killed after so many seconds each; return the sample ids by step."""
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
    return read_ledger(ledger)


def read_ledger(ledger: Path) -> dict[int, list[list[int]]]:
    """Return the sample ids of each step in their order; whoever read some of them, and how often, read the same."""
    read: dict[tuple[int, int, int], list[list[int]]] = {}
    for line in ledger.read_text().splitlines():
        row = json.loads(line)
        key = (row["step"], row["first"], row["rank"])
        assert read.setdefault(key, row["ids"]) == row["ids"], f"step {row['step']} was read in two ways"
    steps: dict[int, list[list[int]]] = defaultdict(list)
    for (step, _, _), ids in sorted(read.items()):
        steps[step] += ids
    return dict(steps)


def test_twenty_kills_over_one_two_and_four_processes_leave_the_order_as_it_was(tiny_tokens, tmp_path):
    chooser = random.Random(0)
    undisturbed = train(tiny_tokens, tmp_path, 1, [])
    assert sorted(undisturbed) == list(range(1, STEPS + 1))
    assert all(len(ids) == 8 for ids in undisturbed.values())
    for world, count in KILLS.items():
        kills = [chooser.uniform(0, 2.5) for _ in range(count)]
        assert train(tiny_tokens, tmp_path, world, kills) == undisturbed
