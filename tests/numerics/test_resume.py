"""A run that is killed anywhere and started again ends in the same bits; two ranks learn the same as one."""

import json
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support import PROJECT, command, run_pipeline

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("resume")]

# fp32 sums of some thousand terms in another order: 1e-6 relative in one step, grown by 20 steps of training
LOSS_TOLERANCE = 1e-4


@pytest.fixture
def pretrain(tiny_tokens, tmp_path):
    """Arguments of a run of pretraining alone, on the tokens of the tiny job."""
    model = "{kind: decoder, d_model: 32, num_layers: 2, num_heads: 4, num_kv_heads: 2, max_seq_len: 64, dropout: 0.1}"

    def arguments(root: str, *more: object) -> list[object]:
        settings = {"tokens": tiny_tokens, "seq_len": 32, "batch_tokens": 512, "steps": 20, "validation_sequences": 8}
        return [
            "stage=pretrain",
            f"stage.model={model.replace(' ', '')}",
            f"root={tmp_path / root}",
            *(f"stage.{key}={value}" for key, value in settings.items()),
            *more,
        ]

    return arguments


def made(tmp_path, root: str):
    return next((tmp_path / root / "model").iterdir())


def losses(tmp_path, root: str) -> list[float]:
    rows = [json.loads(line) for line in (made(tmp_path, root) / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def weights(tmp_path, root: str) -> bytes:
    return (made(tmp_path, root) / "model.safetensors").read_bytes()


def start(arguments) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        command(*arguments), cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def wait_for_step(tmp_path, root: str, step: int) -> None:
    """Wait until a run has logged `step`."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for path in (tmp_path / root).glob("model/*/metrics.jsonl"):
            if len(path.read_text().splitlines()) >= step:
                return
        time.sleep(0.005)
    raise AssertionError(f"step {step} did not come")


def wait_for_checkpoint(tmp_path, root: str, step: int) -> None:
    """Wait until the checkpoint of a step, which is written while training goes on, is whole."""
    deadline = time.monotonic() + 120
    while not list((tmp_path / root).glob(f"model/*/checkpoints/step-{step:08d}")):
        assert time.monotonic() < deadline, f"the checkpoint of step {step} did not come"
        time.sleep(0.005)


def test_killed_runs_end_in_the_same_bits(pretrain, tmp_path):
    run_pipeline(*pretrain("whole", "run.checkpoints.every_steps=3"))
    chooser = random.Random(0)
    for kill_at, saved in ((2, None), (7, 6), (13, 12)):  # before the first checkpoint, and twice between two
        process = start(pretrain("killed", "run.checkpoints.every_steps=3"))
        wait_for_step(tmp_path, "killed", kill_at)
        if saved:
            wait_for_checkpoint(tmp_path, "killed", saved)
        time.sleep(chooser.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)  # the launcher; its rank dies with it
        process.wait()
    assert not (made(tmp_path, "killed") / "manifest.json").exists()
    done = run_pipeline(*pretrain("killed", "run.checkpoints.every_steps=3"))
    assert re.search(r"continues after step (12|15|18|20) of 20", done.stdout)
    assert weights(tmp_path, "killed") == weights(tmp_path, "whole")
    assert losses(tmp_path, "killed") == losses(tmp_path, "whole")


def test_a_rank_that_is_killed_is_named_and_the_run_continues(pretrain, tmp_path):
    process = subprocess.Popen(
        command(*pretrain("x", "run.ranks=2", "stage.steps=400")),
        cwd=PROJECT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    wait_for_step(tmp_path, "x", 3)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(children[1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 4
    assert "rank 1 was ended by SIGKILL; the same command continues" in errors
    assert not any(Path("/proc", child).exists() for child in children)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR2, 75)])
def test_asked_to_stop_it_saves_and_continues(pretrain, tmp_path, number, status):
    arguments = pretrain("x", "stage.steps=60")
    process = start(arguments)
    wait_for_step(tmp_path, "x", 3)
    os.kill(process.pid, number)
    assert process.wait(timeout=60) == status
    stopped = len(losses(tmp_path, "x"))
    assert 3 <= stopped < 60
    done = run_pipeline(*arguments)
    assert f"continues after step {stopped} of 60" in done.stdout
    assert len(losses(tmp_path, "x")) == 60


@pytest.mark.parametrize(
    "how",
    [
        ["run.parallel.zero=1"],
        ["run.parallel.zero=3"],
        ["run.microbatch_sequences=2"],
        ["run.parallel.tensor=2"],
        ["run.parallel.tensor=2", "run.parallel.sequence=true"],
    ],
)
def test_two_ranks_learn_what_one_learns(pretrain, tmp_path, how):
    quiet = "stage.model.dropout=0.0"  # dropout draws per rank
    run_pipeline(*pretrain("one", quiet))
    run_pipeline(*pretrain("two", quiet, "run.ranks=2", *how))
    assert len(losses(tmp_path, "one")) == 20
    assert losses(tmp_path, "two") == pytest.approx(losses(tmp_path, "one"), rel=LOSS_TOLERANCE)
    assert weights(tmp_path, "one") != weights(tmp_path, "two")  # it did run as two: sums in another order


def test_packing_and_warm_up_do_not_depend_on_ranks_and_microbatches(pretrain, tmp_path):
    what = ["stage.packing={kind:best_fit}", "stage.seq_len_warmup=[{tokens:3000,seq_len:8}]", "stage.steps=10"]
    what.append("stage.model.dropout=0.0")
    run_pipeline(*pretrain("one", *what))
    run_pipeline(*pretrain("two", *what, "run.ranks=2", "run.microbatch_sequences=4"))
    assert losses(tmp_path, "two") == pytest.approx(losses(tmp_path, "one"), rel=LOSS_TOLERANCE)
    run_pipeline(*pretrain("padded", "stage.packing={kind:padded}", *what[1:]))
    assert losses(tmp_path, "padded") != losses(tmp_path, "one")


def test_a_damaged_checkpoint_is_set_aside(pretrain, tmp_path):
    run_pipeline(*pretrain("whole"))
    process = start(pretrain("x", "run.checkpoints.every_steps=4", "run.checkpoints.keep=3"))
    wait_for_checkpoint(tmp_path, "x", 12)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    saved = sorted((made(tmp_path, "x") / "checkpoints").glob("step-*[0-9]"))
    state = max((path for path in saved[-1].rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    done = run_pipeline(*pretrain("x"))
    assert f"checkpoint {saved[-1].name} is damaged" in done.stdout
    assert f"continues after step {int(saved[-2].name[5:])} of 20" in done.stdout
    assert weights(tmp_path, "x") == weights(tmp_path, "whole")


@pytest.mark.parametrize(
    "layout",
    [
        ["run.ranks=2", "run.parallel.zero=3"],
        ["run.ranks=2", "run.parallel.tensor=2", "run.parallel.zero=0"],
        ["run.ranks=4", "run.parallel.tensor=2", "run.parallel.zero=2"],
    ],
)
def test_a_run_continues_on_another_layout(pretrain, tmp_path, layout):
    quiet = "stage.model.dropout=0.0"  # dropout draws per rank
    run_pipeline(*pretrain("whole", quiet))
    process = start(pretrain("x", quiet, "run.checkpoints.every_steps=4"))
    wait_for_checkpoint(tmp_path, "x", 4)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = run_pipeline(*pretrain("x", quiet, *layout))
    assert "continues after step " in done.stdout
    assert "then, " in done.stdout
    assert losses(tmp_path, "x") == pytest.approx(losses(tmp_path, "whole"), rel=LOSS_TOLERANCE)
    assert weights(tmp_path, "x") != weights(tmp_path, "whole")  # it did change: sums in another order


def test_two_runs_never_write_one_directory(pretrain, tmp_path):
    process = start(pretrain("x", "stage.steps=400"))
    wait_for_step(tmp_path, "x", 1)
    done = run_pipeline(*pretrain("x", "stage.steps=400"), status=4)
    assert f"process {process.pid} on " in done.stderr
    assert "is working in it" in done.stderr
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 75


def test_a_loss_that_is_not_finite_ends_the_run(pretrain, tmp_path):
    done = run_pipeline(*pretrain("x", "stage.optimizer={kind:adamw,lr:1e39}", "stage.clip_norm=null"), status=5)
    assert "the loss is nan; this after 5 such steps in a row" in done.stderr
    assert "a lower optimizer.lr or a clip_norm often helps" in done.stderr


def test_bf16_learns(pretrain, tmp_path):
    run_pipeline(
        *pretrain("x", "stage.precision=bf16", "stage.steps=12", "stage.optimizer.lr=1e-2", "run.parallel.zero=2")
    )
    assert losses(tmp_path, "x")[-1] < losses(tmp_path, "x")[0]


def test_a_model_that_diverges_in_its_last_step_is_not_published(pretrain, tmp_path):
    done = run_pipeline(
        *pretrain("x", "stage.steps=1", "stage.schedule={kind: cosine, warmup_fraction: 0}", "stage.optimizer.lr=1e38"),
        "stage.optimizer.weight_decay=1e10",
        status=5,
    )
    assert "the validation_loss of step 1 is nan" in done.stderr
    assert not (made(tmp_path, "x") / "manifest.json").exists()


def test_a_seed_may_be_a_date(pretrain, tmp_path):
    run_pipeline(*pretrain("x", "stage.steps=1", "stage.seed=20261122"))


def test_what_a_killed_save_left_is_cleared(pretrain, tmp_path):
    process = start(pretrain("x", "run.checkpoints.every_steps=2", "stage.steps=400"))
    wait_for_step(tmp_path, "x", 5)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    checkpoints = made(tmp_path, "x") / "checkpoints"
    (checkpoints / "step-00000001.tmp").mkdir()
    process = start(pretrain("x", "run.checkpoints.every_steps=2", "stage.steps=400"))
    wait_for_step(tmp_path, "x", 9)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    steps = sorted(int(path.name.removeprefix("step-")) for path in checkpoints.iterdir())  # nothing unfinished
    assert len([step for step in steps if step % 2 == 0]) == 2
    assert all(step == steps[-1] for step in steps if step % 2)  # where it was stopped
