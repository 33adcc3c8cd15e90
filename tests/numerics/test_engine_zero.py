"""The engine learns under every ZeRO stage and with shared layers what plain torch learns, and leaves out bad steps."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import PROJECT

LAYOUTS = ("1-1", "2-1", "2-2", "4-2")
CASES = ("0-float64", "0-float64-unclipped", "0-fp32", "1-fp32-unclipped", *(f"{zero}-fp32" for zero in (1, 2, 3)))
OFFLOADED = tuple(f"{zero}-fp32-offload" for zero in (1, 2, 3))
STEPS, SKIPPED = 6, (3, 5)  # as in engine_ranks.py

# Sums in another order, in numbers near one: some 1e-16 or 1e-7 a step; AdamW divides by what may be small
TOLERANCES = {"float64": 1e-12, "fp32": 2e-6}
# Shares that losses and norms may be off: some roundings to 2^-9 (bf16), 2^-12 (fp16) or 2^-4 (fp8) of a number's size
SHARES = {"bf16": 0.01, "fp16": 0.005, "fp8": 0.1}

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("engine_zero")]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    directory = tmp_path_factory.mktemp("engine")
    script = Path(__file__).with_name("engine_ranks.py")
    arguments = [sys.executable, str(script), str(directory), "0-0", *LAYOUTS]
    done = subprocess.run(arguments, cwd=PROJECT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return {layout: torch.load(directory / f"{layout}.pt") for layout in ("0-0", *LAYOUTS)}


def finite(numbers):
    return [number for step, number in enumerate(numbers, 1) if step != 5]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [*CASES, *OFFLOADED])
def test_it_learns_what_plain_torch_learns(found, layout, case):
    alone, engine = found["0-0"][case], found[layout][case]
    tolerance = TOLERANCES[case.split("-")[1]]
    assert finite(engine["losses"]) == pytest.approx(finite(alone["losses"]), abs=tolerance)
    assert finite(engine["norms"]) == pytest.approx(finite(alone["norms"]), abs=tolerance)
    assert engine["weights"].keys() == alone["weights"].keys()
    for name, weight in alone["weights"].items():
        assert engine["weights"][name].shape == weight.shape
        assert (engine["weights"][name] - weight).abs().max() < tolerance, name


def test_clipping_made_a_difference(found):
    clipped, free = found["0-0"]["0-float64"], found["0-0"]["0-float64-unclipped"]
    assert min(clipped["norms"]) > 0.2
    assert (clipped["weights"]["up.weight"] - free["weights"]["up.weight"]).abs().max() > 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_refused_step_and_one_that_is_not_finite_change_nothing(found, layout):
    for case, engine in found[layout].items():
        assert engine["updated"] == [step not in SKIPPED for step in range(1, STEPS + 1)], case
        assert engine["norms"][4] == math.inf, case
        assert all(math.isfinite(norm) for norm in finite(engine["norms"])), case  # that of the refused one too


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", SHARES)
@pytest.mark.parametrize("zero", ["1", "2", "3", "3 offloaded"])
def test_few_bits_keep_to_fp32(found, layout, precision, zero):
    case = f"{zero[0]}-{precision}" + ("-offload" if "offloaded" in zero else "")
    alone, engine = found["0-0"][case], found[layout][case]
    assert finite(engine["losses"]) == pytest.approx(finite(alone["losses"]), rel=SHARES[precision])
    assert finite(engine["norms"]) == pytest.approx(finite(alone["norms"]), rel=SHARES[precision])
    assert engine["losses"] != alone["losses"]
    assert all(weight.dtype == torch.float32 for weight in engine["weights"].values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp8_is_not_bf16(found, layout):
    assert found[layout]["1-fp8"]["losses"][0] != found[layout]["1-bf16"]["losses"][0]
