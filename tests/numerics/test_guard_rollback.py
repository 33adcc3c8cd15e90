"""Poisoned batches: found before they change a weight, passed over, and passed over again by whoever goes on."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support import PROJECT

from pipeline.artifact import write_json
from pipeline.launch.local import Local
from pipeline.models.config import Decoder
from pipeline.settings import encode
from pipeline.stage import Checkpoints, Parallel
from pipeline.stages.pretrain import Pretrain
from pipeline.track import Jsonl
from pipeline.training.guard import Guard
from pipeline.training.ledger import LEDGER, Event, read_ledger
from pipeline.training.optim import AdamW
from pipeline.worker import FrozenTask

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("guard")]

STEPS, EVERY, WINDOW = 160, 10, 16
POISONED = [45, 46, 71, 98, 121]
CLEAN_LOSS_TOLERANCE = 0.01  # of the clean run's validation loss: what the issue asks for
# fp32 sums in another order: 1e-7 relative in a step, which 160 steps of AdamW grew to 1.3e-5 in the loss when measured
LAYOUT_TOLERANCE = 2e-4
GUARD = Guard(policy="rollback", window=WINDOW, skip_batches=2)


@dataclass
class Run:
    """A training in a directory of its own, begun and gone on with on any layouts."""

    directory: Path
    tokens: Path
    dropout: float = 0.1  # whose random numbers depend on the layout
    steps: int = STEPS

    def go(
        self,
        guard: Guard,
        world: int = 1,
        calls: int | None = None,
        status: int = 0,
        tensor: int = 1,
        **poison: list[int],
    ) -> "Run":
        """Train to the end, or until all ranks are killed after so many steps."""
        stage = Pretrain(
            tokens="tokens",
            model=Decoder(d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, max_seq_len=64, dropout=self.dropout),
            seq_len=32,
            batch_tokens=512,
            steps=self.steps,
            optimizer=AdamW(lr=1e-2),
            validation_sequences=64,
            validate_every_steps=None,
            guard=guard,
        )
        run = Local(ranks=world, checkpoints=Checkpoints(every_steps=EVERY, keep=2), parallel=Parallel(tensor=tensor))
        frozen = FrozenTask(
            name="train",
            job=None,
            stage=stage,
            inputs={"tokens": str(self.tokens)},
            fingerprint="0" * 16,
            directory=str(self.directory),
            run=run,
            tracker=Jsonl(),
        )
        (self.directory / "work/ranks").mkdir(parents=True, exist_ok=True)
        write_json(self.directory / "work/task.json", encode(frozen))
        (self.directory / "work/poison.json").write_text(json.dumps(poison))
        for log in self.directory.glob("work/fed-*"):
            log.unlink()
        arguments = [PROJECT / "tests/numerics/guard_ranks.py", self.directory / "work/task.json", world]
        arguments += [self.directory / "work/poison.json", *([] if calls is None else [calls])]
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=PROJECT,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": "."},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        wanted = -signal.SIGKILL if calls is not None else status
        assert json.loads(done.stdout.splitlines()[-1]) == [wanted] * world, self.log
        return self

    @property
    def log(self) -> str:
        return (self.directory / "work/forked-0.log").read_text()

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / "metrics.jsonl").read_text().splitlines()]

    @property
    def loss(self) -> float:
        found: float = self.rows[-1]["validation_loss"]
        return found

    @property
    def weights(self) -> bytes:
        return (self.directory / "model.safetensors").read_bytes()

    @property
    def events(self) -> list[Event]:
        return read_ledger(self.directory / LEDGER)

    @property
    def skipped(self) -> list[int]:
        return sorted(step for event in self.events for step in event.skipped)

    def computed(self, rank: int = 0) -> list[int]:
        return [int(line) for line in (self.directory / f"work/fed-{rank}.jsonl").read_text().splitlines()]


@pytest.fixture
def begin(tiny_tokens, tmp_path):
    return lambda name, **more: Run(tmp_path / name, tiny_tokens, **more)


def test_five_poisoned_batches_cost_less_than_one_percent_and_replay_on_other_layouts(begin):
    clean = begin("clean", dropout=0.0).go(GUARD)
    assert clean.events == []
    assert not (clean.directory / LEDGER).exists()
    assert [row["step"] for row in clean.rows] == list(range(1, STEPS + 1))

    healed = begin("healed", dropout=0.0).go(GUARD, labels=POISONED)
    assert abs(healed.loss / clean.loss - 1) < CLEAN_LOSS_TOLERANCE
    assert [event.step for event in healed.events] == POISONED
    assert [event.rolled_back_to for event in healed.events] == [40, 40, 70, 90, 120]
    assert healed.skipped == [44, 45, 46, 71, 97, 98, 121]
    assert [row["step"] for row in healed.rows] == [s for s in range(1, STEPS + 1) if s not in healed.skipped]
    computed = healed.computed()
    assert [computed.count(step) for step in (43, 45, 46, 71, 97, 98)] == [3, 1, 1, 1, 1, 1]
    for event in healed.events:
        assert "the loss is" in event.reason
        assert len(event.documents) == event.num_documents > 0
        assert {source for source, *_ in event.documents} == {"tokens"}

    # killed after the third event, in the middle of what is done again, and gone on with on another layout
    calls = computed.index(98) + 4
    same = begin("same", dropout=0.0).go(GUARD, calls=calls, labels=POISONED).go(GUARD, labels=POISONED)
    assert (same.events, same.weights) == (healed.events, healed.weights)
    assert not set(same.skipped[:6]) & set(same.computed())
    for world, tensor in ((2, 1), (4, 1), (2, 2)):
        other = begin(f"other-{world}-{tensor}", dropout=0.0).go(GUARD, calls=calls, labels=POISONED)
        other.go(GUARD, world=world, tensor=tensor, labels=POISONED)
        assert other.skipped == healed.skipped
        assert [event.rolled_back_to for event in other.events] == [event.rolled_back_to for event in healed.events]
        assert [row["step"] for row in other.rows] == [row["step"] for row in healed.rows]
        assert other.loss == pytest.approx(healed.loss, abs=LAYOUT_TOLERANCE)
        assert all(other.computed(rank) == other.computed() for rank in range(world))
        assert not set(other.skipped[:6]) & set(other.computed())


def test_without_the_guard_the_same_batches_do_more_harm(begin):
    blind = Guard(policy="rollback", window=WINDOW, threshold=1e9)
    clean, harmed = begin("clean", dropout=0.0).go(blind), begin("harmed", dropout=0.0).go(blind, labels=POISONED)
    assert harmed.events == []
    assert harmed.loss / clean.loss - 1 > 2 * CLEAN_LOSS_TOLERANCE


@pytest.mark.parametrize("policy", ["skip", "rollback"])
@pytest.mark.parametrize("world", [1, 2])
def test_a_loss_that_is_no_number_changes_no_weight(begin, policy, world):
    guard = Guard(policy=policy, window=WINDOW, skip_batches=1)
    done = begin("nan", steps=70).go(guard, world=world, nan=[3, 57])
    assert [event.reason for event in done.events] == ["the loss is nan"] * 2
    assert [event.policy for event in done.events] == ["skip", policy]  # there is no checkpoint before step 10
    assert done.skipped == [3, 57]
    assert [event.loss for event in done.events] == [None, None]
    # one that never saw them: passed over by its ledger from the beginning
    never = begin("never", steps=70)
    never.directory.mkdir()
    (never.directory / LEDGER).write_bytes((done.directory / LEDGER).read_bytes())
    assert never.go(guard, world=world).weights == done.weights


def test_a_rollback_of_one_batch_ends_where_a_skip_does(begin):
    runs = [
        begin(policy, steps=80).go(Guard(policy=policy, window=WINDOW, skip_batches=1), labels=[45, 71])
        for policy in ("skip", "rollback")
    ]
    assert [run.skipped for run in runs] == [[45, 71]] * 2
    assert runs[0].weights == runs[1].weights


def test_fail_ends_the_run_at_once_and_says_why(begin):
    run = begin("fail", steps=70).go(Guard(policy="fail", window=WINDOW), status=5, nan=[57])
    failure = json.loads((run.directory / "work/failure-00000.json").read_text())
    assert failure["class"] == "TrainingError"
    assert failure["problems"][0].startswith("train: step 57: the loss is nan; ")
    assert [row["step"] for row in run.rows] == list(range(1, 57))
    assert run.events == []


def test_too_many_events_in_a_row_end_the_run(begin):
    guard = Guard(policy="rollback", window=WINDOW, skip_batches=1, max_in_a_row=3)
    run = begin("row", steps=70).go(guard, world=2, status=5, nan=[42, 43, 44, 45])
    failure = json.loads((run.directory / "work/failure-00001.json").read_text())
    assert "step 45: the loss is nan; this after 3 such steps in a row (guard.max_in_a_row)" in failure["problems"][0]
    assert run.skipped == [42, 43, 44]
