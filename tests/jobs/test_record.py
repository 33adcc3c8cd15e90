"""The record of a job, read in another root than it was written in: one that was moved or copied."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline.errors import ArtifactError
from pipeline.jobs.record import JobRecord, _moved, mark_cancelled, read_frozen, read_record, write_record
from pipeline.settings import decode
from pipeline.worker import FrozenTask

FROZEN = {
    "name": "a",
    "job": "night",
    "stage": {"kind": "clean", "corpus": "corpus"},
    "inputs": {},
    "fingerprint": "0",
    "directory": "/old/root/corpus/a-0",
    "run": {"kind": "local"},
    "tracker": {"kind": "jsonl"},
}
TASK = {"name": "a", "kind": "clean", "directory": "/old/root/corpus/a-0", "fingerprint": "0", "needs": [], "ranks": 1}
RECORD = {"name": "night", "launcher": "slurm", "command": [], "directory": "/old", "commit": None, "submitted": ""}


def test_a_record_names_places_of_the_root_that_it_is_read_in(tmp_path):
    (tmp_path / "jobs/night").mkdir(parents=True)
    text = json.dumps({**RECORD, "code": "/old/root/code/0a1b", "tasks": [TASK]})
    (tmp_path / "jobs/night/job.json").write_text(text)
    found = read_record(tmp_path, "night")
    assert found.tasks[0].directory == str(tmp_path / "corpus/a-0")
    assert found.code == str(tmp_path / "code/0a1b")
    assert found.directory == "/old"  # in which it was said


def test_what_runs_for_a_root_is_not_that_of_its_copy(tmp_path):
    place = tmp_path / "first/jobs/night/job.json"
    place.parent.mkdir(parents=True)
    task = {**TASK, "directory": str(tmp_path / "first/corpus/a-0"), "slurm": "7", "preflight": "6"}
    place.write_text(json.dumps({**RECORD, "host": "n1", "pid": 5, "tasks": [task]}))
    (tmp_path / "same").symlink_to("first")
    shutil.copytree(tmp_path / "first", tmp_path / "copy")

    def found(name):
        record = read_record(tmp_path / name, "night")
        return record.pid, record.tasks[0].slurm, record.tasks[0].preflight

    assert found("first") == found("same") == (5, "7", "6")
    assert found("copy") == (None, None, None)
    shutil.rmtree(tmp_path / "first")
    assert found("copy") == (5, "7", "6")  # it was moved


def test_what_cancel_ended_is_noted_in_the_record_until_it_is_submitted_anew(tmp_path):
    tasks = [{**TASK, "slurm": "7"}, {**TASK, "name": "b", "slurm": "8"}]
    record = decode(JobRecord, {**RECORD, "submitted": "2026-01-01T00:00:00+00:00", "tasks": tasks})
    write_record(tmp_path, record, [])
    mark_cancelled(tmp_path, "night", ["b"])
    first, second = read_record(tmp_path, "night").tasks
    assert (first.slurm, first.cancelled, second.slurm) == ("7", None, "8")
    assert second.cancelled is not None
    assert second.cancelled > record.submitted


def test_tasks_of_another_start_are_not_taken_for_those_of_the_record(tmp_path):
    """As after a kill between the two files."""
    record, frozen = decode(JobRecord, {**RECORD, "tasks": [TASK]}), decode(FrozenTask, FROZEN)
    write_record(tmp_path, record, [frozen])
    assert [task.fingerprint for task in read_frozen(tmp_path, record)] == ["0"]
    write_record(tmp_path, record, [frozen.model_copy(update={"fingerprint": "1"})])
    with pytest.raises(ArtifactError, match=r"tasks\.json: is of another start of the job than job\.json beside it"):
        read_frozen(tmp_path, record)


@pytest.mark.parametrize("root", ["root", "../old/root", "/old/root"])  # as it was said in /old
def test_a_frozen_task_goes_with_its_root_and_leaves_what_is_elsewhere(root):
    inputs = {"corpus": f"{root}/corpus/b-1", "data": "texts", "model": "/else/model/c-2", "theirs": "https://a/b"}
    task = FrozenTask.model_construct(directory=f"{root}/model/a-0", inputs=inputs)
    assert _moved(task, Path("/old"), Path("/old/root")) is task
    moved = _moved(task, Path("/old"), Path("/new"))
    assert moved.directory == "/new/model/a-0"
    assert moved.inputs == {**inputs, "corpus": "/new/corpus/b-1"}
