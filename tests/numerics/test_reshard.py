"""Checkpoints go from any layout to any other in the same bits, and what goes wrong on one rank all ranks know."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import PROJECT

from pipeline.training.checkpoints.format import complete_checkpoints, read_index
from pipeline.training.checkpoints.reslice import Source
from pipeline.training.checkpoints.write import BLOCK_BYTES

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("reshard")]

HOPS = [  # ZeRO stage, tensor-parallel ranks, all ranks
    {"zero": 1, "tensor": 2, "world": 4},
    {"zero": 0, "tensor": 1, "world": 1},
    {"zero": 3, "tensor": 1, "world": 4},
    {"zero": 2, "tensor": 4, "world": 4},
    {"zero": 3, "tensor": 2, "world": 4},
    {"zero": 0, "tensor": 2, "world": 4},
    {"zero": 1, "tensor": 1, "world": 2},
    {"zero": 3, "tensor": 4, "world": 4},
    {"zero": 2, "tensor": 1, "world": 1},
]
SHORT = [HOPS[4], HOPS[2], HOPS[5], HOPS[0]]
OPTIMIZERS = ("ema", "muon", "adafactor", "schedule_free_adamw")
# AdamW's kernel rounds otherwise where a vector ends: 2^-24 of a number near one in each of three steps, and some room
TOLERANCE = 5e-7
EVERY = {"every_steps": 3, "keep": 9}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run phases of reshard_ranks.py; return what their ranks said, by phase and rank."""

    def start(phases, status=0):
        work = tmp_path_factory.mktemp("phases")
        (work / "phases.json").write_text(json.dumps(phases, default=str))
        script = Path(__file__).with_name("reshard_ranks.py")
        command = [sys.executable, str(script), str(work / "phases.json"), str(work / "out")]
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=1200)
        assert done.returncode == status, done.stdout + done.stderr
        rows = map(json.loads, (work / "out").read_text().splitlines())
        return {(row["phase"], row["rank"]): row for row in rows}

    return start


def tensors(checkpoint: Path):
    """Return every tensor of a checkpoint, whole."""
    index = read_index(checkpoint)
    source = Source(checkpoint, index)
    found = {(n, state): source.whole(n, state) for n, record in index.tensors.items() for state in record.squares}
    return found, index.scalars


def same(one: Path, other: Path) -> bool:
    (ours, scalars), (theirs, others) = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    assert scalars == others
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different, f"{one} and {other}: {different}"
    return True


def chain(root: Path, hops, **more):
    """Return phases that train on the first layout and carry its checkpoint over the others."""
    phases = [{"directory": root / "0", **hops[0], **more, "checkpoints": EVERY}]
    for number, hop in enumerate(hops[1:], 1):
        phases.append({"directory": root / str(number - 1), "then": root / str(number), **hop, **more})
    return phases


@pytest.fixture(scope="module")
def carried(run, tmp_path_factory):
    """Checkpoints of AdamW carried over all layouts, and continued on some of them."""
    root = tmp_path_factory.mktemp("carried")
    phases = chain(root, HOPS)
    phases.append({"directory": root / "whole", "until": 6, "checkpoints": EVERY})
    phases += [{"directory": root / str(n), **HOPS[n - 1], "until": 6, "checkpoints": EVERY} for n in (2, 4, 6)]
    return root, run(phases)


def test_a_checkpoint_goes_over_eight_layouts_in_the_same_bits(carried):
    root, said = carried
    for number in range(1, len(HOPS)):
        assert said[number, 0]["start"] == 3
        assert said[number, 0]["notes"] == {"seen": [3, 1 / 3]} or number > 1
        assert same(root / str(number) / "step-00000003", root / "0/step-00000003")
    found, scalars = tensors(root / "0/step-00000003")
    assert found["balance", "weights"].tolist() == [1.0, 1.0, 1.0]
    assert found["counts", "weights"].tolist() == [3, 3]
    assert torch.equal(found["frozen", "weights"].flatten(), torch.arange(24.0))
    assert set(scalars["step"].values.values()) == {3.0}
    assert found["experts.down", "exp_avg"].shape == (3, 5, 8)
    assert found["experts.down", "exp_avg"].abs().min() > 0


def test_each_number_is_written_once(carried):
    root, _ = carried
    for number, hop in enumerate(HOPS):
        index = read_index(root / str(number) / "step-00000003")
        sizes = {name: torch.Size(record.shape).numel() for name, record in index.tensors.items()}
        for name, record in index.tensors.items():
            assert sum(piece.stop - piece.start for piece in record.pieces) == sizes[name]
        total = sum(sizes[name] * len(record.squares) for name, record in index.tensors.items())
        files = {name: record.bytes for name, record in index.files.items() if name.endswith("safetensors")}
        assert len(files) == 2 * hop["world"]
        numbers = {name: size - BLOCK_BYTES for name, size in files.items()}  # without the header
        assert 4 * total <= sum(numbers.values()) < 4 * total + 100 * len(files)
        if hop["zero"] != 3:  # which rounds the pieces of small parameters up
            weights = [size for name, size in numbers.items() if name.startswith("weights")]
            assert max(weights) < 1.5 * min(weights)


def test_training_goes_on_on_another_layout(carried):
    root, said = carried
    wanted, scalars = tensors(root / "whole/step-00000006")
    for number in (2, 4, 6):
        found, others = tensors(root / str(number) / "step-00000006")
        assert scalars == others
        assert found.keys() == wanted.keys()
        for name, number in wanted.items():
            assert torch.allclose(found[name], number, rtol=TOLERANCE, atol=TOLERANCE), name
    assert "4 ranks, groups of 2 tensor-parallel ranks, ZeRO stage 1" in {row["ranks"] for row in said.values()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_state_of_every_optimizer_goes_along(run, tmp_path, optimizer):
    phases = chain(tmp_path, SHORT, optimizer=optimizer)
    phases.append({"directory": tmp_path / "0", **SHORT[0], "optimizer": optimizer, "until": 6, "checkpoints": EVERY})
    phases.append(
        {"directory": tmp_path / "straight", **SHORT[0], "optimizer": optimizer, "until": 6, "checkpoints": EVERY}
    )
    run(phases)
    for number in range(1, len(SHORT)):
        assert same(tmp_path / str(number) / "step-00000003", tmp_path / "0/step-00000003")
    assert same(tmp_path / "0/step-00000006", tmp_path / "straight/step-00000006")  # on one layout, whatever it is


@pytest.mark.parametrize("kind", ["fp64", "bf16"])
def test_other_precisions(run, tmp_path, kind):
    hops = [SHORT[0], SHORT[3], {"zero": 2, "tensor": 1, "world": 2}]
    if kind == "fp64":
        hops = [{"zero": 0, "tensor": 1, "world": 2}, {"zero": 0, "tensor": 4, "world": 4}]
    phases = chain(tmp_path, hops, kind=kind, optimizer="ema")
    for n, name in enumerate(("0", "straight")):
        phases.append({"directory": tmp_path / name, **hops[0], "kind": kind, "optimizer": "ema", "until": 6})
        phases[-1]["checkpoints"] = EVERY
        assert n < 2
    run(phases)
    for number in range(1, len(hops)):
        found, _ = tensors(tmp_path / "0/step-00000003")
        assert found["norm.weight", "weights"].dtype == (torch.float64 if kind == "fp64" else torch.float32)
        assert same(tmp_path / str(number) / "step-00000003", tmp_path / "0/step-00000003")
    assert same(tmp_path / "0/step-00000006", tmp_path / "straight/step-00000006")


@pytest.fixture(scope="module")
def two_steps(run, tmp_path_factory):
    """A directory with the checkpoints of steps 1 and 2, by two ranks."""
    directory = tmp_path_factory.mktemp("two") / "checkpoints"
    run([{"directory": directory, "zero": 1, "world": 2, "until": 2}])
    assert [path.name for path in complete_checkpoints(directory)] == ["step-00000002", "step-00000001"]
    return directory


def test_ranks_agree_on_what_is_damaged(run, two_steps, tmp_path):
    phases = []
    for rank in range(2):  # each of them reads one of these files
        directory = shutil.copytree(two_steps, tmp_path / str(rank))
        path = directory / f"step-00000002/optimizer-{rank:05d}-of-00002.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        phases.append({"directory": directory, "zero": 3, "world": 2, "until": 1})
    said = run(phases)
    for number in range(2):
        assert f"(optimizer-{number:05d}-of-00002.safetensors is not as it was written)" in said[number, 0]["log"][0]
        assert [said[number, rank]["start"] for rank in range(2)] == [1, 1]


def test_a_full_disk_fails_the_run_on_every_rank(run, two_steps, tmp_path):
    directory = shutil.copytree(two_steps, tmp_path / "checkpoints")
    said = run([{"directory": directory, "zero": 1, "world": 2, "until": 50, "full_on": 1}])
    for rank in range(2):
        assert said[0, rank]["class"] == "ArtifactError"
        assert "step-00000003.0.tmp: the disk is full, with" in said[0, rank]["error"]
    assert complete_checkpoints(directory)[0].name == "step-00000002"
    said = run([{"directory": directory, "zero": 1, "world": 2, "until": 3}])
    assert said[0, 0]["start"] == 2
    assert complete_checkpoints(directory)[0].name == "step-00000003"


def test_training_goes_on_while_a_slow_disk_writes(run, tmp_path):
    how = {"zero": 1, "world": 2, "checkpoints": {"every_steps": 4}, "sleep_on": 1}
    said = run([{"directory": tmp_path / "slow", **how, "until": 7}])
    assert complete_checkpoints(tmp_path / "slow")[0].name == "step-00000004"
    assert said[0, 1]["stall_before_finish_s"] < 0.5 < said[0, 1]["stall_s"] + said[0, 1]["stall_before_finish_s"]
    run([{"directory": tmp_path / "quick", "zero": 1, "world": 2, "until": 4}])
    # what was copied is the state after step 4, though steps 5 to 7 were done before it was written
    assert same(tmp_path / "slow/step-00000004", tmp_path / "quick/step-00000004")
