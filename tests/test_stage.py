import json
import shutil

import pytest

from pipeline.env import Ranks
from pipeline.errors import Preempted
from pipeline.launch.local import Local
from pipeline.progress import Progress, clock
from pipeline.stage import Context, read_outputs


def context(directory, rank=0, world=1, **more):
    for name in ("units", "ranks"):
        (directory / "work" / name).mkdir(parents=True, exist_ok=True)
    return Context("task", directory, {}, Local(), Ranks(rank, world, rank), **more)


def work(ctx, names):
    done = []
    for unit in ctx.units(names, "units"):
        with unit.write(f"{unit.name}.txt") as path:
            path.write_text(unit.name)
        unit.stats["documents"] += 2
        done.append(unit.name)
    return done


def test_every_unit_is_done_by_exactly_one_rank(tmp_path):
    names = list("abcdefg")
    done = [work(context(tmp_path, rank, 3), names) for rank in range(3)]
    assert done == [["a", "d", "g"], ["b", "e"], ["c", "f"]]
    files, stats = read_outputs(tmp_path)
    assert sorted(files) == [f"{name}.txt" for name in names]
    assert stats == {"documents": 14}


def test_finished_units_are_skipped_after_a_restart(tmp_path):
    ctx = context(tmp_path)
    with pytest.raises(RuntimeError):
        for unit in ctx.units(["a", "b", "c"], "units"):
            if unit.name == "b":
                raise RuntimeError("killed")
    assert work(context(tmp_path), ["a", "b", "c"]) == ["b", "c"]


def test_a_stop_is_heard_between_two_units(tmp_path):
    answers = iter([False, True])
    with pytest.raises(Preempted, match="task between two units; the finished ones stay"):
        work(context(tmp_path, should_stop=lambda: next(answers)), ["a", "b", "c"])
    assert work(context(tmp_path), ["a", "b", "c"]) == ["b", "c"]


def test_numbers_are_summed_and_zero_is_kept(tmp_path):
    ctx = context(tmp_path)
    ctx.output.stats |= {"end_of_text_id": 0, "dtype": "uint16", "loss": 0.5}
    ctx.output.save(tmp_path / "work/ranks/00000.json")
    assert read_outputs(tmp_path)[1] == {"end_of_text_id": 0, "dtype": "uint16", "loss": 0.5}


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (65, "1:05"), (7384, "2:03:04")])
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_progress_says_how_far_how_fast_and_how_long(capsys, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.delenv("PIPELINE_TERMINAL_WIDTH", raising=False)
    progress = Progress("task", 100, "steps", start=20, show=True)
    for _ in range(40):
        now[0] += 0.5
        progress.advance(1, "loss 1.0")
    # a line every 15 s: at 30 more steps, 2 a second
    assert capsys.readouterr().out == "task  50/100 steps  50 %  2.0/s  0:25 left  loss 1.0\n"


def test_progress_is_noted_for_others_now_and_then_and_at_the_end(tmp_path, monkeypatch):
    now, path = [1000.0], tmp_path / "work/progress/00000.json"
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    progress = Progress("task", 100, "steps", start=20, show=False, note=path)
    noted = []
    for _ in range(11):
        note = json.loads(path.read_text())
        noted.append((note["done"], note["left_s"]))
        now[0] += 1
        progress.advance(2)
    assert noted == [(20, None)] * 5 + [(30, 35.0)] * 5 + [(40, 30.0)]
    progress.close()
    assert json.loads(path.read_text())["done"] == 42
    shutil.rmtree(path.parent)
    path.parent.touch()  # where there is no place for notes, the work goes on
    now[0] += 10
    progress.advance(2)


def test_each_rank_notes_how_far_its_units_are_and_the_first_for_all_what_they_do_together(tmp_path):
    for rank in range(3):
        ctx = context(tmp_path, rank, 3)
        work(ctx, list("abcdefg"))
        ctx.progress(10, "steps").close()
    notes = [json.loads(path.read_text()) for path in sorted((tmp_path / "work/progress").glob("*"))]
    assert [(note["done"], note["total"], note["noun"]) for note in notes] == [(0, 10, "steps"), *[(2, 2, "units")] * 2]


def test_progress_is_redrawn_within_the_width_of_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("PIPELINE_TERMINAL_WIDTH", "40")
    progress = Progress("task", 10, "steps", start=0, show=True)
    progress.advance(1, "x" * 100)
    progress.close()
    out = capsys.readouterr().out
    assert out.startswith("\r\x1b[2Ktask  1/10 steps")
    assert len(out.split("\x1b[2K")[1].rstrip("\r")) == 39
    assert out.endswith("\r\x1b[2K")


def test_only_rank_0_shows_progress(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PIPELINE_TERMINAL_WIDTH", "80")
    work(context(tmp_path, rank=1, world=2), ["a", "b"])
    assert capsys.readouterr().out == ""
