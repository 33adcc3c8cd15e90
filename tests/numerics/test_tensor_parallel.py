"""A model that tensor-parallel ranks share is the same model: its losses, gradients and trainings are."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("tensor_ranks")]
RANKS = Path(__file__).with_name("tensor_ranks.py")

# Relative to the largest number of a gradient: fp64 has 53 bits, and sums of some thousand numbers are made in another
# order; for the gradients that are zero but for rounding, 1e-3 stands in for it.
EXACT = 1e-11
# Four steps of AdamW in fp64, which divides gradients by their own size and so keeps their relative rounding.
EXACT_TRAINING = 1e-10
# In fp32 such a training is as far from fp64 as it is in one process, several times over since sums are made in another
# order and the steps blow up what they differ in; where one process is exact by chance, 16 units in the last place.
SEVERAL, LAST_PLACES = 4, 16 * 2**-24
# What is not shared (norms), and pieces that are rounded up, beside a part of a model of 70 kB.
WHOLE_EVERYWHERE = 1.1


def run(directory, world, tensor, sequence, *parts):
    """Return what each rank found."""
    command = [sys.executable, "-W", "ignore", RANKS, directory, world, tensor, int(sequence), *parts]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.parametrize("sequence", [False, True], ids=["whole_rows", "shared_rows"])
@pytest.mark.parametrize("tensor", [2, 4])
def test_every_family_has_the_losses_and_gradients_of_one_process(tmp_path, tensor, sequence):
    """Logits, classifiers and students too; several documents, padding, label smoothing and the z-loss among them."""
    for found in run(tmp_path / "found", tensor, tensor, sequence, "gradients"):
        assert len(found["gradients"]) == 25
        for case, differences in found["gradients"].items():
            assert {name: size for name, size in differences.items() if not size < EXACT} == {}, case


@pytest.mark.parametrize("sequence", [False, True], ids=["whole_rows", "shared_rows"])
def test_dropout_differs_between_ranks_only_in_what_they_have_of_their_own(tmp_path, sequence):
    one, other = (found["dropout"] for found in run(tmp_path / "found", 2, 2, sequence, "dropout"))
    assert one["inside"] != other["inside"]
    assert one["outside"] == other["outside"]
    assert one["embedded"] == other["embedded"]
    assert (one["residual"] != other["residual"]) == sequence
    assert one["replicated"] == other["replicated"]
    assert one["differ"] == other["differ"] == []  # what is computed again draws the same


@pytest.mark.parametrize(("world", "tensor", "sequence"), [(2, 2, False), (2, 2, True), (4, 2, True), (4, 4, False)])
def test_trainings_are_those_of_one_process(tmp_path, world, tensor, sequence):
    """Losses, gradient norms with clipping, and the last weights, with ZeRO stages 0 to 3 and two microbatches."""
    ranks = run(tmp_path / "found", world, tensor, sequence, "training")
    for rank, found in enumerate(ranks):
        assert len(found["training"]) == 12
        for case, differences in found["training"].items():
            assert bool(differences["first"]) == (rank == 0)  # which alone has the whole weights
            assert {name: size for name, size in differences["first"].items() if size} == {}, case
            ours, alone = differences["ranks"], differences["alone"]
            close = {name: max(SEVERAL * alone[name], LAST_PLACES) for name in ("loss", "grad_norm")}
            close["weights"] = max(SEVERAL * max(alone["weights"].values()), LAST_PLACES)
            if case.endswith("ZeRO 0"):
                close = dict.fromkeys(close, EXACT_TRAINING)
            assert ours["loss"] < close["loss"], case
            assert ours["grad_norm"] < close["grad_norm"], case
            assert {name: size for name, size in ours["weights"].items() if not size < close["weights"]} == {}, case


def test_ranks_begin_with_their_parts_of_another_model(tmp_path):
    for found in run(tmp_path / "found", 2, 2, False, "begun"):
        for zero, differences in found["begun"].items():
            assert bool(differences.pop("pieces")) == (zero == "ZeRO 3")
            assert "decoder.blocks.1.mlp.router.balance_bias" in differences
            assert {name: size for name, size in differences.items() if size} == {}, zero


def test_a_rank_never_holds_more_than_its_part_and_one_weight(tmp_path):
    for found in run(tmp_path / "found", 4, 2, False, "creation"):
        for zero, parts in (("ZeRO 1", 2), ("ZeRO 3", 4)):
            held = found["creation"][zero]
            assert held["most"] <= held["last"], zero  # nothing is left of the weight before, when the next is drawn
            assert held["whole"] / parts <= held["last"] <= held["whole"] / parts * WHOLE_EVERYWHERE, zero


def test_lengths_that_ranks_cannot_share_are_refused(tmp_path):
    for found in run(tmp_path / "found", 2, 2, True, "refused"):
        assert found["refused"] == (
            "run.parallel.sequence: 15 positions cannot be divided among 2 ranks; take lengths that divide, or set it "
            "to false"
        )
