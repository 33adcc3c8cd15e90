"""Saving and finding again, on one rank: what is kept, what is refused, and what is found after any mishap."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from saving import make, same, tensors, train
from support import PROJECT

from pipeline.errors import ArtifactError, PipelineError, TrainingError
from pipeline.training.checkpoints import background
from pipeline.training.checkpoints.format import complete_checkpoints, read_index


def names(directory):
    return sorted(path.name.removeprefix("step-").lstrip("0") for path in directory.iterdir())


@pytest.fixture
def two_steps(tmp_path):
    """A directory with the checkpoints of steps 1 and 2."""
    train(*make(tmp_path / "x", every_steps=1), 1, 2)
    return tmp_path / "x"


def test_it_goes_on_in_the_same_bits(tmp_path):
    train(*make(tmp_path / "straight", every_steps=3), 1, 6)
    train(*make(tmp_path / "x", every_steps=3), 1, 4)
    engine, saver = make(tmp_path / "x", seed=1, every_steps=3)
    found = saver.restore()
    assert (found.step, found.notes, str(found.ranks)) == (3, {"step": 3}, "1 rank, ZeRO stage 0")
    assert engine.module.counts.tolist() == [3, 3]
    train(engine, saver, 4, 6)
    assert same(tmp_path / "x/step-00000006", tmp_path / "straight/step-00000006")
    found, scalars = tensors(tmp_path / "x/step-00000006")
    assert found["weight", "exp_avg"].shape == (3, 5)
    assert scalars["step"].values == {"weight": 6.0, "bias": 6.0}
    assert (tmp_path / "x/step-00000006/tokenizer.json").read_text() == "[]"


def test_nothing_is_found_where_nothing_is(tmp_path):
    _, saver = make(tmp_path / "x")
    assert saver.restore() is None
    saver.finish()
    assert not saver.failed


def test_a_training_goes_back_to_its_own_checkpoint(tmp_path):
    train(*make(tmp_path / "straight", every_steps=2), 1, 6)
    engine, saver = make(tmp_path / "x", every_steps=2)
    train(engine, saver, 1, 4)
    engine.step(99)
    engine.optimizer.state[engine.module.weight]["of late"] = torch.ones(3, 5)
    assert saver.restore().step == 4
    assert "of late" not in engine.optimizer.state[engine.module.weight]
    train(engine, saver, 5, 6)
    assert same(tmp_path / "x/step-00000006", tmp_path / "straight/step-00000006")


def test_before_the_first_step_there_is_no_state(tmp_path):
    engine, saver = make(tmp_path / "x", every_steps=1)
    engine.step(1)
    fresh, other = make(tmp_path / "y", seed=5, every_steps=1)
    other.save(1, {})
    other.finish()
    engine, saver = make(tmp_path / "y", every_steps=1)
    engine.step(1)
    assert saver.restore().step == 1
    assert not any(engine.optimizer.state.values())
    assert torch.equal(engine.module.weight, fresh.module.weight)


@pytest.mark.parametrize("what", ["flipped", "cut", "gone"])
def test_damage_to_any_file_is_noticed(two_steps, tmp_path, what):
    files = sorted(path.name for path in (two_steps / "step-00000002").iterdir())
    assert len(files) == 5
    for name in files:
        directory = shutil.copytree(two_steps, tmp_path / name)
        path = directory / "step-00000002" / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data if what == "flipped" else data[:-1] if name != "checkpoint.json" else data[:-3])
        if what == "gone":
            path.unlink()
        log = []
        _, saver = make(directory, log=log.append)
        assert saver.restore().step == 1
        assert log[0].startswith("checkpoint step-00000002 is damaged (")
        assert name in log[0]
        assert log[0].endswith("it is now step-00000002.damaged, and not used")
        assert (directory / "step-00000002.damaged").is_dir()
        engine, saver = make(directory, every_steps=1)
        saver.restore()
        train(engine, saver, 2, 2)
        assert make(directory)[1].restore().step == 2


def test_an_old_checkpoint_that_is_damaged_does_not_stand_in_the_way(two_steps):
    (two_steps / "step-00000001/checkpoint.json").write_text("{")
    log = []
    _, saver = make(two_steps, log=log.append)
    assert saver.restore().step == 2
    assert "step-00000001 is damaged" in log[0]


def test_when_all_are_damaged_it_starts_anew(two_steps):
    for path in two_steps.glob("*/optimizer*"):
        path.write_bytes(b"")
    log = []
    _, saver = make(two_steps, log=log.append)
    assert saver.restore() is None
    assert len(log) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("world", "rank", "at_least"), [(1, 0, 35), (2, 0, 35), (2, 1, 12)])
def test_a_kill_at_each_call_to_the_disk(tmp_path, world, rank, at_least):
    script = Path(__file__).with_name("saver_kills.py")
    command = [sys.executable, str(script), str(tmp_path), str(world), str(rank)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) >= at_least
    found = [row["found"] for row in rows]
    if rank == 0:  # it publishes: from some call on the new one is found
        assert found == sorted(found)
    else:  # rank 0 may publish, before it is killed too, what was handed in, and nothing else
        handed_in = [row["handed_in"] for row in rows]
        assert handed_in == sorted(handed_in)
        assert all(row["handed_in"] for row in rows if row["found"] == 3)
    assert set(found) == {2, 3}
    for row in rows:
        assert row["same"]
        assert row["notes"] == {"step": row["found"]}
        assert not row["log"]  # nothing was damaged
        kept = {f"step-{row['found']:08d}", "step-00000002"}
        assert set(row["left"]) <= kept  # and nothing unfinished stays
    assert rows[-1]["left"] == ["step-00000003"]


def test_a_full_disk_fails_the_run(two_steps, monkeypatch):
    engine, saver = make(two_steps, every_steps=1)
    saver.restore()

    def full(descriptor, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    train(engine, saver, 3, 3)
    assert saver.failed
    for call in (saver.raise_failure, saver.finish):
        with pytest.raises(ArtifactError, match=r"step-00000003.0.tmp: the disk is full, with .* MB free; make room"):
            call()
    train(engine, saver, 4, 4)  # begins no other
    monkeypatch.undo()
    assert names(two_steps) == ["1", "2", "3.0.tmp"]
    assert make(two_steps)[1].restore().step == 2
    assert names(two_steps) == ["1", "2"]


def test_what_goes_wrong_on_another_rank_is_said_on_every_rank(tmp_path):
    (whole, first), (poisoned, second) = (make(tmp_path, rank, 2, every_steps=1) for rank in range(2))
    whole.step(1)
    poisoned.step(1)
    poisoned.optimizer.state[poisoned.module.weight]["exp_avg"].fill_(float("nan"))
    first.save(1, {})
    second.save(1, {})
    assert second._writing.wait(20)
    assert first._writing.wait(20)  # which has heard of it
    for saver in (first, second):
        with pytest.raises(TrainingError, match="'exp_avg' of 'weight' has numbers that are not finite"):
            saver.raise_failure()
    assert not complete_checkpoints(tmp_path)


def test_it_waits_for_every_rank_and_no_longer(tmp_path):
    engines = [make(tmp_path, rank, 2, every_steps=1) for rank in range(2)]
    for engine, _ in engines:
        engine.step(1)
    (_, first), (_, second) = engines
    first.save(1, {})
    assert not first._writing.wait(0.2)
    second.save(1, {})
    first.finish()
    second.finish()
    index = read_index(tmp_path / "step-00000001")
    assert {piece.rank for piece in index.tensors["weight"].pieces} == {0, 1}  # each wrote a half
    assert names(tmp_path / "step-00000001")[0] == "checkpoint.json"
    assert not list(tmp_path.glob("*/rank*"))


def test_somebody_who_clears_it_away_is_noticed(tmp_path):
    engine, saver = make(tmp_path, world=2, every_steps=1)
    engine.step(1)
    saver.save(1, {})
    note = tmp_path / "step-00000001.0.tmp/rank-00000.json"
    while not note.exists():
        time.sleep(0.001)
    shutil.rmtree(note.parent)
    with pytest.raises(ArtifactError, match="was removed while it was written; is another run at work"):
        saver.finish()


def test_an_attempt_that_was_replaced_adds_and_removes_nothing(two_steps):
    def fence():
        raise PipelineError("another attempt has taken over")

    engine, saver = make(two_steps, every_steps=1, keep=1, attempt="7", fence=fence)
    saver.restore()
    train(engine, saver, 3, 3)
    with pytest.raises(PipelineError, match="another attempt has taken over"):
        saver.finish()
    assert names(two_steps) == ["1", "2", "3.7.tmp"]


def test_one_that_is_replaced_after_its_checkpoint_removes_nothing(two_steps):
    calls = []

    def fence():
        calls.append(1)
        if len(calls) > 1:
            raise PipelineError("another attempt has taken over")

    engine, saver = make(two_steps, every_steps=1, keep=1, fence=fence)
    saver.restore()
    train(engine, saver, 3, 3)
    assert saver.failed
    assert names(two_steps) == ["1", "2", "3"]


def test_attempts_do_not_write_into_one_another(tmp_path):
    """A zombie that wakes up and saves the same step has a directory of its own, and completes nothing twice."""
    engine, zombie = make(tmp_path, every_steps=1, attempt="1")
    train(*make(tmp_path, every_steps=1, attempt="2"), 1, 1)
    stamp = (tmp_path / "step-00000001/checkpoint.json").stat().st_mtime_ns
    train(engine, zombie, 1, 1)
    zombie.finish()
    assert names(tmp_path) == ["1"]
    assert (tmp_path / "step-00000001/checkpoint.json").stat().st_mtime_ns == stamp


def test_what_is_not_finite_is_never_saved(two_steps):
    engine, saver = make(two_steps, every_steps=1)
    saver.restore()
    engine.optimizer.state[engine.module.bias]["exp_avg"][1] = float("nan")
    train(engine, saver, 3, 3)
    with pytest.raises(TrainingError, match="'weights' of 'bias'|'bias' has numbers that are not finite"):
        saver.finish()
    assert make(two_steps)[1].restore().step == 2


def test_training_waits_for_the_copy_and_not_for_the_disk(tmp_path, monkeypatch):
    copying, writing = threading.Event(), threading.Event()
    take, write_part = background.Snapshot.take, background.write_part

    def slow_take(self, holdings):
        copying.wait(10)
        take(self, holdings)

    def slow_write(*arguments):
        writing.wait(10)
        return write_part(*arguments)

    monkeypatch.setattr(background.Snapshot, "take", slow_take)
    monkeypatch.setattr(background, "write_part", slow_write)
    engine, saver = make(tmp_path / "x", every_steps=1)
    engine.step(1)
    wanted = engine.module.weight.detach().clone()
    began = time.monotonic()
    saver.save(1, {})
    assert time.monotonic() - began < 0.2
    assert saver.stall_s < 0.2
    engine.module.counts.fill_(7)  # as a forward pass may
    threading.Timer(0.3, copying.set).start()
    saver.before_update()
    assert 0.2 < saver.stall_s < 2
    assert saver.stall_s == 0  # asked for
    engine.step(2)
    saver.before_update()  # nothing more to wait for
    assert saver.stall_s < 0.2
    assert not complete_checkpoints(tmp_path / "x")
    threading.Timer(0.3, writing.set).start()
    saver.save(2, {})  # waits for the one before
    assert saver.stall_s > 0.2
    saver.finish()
    assert [path.name for path in complete_checkpoints(tmp_path / "x")] == ["step-00000002", "step-00000001"]
    found, _ = tensors(tmp_path / "x/step-00000001")
    assert torch.equal(found["weight", "weights"], wanted)
    assert found["counts", "weights"].tolist() == [1, 1]  # as they were


def test_a_beat_is_given_while_it_waits(tmp_path, monkeypatch):
    beats, write_part = [], background.write_part
    monkeypatch.setattr("pipeline.training.checkpoints.saver.WAIT_S", 0.02)
    monkeypatch.setattr(background, "write_part", lambda *a: (time.sleep(0.3), write_part(*a))[1])
    engine, saver = make(tmp_path, every_steps=1, beat=lambda: beats.append(1))
    engine.step(1)
    saver.save(1, {})
    saver.finish()
    assert len(beats) > 3


def test_when_one_is_due(tmp_path):
    _, saver = make(tmp_path, every_steps=10)
    assert [step for step in range(1, 31) if saver.due(step, 1e9)] == [10, 20, 30]
    engine, saver = make(tmp_path, every_steps=10, every_minutes=2)
    now = time.monotonic()
    assert not saver.due(1, now + 119)
    assert saver.due(1, now + 121)
    assert saver.due(10, now)
    engine.step(3)
    saver.save(3, {})
    assert not saver.due(4, time.monotonic() + 119)
    saver.finish()
    _, other = make(tmp_path, rank=1, world=2, every_steps=10, every_minutes=2)
    assert not other.due(4, now + 1e6)  # the clock of rank 0 counts, whose answer did not come


def test_temporary_ones_go_when_the_next_is_there(tmp_path):
    engine, saver = make(tmp_path, steps=12, every_steps=5, keep=1)
    seen = []
    for step in (2, 5, 7, 8, 10, 12):  # 12 is the last
        engine.step(step)
        saver.save(step, {})
        saver.finish()
        seen.append(" ".join(names(tmp_path)))
    assert seen == ["2", "5", "5 7", "5 8", "10", "12"]
    assert read_index(tmp_path / "step-00000012").temporary is False


def test_the_rules_hold_over_a_restart(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.0, 5: 2.0, 6: 2.0}
    how = {"every_steps": 1, "keep": 1, "keep_best": True, "keep_every_steps": 4}
    train(*make(tmp_path, **how), 1, 3, losses.get)
    assert names(tmp_path) == ["2", "3"]
    engine, saver = make(tmp_path, **how)
    assert saver.restore().step == 3
    assert saver.newest == 3
    saver.save(3, {})  # is there
    assert saver._writing is None
    train(engine, saver, 4, 6, losses.get)
    assert names(tmp_path) == ["2", "4", "6"]


def test_of_another_model_it_is_refused(two_steps):
    _, saver = make(two_steps, width=4)
    with pytest.raises(TrainingError, match="of another model: 'bias' has 3 numbers, the model wants 4 numbers"):
        saver.restore()


def test_what_was_read_is_compared_with_what_was_saved(two_steps, monkeypatch):
    """Were a slice read twice or not at all, its sum of squares would say so."""
    from pipeline.training.checkpoints.reslice import Source

    fill = Source.fill

    def shifted(self, name, state, target, bounds, *more):
        fill(self, name, state, target, bounds, *more)
        if (name, state) == ("weight", "exp_avg"):
            target[0] = target[1]

    monkeypatch.setattr(Source, "fill", shifted)
    with pytest.raises(TrainingError, match=r"'exp_avg' of 'weight' has the sum of squares .* after it was read"):
        make(two_steps)[1].restore()


def test_room_for_all_of_them_is_looked_for(tmp_path, monkeypatch):
    _, saver = make(tmp_path / "x", steps=100, every_steps=10, keep=3)
    saver.restore()
    saver.check_space(1000, 2)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=40_000))
    with pytest.raises(
        ArtifactError,
        match=r"4 checkpoints of 0.012 MB are there at once, for which 0.008 MB more .* keep fewer with run.check",
    ):
        saver.check_space(1000, 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=48_000))
    saver.check_space(1000, 2)


def test_memory_is_used_again(tmp_path):
    engine, saver = make(tmp_path, every_steps=1)
    train(engine, saver, 1, 1)
    places = saver._snapshot._memory.data_ptr()
    train(engine, saver, 2, 3)
    assert saver._snapshot._memory.data_ptr() == places


def test_a_checkpoint_under_the_name_of_another_step_is_damaged(two_steps):
    (two_steps / "step-00000002").rename(two_steps / "step-00000009")
    _, saver = make(two_steps)
    assert saver.restore().step == 1
    assert (two_steps / "step-00000009.damaged").is_dir()


def test_what_else_lies_there_is_no_checkpoint(two_steps):
    (two_steps / "step-00000300.9.tmp").touch()
    (two_steps / "step-\u00b2").mkdir()
    (two_steps / "step-\u0663\u0663\u0663").mkdir()
    (two_steps / "step-00000002.damaged").touch()
    shutil.rmtree(two_steps / "step-00000002")
    (two_steps / "step-00000002").mkdir()
    _, saver = make(two_steps)
    assert saver.restore().step == 1
    assert not (two_steps / "step-00000300.9.tmp").exists()


def test_the_state_of_another_optimizer_is_refused(tmp_path):
    train(*make(tmp_path / "x", every_steps=1, about={"optimizer": "adamw"}), 1, 1)
    _, saver = make(tmp_path / "x", about={"optimizer": "lion"})
    with pytest.raises(TrainingError, match="wanted the state of 'lion', found that of 'adamw'; move it away"):
        saver.restore()


def test_a_checkpoint_that_somebody_removed_does_not_end_the_training(tmp_path):
    engine, saver = make(tmp_path / "x", every_steps=1, keep=1)
    train(engine, saver, 1, 1)
    shutil.rmtree(tmp_path / "x/step-00000001")
    train(engine, saver, 2, 2)
    saver.finish()
    assert names(tmp_path / "x") == ["2"]
