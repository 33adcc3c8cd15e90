"""A job runs the settings and the code of the moment of submission, whatever is edited while it waits."""

import json
import shutil
import subprocess
import sys

import pytest
from submitted import Submitted, manifest
from support import PROJECT

CODE = ("pipeline", "conf", "slurm", "pyproject.toml")
JOB = """# @package _global_
tasks:
  shard: {{kind: shard, part_bytes: 10_000, sources: [{{path: {text}}}]}}
  clean: {{kind: clean, corpus: "@shard"}}
"""


class Checkout:
    """A copy of the project with a commit of its own, and a job file and a raw text that a test may edit."""

    def __init__(self, cluster, place) -> None:
        self.place, self.text, self.job = place, place / "text.jsonl", place / "waiting.yaml"
        self.env = cluster.env | {"PYTHONPATH": str(place)}
        for name in CODE:
            if (PROJECT / name).is_dir():
                shutil.copytree(PROJECT / name, place / name, ignore=shutil.ignore_patterns("__pycache__", "job"))
            else:
                shutil.copy(PROJECT / name, place / name)
        (place / "conf/job").mkdir()
        shutil.copy(PROJECT / "tests/data/topics.jsonl", self.text)
        self.job.write_text(JOB.format(text=self.text))
        self.git("init", "--quiet")
        self.git("add", "--all")
        self.git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message=all")
        self.commit = self.git("rev-parse", "--short=12", "HEAD").strip()

    def git(self, *words: str) -> str:
        return subprocess.run(["git", *words], cwd=self.place, check=True, capture_output=True, text=True).stdout

    def pipeline(self, *words: str, status: int = 0) -> str:
        """What a command says that is run with the code of this checkout."""
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", *words], cwd=self.place, env=self.env, capture_output=True, text=True
        )
        assert done.returncode == status, done.stderr
        return done.stdout + done.stderr

    def submit(self, root) -> None:
        self.pipeline(f"job={self.job}", "run=slurm", "run.array=2", "run.flags=[--hold]", f"root={root}")


@pytest.fixture
def checkout(cluster, tmp_path):
    place = tmp_path / "checkout"
    place.mkdir()
    return Checkout(cluster, place)


@pytest.fixture
def waiting(cluster, checkout, tmp_path):
    """A job that was submitted and is held back."""
    checkout.submit(tmp_path / "artifacts")
    job = Submitted(cluster, tmp_path / "artifacts", "waiting")
    assert all(element["Reason"] == "JobHeldUser" for task in job.tasks for element in job.elements(task))
    return job


def release(cluster, job: Submitted) -> None:
    for task in job.tasks:
        cluster.run("scontrol", "release", job.id(task))
    job.wait(timeout_s=60)


def test_what_is_edited_while_a_job_waits_is_not_what_it_runs(cluster, checkout, waiting):
    checkout.job.write_text(checkout.job.read_text().replace("part_bytes: 10_000", "part_bytes: 5_000"))
    for path in (checkout.place / "conf").rglob("*.yaml"):
        path.write_text("edited: [")
    for path in (checkout.place / "pipeline").rglob("*.py"):
        path.write_text("raise SystemExit('edited')\n")
    (checkout.place / "slurm/stage.sbatch").write_text("#!/bin/bash\nexit 9\n")
    checkout.git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--all", "--quiet", "--message=edited")
    release(cluster, waiting)
    for task in ("shard", "clean"):
        assert set(waiting.states(task)) == {"COMPLETED"}, waiting.what_is_there()
        assert manifest(waiting.root / "jobs/waiting" / task)["made"]["commit"] == checkout.commit
    assert manifest(waiting.root / "jobs/waiting/shard")["stage"]["part_bytes"] == 10_000


def test_raw_text_that_changed_while_a_job_waited_is_refused(cluster, checkout, waiting):
    with open(checkout.text, "a", encoding="utf-8") as stream:
        stream.write(json.dumps({"text": "one more", "label": "games", "split": "train"}) + "\n")
    release(cluster, waiting)
    elements = waiting.elements("shard")
    assert {(element["JobState"], element["ExitCode"]) for element in elements} == {("FAILED", "3:0")}
    assert set(waiting.states("clean")) == {"CANCELLED"}
    log = (waiting.directory("shard") / "logs/job-00000.log").read_text()
    assert "tasks.shard.sources.0.path: its files changed" in log
    assert "Traceback" not in log
    assert not (waiting.directory("shard") / "manifest.json").exists()


def test_code_that_was_deleted_is_kept_again_if_it_is_still_the_same(cluster, checkout, waiting):
    (code,) = (waiting.root / "code").iterdir()
    root = f"root={waiting.root}"
    for edited in (False, True):
        checkout.pipeline("cancel", "waiting", root)
        shutil.rmtree(code)
        if edited:
            (checkout.place / "pipeline/trace.py").write_text("edited")
        said = checkout.pipeline("retry", "waiting", root, status=4 if edited else 0)
        assert ("pipeline was edited meanwhile; start the job again" in said) == edited
        assert [path.name for path in code.parent.iterdir()] == ([] if edited else [code.name])
        queued = cluster.run("squeue", "--noheader").stdout
        assert bool(queued) != edited, queued
