"""An optimizer does to slices of weights, on tensor-parallel ranks and under every ZeRO stage, what it does to wholes.

The gradients are given, so that nothing but the optimizers (and DeepSpeed's sums of gradients) is looked at.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import PROJECT

CASES = ("muon", "adafactor", "schedule_free_adamw")
LAYOUTS = (  # ZeRO stage, tensor-parallel degree, ranks, type
    *(f"0-{shape}-fp64" for shape in ("2-2", "2-4", "4-4")),
    *(f"{zero}-{shape}-fp32" for zero in (1, 2, 3) for shape in ("2-2", "2-4", "4-4")),
    *(f"{zero}-2-4-{kind}" for zero in (1, 2, 3) for kind in ("bf16", "fp16")),
)

# Roundings of the type, 2^-53 or 2^-24, in numbers up to one, over six steps; sums are in another order. The gradients
# and first weights are exact in 16 bits, in which nothing else happens: masters and optimizers are fp32
TOLERANCE = {"fp64": 1e-14, "fp32": 1e-6, "bf16": 1e-6, "fp16": 1e-6}
SQUARES_TOLERANCE = {"fp64": 1e-14, "fp32": 2e-6, "bf16": 2e-6, "fp16": 2e-6}  # relative, of sums of some ten squares

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("optim_slices")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a function that loads what the training of every layout left: of one process, and of each rank."""
    root = tmp_path_factory.mktemp("slices") / "found"
    script = Path(__file__).with_name("optim_slices_ranks.py")
    arguments = [sys.executable, str(script), str(root), *LAYOUTS]
    done = subprocess.run(arguments, cwd=PROJECT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr

    def load(layout, name):
        alone = "alone-fp64" if layout.endswith("fp64") else "alone-fp32"
        ranks = [torch.load(path) for path in sorted((root / layout).glob(f"{name}-*.pt"))]
        assert len(ranks) == int(layout.split("-")[2])
        return torch.load(root / alone / f"{name}.pt"), ranks

    return load


def apart(one, other) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_slices_move_as_the_whole_does(trained, layout, name):
    alone, ranks = trained(layout, name)
    tolerance = TOLERANCE[layout.split("-")[-1]]
    assert all((alone["first"][weight] - alone["weights"][weight]).abs().max() > 0.01 for weight in alone["first"])
    assert apart(ranks[0]["weights"], alone["weights"]) < tolerance
    assert apart(ranks[0]["evaluated"], alone["evaluated"]) < tolerance
    assert apart(ranks[0]["evaluated"], ranks[0]["weights"]) > 1000 * tolerance  # else it would say nothing


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_ranks_do_not_share_is_the_same_in_every_bit(trained, layout, name):
    _, ranks = trained(layout, name)
    assert ranks[0]["alike"].keys() == {"norm.weight", "block.down.bias", "dense.weight"}
    for other in ranks[1:]:
        assert all(torch.equal(other["alike"][weight], kept) for weight, kept in ranks[0]["alike"].items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adafactor_keeps_the_squares_of_wholes_on_every_rank(trained, layout):
    alone, ranks = trained(layout, "adafactor")
    wanted = {name: squares for name, squares in alone["squares"].items() if squares is not None}
    found = {name: squares for kept in ranks for name, squares in kept["squares"].items()}
    tolerance = SQUARES_TOLERANCE[layout.split("-")[-1]]
    for name, squares in wanted.items():
        torch.testing.assert_close(found[name], squares, rtol=tolerance, atol=0)
        assert all(torch.equal(kept["squares"][name], found[name]) for kept in ranks)
    assert found.keys() == wanted.keys()
    assert wanted["block.down.weight"].shape == (7 + 12,)
    assert wanted["experts.up"].shape == (3, 8 + 5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensor_parallel_ranks_share_muons_work(trained, layout):
    _, ranks = trained(layout, "muon")
    num_steps, num_matrices = 6, 10  # shared ones, the experts counted one by one
    data = len(ranks) // int(layout.split("-")[1]) if layout.startswith("0") else 1  # without ZeRO each does the same
    counts = [rank["alone"] for rank in ranks]
    assert sum(counts) == num_steps * num_matrices * data
    assert min(counts) > 0
