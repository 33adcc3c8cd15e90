"""What an element of an array may do once its task was begun anew with other ranks. (The rest: tests/slurm.)"""

import json
import threading

import pytest

from pipeline import execute
from pipeline.artifact import write_json
from pipeline.env import Share, StopRequest
from pipeline.errors import ArtifactError, LaunchError
from pipeline.execute import begin, execute_frozen
from pipeline.launch import lock as locks
from pipeline.launch.lock import locked
from pipeline.launch.slurm import Slurm
from pipeline.perform import Replaced, perform, read_result
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
