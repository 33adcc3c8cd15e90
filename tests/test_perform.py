"""What an element of an array may do once its task was begun anew with other ranks. (The rest: tests/slurm.)"""

import json

import pytest

from pipeline.artifact import write_json
from pipeline.env import Share, StopRequest
from pipeline.errors import LaunchError
from pipeline.execute import begin
from pipeline.launch.lock import locked
from pipeline.launch.slurm import Slurm
from pipeline.perform import Replaced, perform
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
