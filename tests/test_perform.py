"""What an element of an array may do once its task was begun anew with other ranks. (The rest: tests/slurm.)"""

import json
import os
import threading

import pytest

from pipeline import execute
from pipeline.artifact import write_json
from pipeline.env import Share, StopRequest
from pipeline.errors import ArtifactError, LaunchError, Lost
from pipeline.execute import begin, execute_frozen, refuse_running
from pipeline.jobs.record import read_record
from pipeline.launch import lock as locks
from pipeline.launch.lock import locked
from pipeline.launch.slurm import Slurm
from pipeline.launch.tries import begin_attempt
from pipeline.perform import Replaced, leave_result, perform, read_result, set_aside_result
from pipeline.plan import Command, plan
from pipeline.settings import decode, encode
from pipeline.worker import FrozenTask


@pytest.fixture
def task(tmp_path):
    """A data task of two ranks, frozen but not begun."""
    return decode(
        FrozenTask,
        {
            "name": "clean",
            "job": None,
            "stage": {"kind": "clean", "corpus": "corpus"},
            "inputs": {},
            "fingerprint": "0" * 16,
            "directory": str(tmp_path / "corpus/clean-0000000000000000"),
            "run": encode(Slurm(array=2).model_copy(update={"ranks": 2})),
            "tracker": {"kind": "jsonl"},
        },
    )


@pytest.fixture
def work(tmp_path):
    return tmp_path / "corpus/clean-0000000000000000/work"


def test_notes_of_another_number_of_ranks_are_not_published(task, work):
    assert begin(task)
    for rank in range(4):
        write_json(work / f"ranks/{rank:05d}.json", {})
    with pytest.raises(Replaced, match="was begun anew with 2 ranks, and this is one of 4; nothing more is written"):
        perform(task, Share(world=4, first=3, count=1), StopRequest())
    assert not (work.parent / "manifest.json").exists()
    assert not list(work.glob("result*"))


@pytest.mark.parametrize("lock", ["lock-00001", "lock-publish"])
def test_a_task_is_not_begun_anew_under_elements_that_work_at_it(task, work, lock):
    assert begin(task)
    write_json(work / "ranks/00000.json", {})
    fewer = task.model_copy(update={"run": task.run.model_copy(update={"ranks": 1})})
    with locked(work.parent, lock), pytest.raises(LaunchError, match="is working in it; wait for it or end it"):
        begin(fewer)
    assert (work / "ranks/00000.json").exists()
    assert json.loads((work / "task.json").read_text())["run"]["ranks"] == 2
    assert begin(fewer)
    assert not list((work / "ranks").iterdir())
    assert json.loads((work / "task.json").read_text())["run"]["ranks"] == 1


def test_a_task_that_gets_nowhere_has_failed_when_its_last_try_ends(task, work, monkeypatch):
    tries = iter(range(1, 9))

    def lose(*_):
        begin_attempt(work.parent)
        raise Lost(f"n{next(tries)} is gone")

    monkeypatch.setattr("pipeline.perform._try", lose)
    everything = Share(world=2, first=0, count=2)
    assert begin(task)
    for number in (1, 2):
        with pytest.raises(Lost, match=f"^n{number} is gone$"):
            perform(task, everything, StopRequest(), anew=False)
        assert read_result(work.parent)["problems"] == [f"n{number} is gone"]
    assert read_result(work.parent, name="previous")["problems"] == ["n1 is gone"]
    for _ in range(2):  # as somebody requeues it, another time
        with pytest.raises(
            LaunchError, match=r"begun 3 times without any progress; the last time: n3 is gone$"
        ) as caught:
            perform(task, everything, StopRequest(), anew=False)
        assert type(caught.value) is LaunchError


def test_how_a_try_ended_that_left_no_word_is_read_from_its_log(task, work):
    assert begin(task)
    assert begin_attempt(work.parent) == 1
    set_aside_result(work.parent, "")
    assert read_result(work.parent, name="previous")["problems"] == ["it ended without a word"]
    (work.parent / "logs").mkdir()
    (work.parent / "logs/job.log").write_text("--- try 1 ---\nsrun: error: Node failure on n2\n")
    set_aside_result(work.parent, "")
    assert read_result(work.parent, name="previous")["problems"] == ["node n2 failed"]
    leave_result(work.parent, "", LaunchError("x"))
    set_aside_result(work.parent, "")
    assert read_result(work.parent, name="previous")["problems"] == ["x"]
    assert read_result(work.parent) is None
    os.utime(work / "attempt", (5, 5))  # of a start before this one
    set_aside_result(work.parent, "")
    assert read_result(work.parent, name="previous") is None


def test_who_is_kept_out_leaves_no_result(task, work):
    assert begin(task)
    with locked(work.parent), pytest.raises(LaunchError, match="is working in it"):
        perform(task, Share(world=2, first=0, count=2), StopRequest())
    assert not list(work.glob("result*"))


def test_the_record_has_the_ranks_that_an_allocation_gives(tmp_path, monkeypatch):
    stage = {"kind": "shard", "sources": [{"path": "tests/data/mini.jsonl"}]}
    command = decode(Command, {"root": str(tmp_path), "stage": stage, "run": {"kind": "slurm"}})
    monkeypatch.setattr(execute, "allocated", lambda run, stage: run.model_copy(update={"ranks": 3}))
    monkeypatch.setattr(execute, "execute_frozen", lambda *_: None)
    execute.execute(plan(command, None), command, "night", lambda task: None)
    assert [one.ranks for one in read_record(tmp_path, "night").tasks] == [3]


def test_a_job_whose_task_somebody_works_at_is_refused_before_it_is_noted(task, work, tmp_path):
    assert begin(task)
    with locked(work.parent), pytest.raises(LaunchError, match="is working in it"):
        refuse_running(tmp_path, "new", [task])
    refuse_running(tmp_path, "new", [task])


def test_a_task_that_has_no_room_leaves_that_as_its_result(task, work, tmp_path, monkeypatch):
    monkeypatch.setattr(execute, "needed_bytes", lambda task: (10**18, True))
    with pytest.raises(
        ArtifactError, match=r"needs about 1,000,000,000,000\.000 MB in .*; make room or choose"
    ) as caught:
        execute_frozen(tmp_path, [task], None, StopRequest(), lambda *_: None)
    result = read_result(work.parent)
    assert result["status"] == 3
    assert result["problems"] == [str(caught.value)]
    assert (work / "result.json").stat().st_mtime >= (work / "task.json").stat().st_mtime  # so it is of this start


def test_an_element_waits_for_another_that_publishes_for_as_long_as_that_lives(task, work, monkeypatch):
    assert begin(task)
    for rank in range(2):
        write_json(work / f"ranks/{rank:05d}.json", {})
    holds, waits = threading.Event(), threading.Event()

    def publish_slowly() -> None:
        with locked(work.parent, "lock-publish"):
            holds.set()
            waits.wait(60)
            (work.parent / "manifest.json").touch()

    other = threading.Thread(target=publish_slowly)
    other.start()
    holds.wait(60)
    monkeypatch.setattr(locks, "time", Clock(waits))
    perform(task, Share(world=2, first=1, count=1), StopRequest())
    other.join()
    assert json.loads((work / "result-00001.json").read_text())["status"] == 0


class Clock:
    """Time that passes by hours; whoever waits is known."""

    def __init__(self, waits: threading.Event) -> None:
        self._now, self._waits = 0.0, waits

    def monotonic(self) -> float:
        self._now += 3600
        return self._now

    def sleep(self, _seconds: float) -> None:
        if self._now > 10 * 3600:
            self._waits.set()

    def time_ns(self) -> int:
        return 0

    time = monotonic
