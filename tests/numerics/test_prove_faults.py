"""The certificate holds for layouts that are right, of every family, and finds every fault that is put into one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import PROJECT

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("prove")]

RIGHT = ("right", "muon", "experts", "encoder", "encoder_decoder")
# What each fault does to the row of its layout: the errors that must show it, each at least so large.
SHOWN = {
    "drop_tensor_sum": {"loss": 1e-7, "weights": 1e-2},
    "drop_gradient_average": {"grad_norm": 1e-2, "weights": 1e-2},
    "count_twice": {"grad_norm": 1e-3, "weights": 1e-5},
    "odd_vocabulary": {"loss": 1e-3},
    "count_padding": {"loss": 1e-3, "weights": 1e-2},
    "norm_of_sequence": {"grad_norm": 1e-4, "weights": 1e-1},
    "norm_of_heads": {"grad_norm": 1e-5, "weights": 1e-1},
    "leave_unmarked": {"grad_norm": 0.1},
    "forget_accumulation": {"grad_norm": 0.9},
    "count_own_labels": {"loss": 1e-4, "weights": 1e-2},
}
# What it does to the row about random numbers.
SAID = {
    "same_seeds": "tensor ranks draw the same numbers for the dropout of 'attention', where each has its own part",
    "other_seeds": "tensor ranks draw other numbers for the dropout of 'dropout', which all of them hold",
    "same_seeds_of_data_ranks": "data ranks draw the same numbers for the dropout of 'dropout'",
    "other_seeds_again": "full recomputation does not drop the same again",
    "norm_of_heads": "the ranks' copies of 'decoder.blocks.1.attention.query_norm.weight' are not the same",
}


@pytest.fixture(scope="module")
def proven(tmp_path_factory):
    """Return where the stage left what it ended with, for every fault."""
    root = tmp_path_factory.mktemp("prove")
    script = Path(__file__).with_name("prove_ranks.py")
    done = subprocess.run(
        [sys.executable, str(script), str(root), "2"], cwd=PROJECT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return root


def load(root: Path, name: str):
    found = json.loads((root / f"{name}.json").read_text())
    return found["ended"], found["rows"], found["tried"]


def test_every_fault_has_a_test(proven):
    assert {*SHOWN, *SAID, *RIGHT, "stopped"} == {path.stem for path in proven.glob("*.json")}


@pytest.mark.parametrize("name", RIGHT)
def test_layouts_that_are_right_are_certified(proven, name):
    ended, rows, _ = load(proven, name)
    assert ended == ""
    assert len(rows) > 3
    assert not any(row["problems"] for row in rows)


def test_a_stop_ends_it_on_all_ranks(proven):
    ended, rows, _ = load(proven, "stopped")
    assert ended == "Preempted: prove: nothing of a certificate is kept before its end"
    assert rows == []


@pytest.mark.parametrize("name", SHOWN)
def test_a_fault_is_found_in_losses_norms_or_weights(proven, name):
    ended, (row, *_), layout = load(proven, name)
    assert ended.startswith("TrainingError: prove: ")
    assert row["layout"] == layout
    assert f"{layout}: " in ended
    assert row["problems"]
    for error, least in SHOWN[name].items():
        assert row[error] is None or row[error] > least, f"{error} is {row[error]}"


@pytest.mark.parametrize("name", SAID)
def test_a_fault_is_found_in_random_numbers(proven, name):
    ended, rows, _ = load(proven, name)
    problems = [problem for row in rows if row["layout"].startswith("random numbers") for problem in row["problems"]]
    assert ended.startswith("TrainingError: prove: ")
    assert SAID[name] in problems


@pytest.mark.parametrize("name", sorted(SAID.keys() - SHOWN.keys()))
def test_training_without_dropout_does_not_show_them(proven, name):
    _, (row, *_), _ = load(proven, name)
    assert row["problems"] == []


def test_an_unmarked_parameter_is_not_counted_on_every_rank(proven):
    _, (row, *_), _ = load(proven, "leave_unmarked")
    assert any(problem.startswith("the norm of step") for problem in row["problems"])
    assert row["weights"] is None  # what was put together is a slice, taken for the whole
