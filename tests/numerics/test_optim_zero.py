"""Every optimizer learns on two ranks, under every ZeRO stage, what plain torch learns alone; and continues exactly."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import PROJECT

OPTIMIZERS = ("adamw", "muon", "lion", "adafactor", "schedule_free_adamw")
CASES = (*OPTIMIZERS, "ema", "last")
LAYOUTS = ("0-2-fp32", "0-4-fp32", "1-2-fp32", "2-2-fp32", "3-2-fp32", "3-4-fp32", "1-1-fp32")  # ZeRO, ranks, precision
BF16_LAYOUTS = ("1-2-bf16", "2-2-bf16", "3-2-bf16")
NOTHING_CUT = ("0-2-fp32", "0-4-fp32", "1-1-fp32")

# Sums in another order: some 1e-7 of a weight or loss near one in a step, over 8 steps of at most 0.1
TOLERANCE = 5e-6
# Gradients in bf16 are wrong by 2^-9 of their size; Adam makes more of those near zero
BF16_SHARE = 0.05

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("optim_zero")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return where the training of every layout left what it found."""
    root = tmp_path_factory.mktemp("optim") / "found"
    script = Path(__file__).with_name("optim_ranks.py")
    arguments = [sys.executable, str(script), str(root), *LAYOUTS, *BF16_LAYOUTS]
    done = subprocess.run(arguments, cwd=PROJECT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return root


def load(directory: Path, name: str):
    return torch.load(directory / f"{name}.pt")


def apart(one, other) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)


def distance(one, other) -> float:
    return sum((one[name] - other[name]).square().sum().item() for name in one) ** 0.5


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_learned_does_not_depend_on_the_layout(trained, layout, name):
    alone, found = load(trained / "alone", name), load(trained / layout, name)
    assert alone["losses"][-1] < alone["losses"][1] - 0.1  # of the same rows
    assert found["losses"] == pytest.approx(alone["losses"], abs=TOLERANCE)
    assert apart(found["weights"], alone["weights"]) < TOLERANCE
    assert apart(found["evaluated"], alone["evaluated"]) < TOLERANCE
    assert bool(found["cut"]) == (layout not in NOTHING_CUT)  # some matrix did lie on several ranks


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_continued_training_ends_in_the_same_bits(trained, layout, name):
    found = load(trained / layout, name)
    continued = found["continued"]
    assert continued["losses"] == found["losses"][-len(continued["losses"]) :]
    for which in ("weights", "evaluated"):
        assert all(torch.equal(continued[which][weight], found[which][weight]) for weight in found[which])
    assert continued["evaluated_loss"] == found["evaluated_loss"]


@pytest.mark.parametrize("name", ["schedule_free_adamw", "ema", "last"])
def test_the_weights_to_evaluate_are_others_than_those_in_training(trained, name):
    found = load(trained / "3-2-fp32", name)
    assert apart(found["weights"], found["evaluated"]) > 1e-2


@pytest.mark.parametrize("name", ["muon", "adafactor", "ema"])
@pytest.mark.parametrize("layout", BF16_LAYOUTS)
def test_bf16_follows_and_continues_exactly(trained, layout, name):
    alone, found = load(trained / "alone", name), load(trained / layout, name)
    moved = distance(alone["weights"], alone["first"])
    assert distance(found["weights"], alone["weights"]) < BF16_SHARE * moved
    continued = found["continued"]["weights"]
    assert all(torch.equal(continued[weight], found["weights"][weight]) for weight in continued)
