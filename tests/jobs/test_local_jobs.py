"""The commands of daily use about a job that runs on this machine."""

import json
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import MODEL_TASKS, PROJECT, command, run_command, run_pipeline

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("tokens")]

TRAINING = (
    "job=tiny",
    "tasks.pretrain.steps=300",
    "tasks.pretrain.max_epochs=null",
    *(f"~tasks.{task}" for task in (*MODEL_TASKS, "report") if task not in ("pretrain", "export")),
)


@pytest.fixture
def root(tiny_tokens, tmp_path):
    shutil.copytree(tiny_tokens.parents[1], tmp_path / "artifacts", symlinks=True)
    return tmp_path / "artifacts"


def tasks_of(root):
    found = json.loads(run_command("status", "tiny", "--json", f"root={root}").stdout)
    return found, {task["name"]: task for task in found["tasks"]}


def test_a_job_on_this_machine_is_cancelled_and_a_retry_continues_it(root):
    job = subprocess.Popen(
        command(*TRAINING, f"root={root}"), cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not list(root.glob("model/pretrain-*/metrics.jsonl")):
        assert time.monotonic() < deadline
        assert job.poll() is None
        time.sleep(0.02)
    (rank,) = map(int, Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split())
    os.kill(rank, signal.SIGSTOP)  # however fast it is, it is met in its middle
    found, tasks = tasks_of(root)
    assert (found["state"], found["launcher"], found["exit_status"]) == ("running", "local", None)
    assert (tasks["pretrain"]["state"], tasks["pretrain"]["total"]) == ("running", 300)
    assert (tasks["export"]["state"], tasks["export"]["waits_for"]) == ("waiting", ["pretrain"])
    for again in (
        run_command("retry", "tiny", f"root={root}", status=4),
        run_pipeline(*TRAINING, f"root={root}", status=4),
    ):
        assert f"under way (process {job.pid} on " in again.stderr
    record = root / "jobs/tiny/job.json"
    here = record.read_text()
    elsewhere = here.replace(f'"host": "{os.uname().nodename}"', '"host": "elsewhere"')
    assert elsewhere != here
    record.write_text(elsewhere)  # as seen from another machine, which knows of it by its locks alone
    assert "is working in it" in run_pipeline(*TRAINING, f"root={root}", status=4).stderr
    assert record.read_text() == elsewhere
    record.write_text(here)
    words = [sys.executable, "-m", "pipeline", "cancel", "tiny", f"root={root}"]
    with subprocess.Popen(words, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as cancel:
        assert cancel.stdout is not None
        assert "was asked to stop" in cancel.stdout.readline()
        os.kill(rank, signal.SIGCONT)
    assert job.communicate(timeout=60)[1].startswith("stopped: pretrain after step ")
    assert job.returncode == 75
    over = run_command("wait", "tiny", f"root={root}", status=75).stdout
    assert over.endswith("tiny: stopped\n")
    _, tasks = tasks_of(root)
    assert (tasks["pretrain"]["state"], tasks["export"]["state"]) == ("stopped", "never started")
    assert tasks["export"]["error"].startswith("waited for pretrain, which was stopped")

    run_command("retry", "tiny", f"root={root}")
    assert {task["state"] for task in tasks_of(root)[1].values()} == {"done"}
    assert "continues after step " in run_command("logs", "tiny.pretrain", f"root={root}").stdout


def test_a_copied_root_is_looked_at_and_worked_in_by_itself(root, tiny_tokens):
    first = tiny_tokens.parents[1]
    shutil.rmtree(next(root.glob("tokens/tokenize-*")))
    untouched = sorted((path, path.lstat().st_mtime_ns) for path in first.rglob("*"))
    _, tasks = tasks_of(root)
    assert (tasks["dedup"]["state"], tasks["tokenize"]["state"]) == ("done", "never started")
    assert tasks["tokenize"]["error"].startswith(f"its directory is gone: {root}/tokens/tokenize-")
    done = run_command("retry", "tiny", f"root={root}").stdout
    assert "tokenize done in " in done
    assert {task["state"] for task in tasks_of(root)[1].values()} == {"done"}
    made = (root / "jobs/tiny/tokenize").resolve()
    assert made.parents[1] == root.resolve()
    inputs = json.loads((made / "work/task.json").read_text())["inputs"].values()
    assert inputs
    assert all(path.startswith(f"{root}/") for path in inputs)
    assert sorted((path, path.lstat().st_mtime_ns) for path in first.rglob("*")) == untouched


def test_a_retry_of_other_raw_files_is_refused(root, tmp_path):
    data = tmp_path / "topics.jsonl"
    shutil.copy(PROJECT / "tests/data/topics.jsonl", data)
    few = [f"~tasks.{task}" for task in ("evaluate", "generate", "export", "report")]
    words = ("job=tiny", *few, f"tasks.finetune.data={data}", "tasks.finetune.label_field=none", f"root={root}")
    more = ("tasks.pretrain.steps=1", "tasks.pretrain.validate_every_steps=null")
    run_pipeline(*words, *more, status=3)
    data.write_text('{"text": "x", "label": "games", "split": "train"}\n')
    refused = run_command("retry", "tiny", f"root={root}", status=2).stderr
    assert "tasks.finetune.data: its files have changed since the job was started" in refused
    assert "start that: python -m pipeline " in refused
    assert f" {shlex.join(words[:-1])} " in refused
    assert refused.endswith(f"{shlex.join((*more, words[-1]))}\n")


def test_watching_on_a_terminal_ends_with_the_job(root):
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "pipeline", "status", "tiny", "--watch", f"root={root}"]
    watch = subprocess.Popen(words, cwd=PROJECT, stdout=theirs, stderr=theirs, env={**os.environ, "COLUMNS": "150"})
    os.close(theirs)
    shown = b""
    try:
        while block := os.read(ours, 65536):
            shown += block
    except OSError:  # Linux's word for the end of a terminal
        pass
    os.close(ours)
    assert watch.wait() == 0
    assert b"tokenize" in shown
    assert b"Traceback" not in shown
