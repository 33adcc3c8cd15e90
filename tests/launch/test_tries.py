"""Tries at a task: numbered, and counted as long as they get nowhere."""

import json
import os
import time

import pytest

from pipeline.errors import ArtifactError
from pipeline.launch.tries import begin_attempt, first_began, forget_tries, idle_tries, note_try


@pytest.fixture(autouse=True)
def work(tmp_path):
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def test_tries_are_numbered_and_a_damaged_number_is_said(tmp_path, work):
    assert [begin_attempt(tmp_path) for _ in range(3)] == [1, 2, 3]
    assert begin_attempt(tmp_path, "attempt-00003") == 1
    (work / "attempt").write_text("x")
    with pytest.raises(ArtifactError, match=r"attempt: damaged \(invalid literal"):
        begin_attempt(tmp_path)


def test_tries_without_progress_are_counted(tmp_path, work):
    def begin(times, own=""):
        """How many tries before each have begun with as much done."""
        counts = []
        for _ in range(times):
            counts.append(idle_tries(tmp_path, own))
            note_try(tmp_path, own)
        return counts

    assert begin(3) == [0, 1, 2]
    (tmp_path / "checkpoints/step-00000005").mkdir(parents=True)
    assert begin(2) == [0, 1]
    (tmp_path / "checkpoints/step-00000010").mkdir()
    assert begin(1) == [0]
    assert begin(1, "-00003") == [0]  # each element of an array for itself
    (work / "units").mkdir()
    (work / "units/a.json").touch()
    assert begin(2) == [0, 1]
    (work / "partial").mkdir()
    (work / "partial/0.arrow").write_bytes(b"12")  # which is cut to what the last note inside of the unit says
    assert begin(1) == [2]
    for seconds in (100, 200):
        (work / "partial/0.arrow.json").touch()
        os.utime(work / "partial/0.arrow.json", (seconds, seconds))
        assert begin(2) == [0, 1]
    with (work / "tries.jsonl").open("a") as stream:
        stream.write('5\n[1]\n{"when": ""}\n{"do')
    assert begin(1) == [0]
    forget_tries(tmp_path)
    assert not list(work.glob("tries*"))
    assert begin(1) == [0]


def test_a_task_takes_as_long_as_all_of_its_tries_together(tmp_path, work):
    before = time.time()
    assert before <= first_began(tmp_path) <= time.time()  # nothing is noted
    for own, times in {"-00000": (300.0, 500.0), "-00001": (200.0, 900.0)}.items():
        rows = "".join(json.dumps({"done": [], "time": when}) + "\n" for when in times)
        (work / f"tries{own}.jsonl").write_text(rows)
    (work / "tries-00002.jsonl").write_text('{"time": "x"}\n')
    assert first_began(tmp_path) == 200.0
    forget_tries(tmp_path)
    assert first_began(tmp_path) >= before
