"""How a rank ends that cannot go on."""

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline import worker
from pipeline.env import StopRequest
from pipeline.errors import TrainingError
from pipeline.worker import is_out_of_memory

PETABYTES = 10**15  # more than any machine has


def torch_error() -> Exception:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(PETABYTES)
    return caught.value


def python_error() -> Exception:
    with pytest.raises(MemoryError) as caught:
        bytearray(PETABYTES)
    return caught.value


def test_what_says_that_memory_has_run_out_is_known():
    assert is_out_of_memory(torch_error())
    assert is_out_of_memory(python_error())
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(OSError(errno.EACCES, "Permission denied"))


@pytest.mark.parametrize("make", [torch_error, python_error])
def test_a_rank_whose_memory_runs_out_says_so_in_one_line(monkeypatch, tmp_path, make):
    run = {"kind": "slurm", "memory_per_node": "64G"}
    (tmp_path / "work").mkdir()
    (tmp_path / "work/task.json").write_text(json.dumps({"run": run, "memory_bytes": 48 * 10**9}))
    monkeypatch.setattr(sys, "argv", ["rank.py", str(tmp_path / "work/task.json")])
    monkeypatch.setattr(worker, "read_task", lambda path: None)
    monkeypatch.setattr(worker, "work", lambda task, stop: (_ for _ in ()).throw(make()))
    with pytest.raises(SystemExit) as end:
        worker.main(StopRequest())
    assert end.value.code == TrainingError.exit_status
    left = json.loads((tmp_path / "work/failure-00000.json").read_text())
    assert left["class"] == "TrainingError"
    (line,) = left["problems"]
    assert "\n" not in line
    assert "rank 0 on " in line
    assert (
        "ran out of memory: the job asked for memory_per_node=64G; the model's states alone need about 48.0 GB a rank, "
        "activations come on top; raise run.memory_per_node, or spread the model"
    ) in line


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """The package, copied into a checkout with one commit; `git` runs there."""
    package = tmp_path / "lib/pipeline"
    package.mkdir(parents=True)
    shutil.copy(worker.__file__, package)
    monkeypatch.setattr(worker, "__file__", str(package / "worker.py"))
    worker.commit.cache_clear()

    def git(*words):
        name = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(["git", *name, *words], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message=a")
    yield git
    worker.commit.cache_clear()


def test_the_commit_of_another_project_in_whose_checkout_the_code_lies_is_not_its_own(installed):
    assert worker.commit() is None


def test_the_commit_is_that_of_the_code(installed):
    installed("add", "--all")
    installed("commit", "--quiet", "--message=b")
    assert worker.commit() == installed("rev-parse", "--short=12", "HEAD")
    worker.commit.cache_clear()
    Path(worker.__file__).write_text("edited")
    assert worker.commit() == installed("rev-parse", "--short=12", "HEAD") + "+"
