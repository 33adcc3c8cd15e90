"""A stop that comes anywhere in a job stops the job, and the same command continues."""

import json
import os
import shutil
import signal
import subprocess
import time

import pytest
from support import PROJECT, command, run_pipeline

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("tiny")]


def start(*arguments):
    return subprocess.Popen(command(*arguments), cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(pattern, directory, count=1):
    deadline = time.monotonic() + 60
    while len(list(directory.glob(pattern))) < count:
        assert time.monotonic() < deadline, f"{pattern} did not come"
        time.sleep(0.01)


@pytest.fixture
def root(tiny_root, tmp_path):
    shutil.copytree(tiny_root, tmp_path / "artifacts", symlinks=True)
    return tmp_path / "artifacts"


def test_a_stop_in_a_stage_that_cannot_stop_ends_the_job_after_it(root):
    shutil.rmtree(root / "report")  # evaluate and report are to be made again
    process = start("job=tiny", f"root={root}", "tasks.generate.seed=9")
    wait_for("report/evaluate-*/work/task.json", root)
    os.kill(process.pid, signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.startswith("stopped: ")
    assert errors.endswith("; run the same command to continue\n")
    assert "report done" not in out
    run_pipeline("job=tiny", f"root={root}", "tasks.generate.seed=9")


def test_a_stop_ends_a_sweep(root):
    process = start("-m", "job=tiny", f"root={root}", "tasks.pretrain.steps=300,301")
    wait_for("model/pretrain-*/metrics.jsonl", root, 2)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.count("stopped: ") == 1
    assert len(list((root / "model").glob("pretrain-*"))) == 2  # the second point was not begun


def test_a_closed_terminal_is_a_stop(root):
    process = start("job=tiny", f"root={root}", "tasks.pretrain.steps=300")
    wait_for("model/pretrain-*/metrics.jsonl", root, 2)
    os.kill(process.pid, signal.SIGHUP)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "state saved" in errors


def test_a_job_whose_output_nobody_can_take_goes_on(root):
    shutil.rmtree(root / "report")
    with open("/dev/full", "w") as full:  # as under nohup or cron, on a full disk
        words = command("job=tiny", f"root={root}", "tasks.generate.seed=9")
        done = subprocess.run(words, cwd=PROJECT, stdout=full, stderr=subprocess.PIPE, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (root / "jobs/tiny/report/manifest.json").exists()


def test_text_that_changes_while_it_is_read_is_not_published(root, tmp_path):
    data = tmp_path / "topics.jsonl"
    shutil.copy(PROJECT / "tests/data/topics.jsonl", data)
    process = start("job=tiny", f"root={root}", f"tasks.finetune.data={data}", "tasks.finetune.seed=3")
    wait_for("model/finetune-*/metrics.jsonl", root, 2)
    with open(data, "a") as file:
        file.write(json.dumps({"text": "x", "label": "games", "split": "train"}) + "\n")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "tasks.finetune.data: its files changed while the job ran; run it again" in errors
    shutil.copy(PROJECT / "tests/data/topics.jsonl", data)  # the text as it was: nothing of the other may be left
    done = run_pipeline("job=tiny", f"root={root}", f"tasks.finetune.data={data}", "tasks.finetune.seed=3")
    assert "continues after" not in done.stdout
    assert list((root / "jobs/tiny/finetune/checkpoints").iterdir())


def test_a_finished_job_needs_no_write(root):
    for path in root.rglob("*"):
        if path.is_dir():
            path.chmod(0o555)
    before = {path: path.lstat().st_mtime_ns for path in root.rglob("*")}
    run_pipeline("job=tiny", f"root={root}")
    assert {path: path.lstat().st_mtime_ns for path in root.rglob("*")} == before
