"""Data tasks as arrays of SLURM jobs: one element fails, and once it is mended only what it lacks is made."""

import shutil
import sys
from pathlib import Path

import pytest
from submitted import Submitted, manifest
from support import MODEL_TASKS

DATA_ONLY = tuple(f"~tasks.{task}" for task in (*MODEL_TASKS, "report", "train_tokenizer", "tokenize"))
PARTS = tuple(f"part-00000-0000{number}.arrow" for number in range(3))


@pytest.fixture
def sharded(cluster, tiny_tokens, tmp_path):
    """A job of which the text is sharded already, in three parts."""
    root = tmp_path / "artifacts"
    shutil.copytree(tiny_tokens.parents[1], root, symlinks=True)
    for task in ("clean", "dedup", "tokenize"):
        shutil.rmtree((root / "jobs/tiny" / task).resolve())
    return Submitted(cluster, root)


def check_books(job: Submitted, tiny_tokens: Path) -> None:
    """No document is lost or doubled, and the corpora are byte for byte those of one machine."""
    for task in ("clean", "dedup"):
        made, wanted = job.manifest(task), manifest(tiny_tokens.parents[1] / "jobs/tiny" / task)
        assert made["files"] == wanted["files"]
        dropped = sum(number for name, number in made["stats"].items() if name.startswith("dropped."))
        assert made["stats"]["documents_in"] == made["stats"]["documents"] + dropped == 500


def test_after_one_element_failed_only_its_part_is_made_again(sharded, tiny_tokens):
    job, part = sharded, (sharded.root / "jobs/tiny/shard").resolve() / PARTS[1]
    whole = part.read_bytes()
    part.write_bytes(whole[:5000] + bytes(byte ^ 255 for byte in whole[5000:5100]) + whole[5100:])
    job.submit("run.array=3", *DATA_ONLY)
    job.wait()
    ends = {element["ArrayTaskId"]: (element["JobState"], element["ExitCode"]) for element in job.elements("clean")}
    assert ends == {"0": ("COMPLETED", "0:0"), "1": ("FAILED", "3:0"), "2": ("COMPLETED", "0:0")}, job.what_is_there()
    assert job.states("dedup") == ["CANCELLED"]
    clean = job.directory("clean")
    said = (clean / "logs/job-00001.log").read_text()
    assert PARTS[1] in said
    assert "Traceback" not in said
    finished = {name: (clean / name).stat() for name in (PARTS[0], PARTS[2])}
    assert not (clean / PARTS[1]).exists()
    assert not (clean / "manifest.json").exists()

    part.write_bytes(whole)
    job.submit("run.array=3", *DATA_ONLY)
    job.wait()
    assert [*job.states("clean"), *job.states("dedup")] == ["COMPLETED"] * 4, job.what_is_there()
    for name, before in finished.items():
        after = (clean / name).stat()
        assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    check_books(job, tiny_tokens)


def test_a_retry_begins_only_the_elements_that_failed(sharded, tiny_tokens, tmp_path):
    job, mended = sharded, tmp_path / "mended"
    setup = f'run.setup=["[ $SLURM_ARRAY_TASK_ID != 2 ] || [ -e {mended} ]"]'  # an environment that one node lacks
    job.submit("run.array=3", setup, f"run.python={sys.executable}", *DATA_ONLY)
    job.wait()
    ends = {element["ArrayTaskId"]: element["ExitCode"] for element in job.elements("clean")}
    assert ends == {"0": "0:0", "1": "0:0", "2": "4:0"}, job.what_is_there()
    assert "run.setup: " in (job.directory("clean") / "logs/job-00002.log").read_text()
    first, made = job.id("clean"), {name: (job.directory("clean") / name).stat().st_mtime_ns for name in PARTS[:2]}
    mended.touch()
    job.command("retry", "tiny")
    job.wait()
    assert job.id("clean") != first
    assert {name: (job.directory("clean") / name).stat().st_mtime_ns for name in PARTS[:2]} == made
    check_books(job, tiny_tokens)


def test_no_more_elements_run_at_once_than_was_said(cluster, tmp_path):
    job = Submitted(cluster, tmp_path / "artifacts")
    job.submit("run.array=4", "run.at_once=2", "run.flags=[--hold]", *DATA_ONLY)
    (element,) = job.elements("clean")
    assert (element["ArrayTaskId"], element["ArrayTaskThrottle"]) == ("0-3%2", "2")


def test_an_array_is_no_larger_than_the_cluster_takes(new_cluster, tiny_tokens, tmp_path):
    small = new_cluster("--nodes", "1", "--conf", "MaxArraySize=3")
    shutil.copytree(tiny_tokens.parents[1], tmp_path / "artifacts", symlinks=True)
    shutil.rmtree((tmp_path / "artifacts/jobs/tiny/clean").resolve())
    job = Submitted(small, tmp_path / "artifacts")
    job.submit("run.array=50", *DATA_ONLY, "~tasks.dedup")
    job.wait()
    assert set(job.states("clean")) == {"COMPLETED"}
    assert 2 <= len(job.states("clean")) <= 3
    wanted = manifest(tiny_tokens.parents[1] / "jobs/tiny/clean")
    assert job.manifest("clean")["files"] == wanted["files"]
    assert job.manifest("clean")["made"]["ranks"] == len(job.states("clean"))
