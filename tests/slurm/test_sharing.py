"""Jobs that share tasks, and sweeps: whatever several of them want is made once, as long as one of them wants it."""

import json
import subprocess
from pathlib import Path

import pytest
from submitted import Submitted, manifest
from support import MODEL_TASKS, PROJECT, command, run_command, run_pipeline

WORDS = ["run=slurm", "run.array=2", "run.threads=1"]
UNTRAINED = [f"~tasks.{task}" for task in (*MODEL_TASKS, "report")]
UPSTREAM = ("shard", "clean", "dedup", "train_tokenizer")
JOB = """# @package _global_
tasks:
  shard:
    kind: shard
    part_bytes: 100_000
    sources:
      - path: "${{jobs:quickstart/topics.jsonl.gz}}"
        reader: {{kind: jsonl, where: {{split: valid}}}}
  {clean}: {{kind: clean, corpus: "@shard"}}
  vocabulary: {{kind: train_tokenizer, corpus: "@{clean}", vocab_size: {vocab_size}}}
"""


def write_job(path, clean, vocab_size):
    path.write_text(JOB.format(clean=clean, vocab_size=vocab_size))
    return path


def environment(cluster):
    return cluster.env | {"PYTHONWARNINGS": ""}


def newest_job(cluster):
    """The id of the job that was submitted last; SLURM forgets older ones meanwhile."""
    return max(map(int, cluster.run("squeue", "--noheader", "--states=all", "--format=%A").stdout.split()))


def made_once(root, count):
    """Whether every directory of this root is an artifact that was made at the first try."""
    places = [path.parent for path in root.glob("*/*/work") if path.parents[1].name != "jobs"]
    assert len(places) == count
    for place in places:
        assert manifest(place)["files"], place
        attempts = [path.read_text() for path in (place / "work").glob("attempt*") if path.suffix != ".tmp"]
        assert set(attempts) == {"1"}, place
    return True


def verify(root, *names):
    run_command = [*command()[:3], "verify", *names, f"root={root}"]
    done = subprocess.run(run_command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def links(root, job):
    return {path.name: path.resolve() for path in (root / "jobs" / job).iterdir() if path.is_symlink()}


def test_two_jobs_share_what_they_have_in_common_whatever_they_call_it(cluster, tmp_path):
    root, conf = tmp_path / "artifacts", {"SLURM_CONF": cluster.env["SLURM_CONF"]}
    first, second = write_job(tmp_path / "first.yaml", "clean", 300), write_job(tmp_path / "second.yaml", "washed", 400)
    for path in (first, second):
        run_pipeline(f"job={path}", f"root={root}", *WORDS, **conf)
    one, other = Submitted(cluster, root, "first"), Submitted(cluster, root, "second")
    assert other.id("shard") == one.id("shard")
    assert other.id("washed") == one.id("clean")
    assert other.id("vocabulary") != one.id("vocabulary")
    assert [other.tasks[name]["shared_with"] for name in ("shard", "washed", "vocabulary")] == ["first", "first", None]
    one.wait()
    other.wait()
    assert made_once(root, 4)
    assert set(links(root, "first")) == {"shard", "clean", "vocabulary"}
    assert set(links(root, "second")) == {"shard", "washed", "vocabulary"}
    assert links(root, "first")["clean"] == links(root, "second")["washed"]
    assert links(root, "first")["vocabulary"] != links(root, "second")["vocabulary"]
    verify(root, *(f"{job}.{name}" for job in ("first", "second") for name in links(root, job)))

    before = newest_job(cluster)
    again = run_pipeline(f"job={second}", f"root={root}", *WORDS, **conf)
    assert newest_job(cluster) == before
    assert "nothing to submit" in again.stdout
    assert made_once(root, 4)


def test_two_jobs_that_are_submitted_at_the_same_moment_make_everything_once(cluster, tmp_path):
    root = tmp_path / "artifacts"
    paths = [write_job(tmp_path / f"{name}.yaml", "clean", 300) for name in ("first", "second", "third")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    words = [command(f"job={path}", f"root={root}", *WORDS) for path in paths]
    submissions = [subprocess.Popen(each, cwd=PROJECT, env=environment(cluster), **pipes) for each in words]
    for submission in submissions:
        out, _ = submission.communicate(timeout=120)
        assert submission.returncode == 0, out
    jobs = [Submitted(cluster, root, path.stem) for path in paths]
    for name in ("shard", "clean", "vocabulary"):
        assert len({job.id(name) for job in jobs}) == 1
        assert [job.tasks[name]["shared_with"] for job in jobs].count(None) == 1
    jobs[0].wait()
    assert made_once(root, 3)
    assert links(root, "first") == links(root, "second") == links(root, "third")
    assert len(links(root, "first")) == 3


def submit_sweep(cluster, root, fractions, status=0):
    """Submit a sweep whose points wait until they are released."""
    words = ["-m", "job=tiny", f"root={root}", *UNTRAINED, *WORDS, 'run.flags=["--hold"]']
    words.append(f"tasks.tokenize.held_out_fraction={fractions}")
    return run_pipeline(*words, status=status, SLURM_CONF=cluster.env["SLURM_CONF"])


@pytest.fixture
def sweep(cluster, tmp_path):
    """A sweep of two points that waits; `release` lets it run."""
    root = tmp_path / "artifacts"
    done = submit_sweep(cluster, root, "0.05,0.1")
    return root, done.stdout, [Submitted(cluster, root, f"tiny-{number}") for number in range(2)]


def release(job):
    for task in job.tasks:
        job.slurm.run("scontrol", "release", job.id(task))


def test_each_point_of_a_sweep_is_a_job_and_what_they_share_is_made_once(sweep):
    root, printed, (first, second) = sweep
    assert "[tiny-0] " in printed
    assert "[tiny-1] " in printed
    shown = run_command("status", f"root={root}").stdout.splitlines()
    points = [line for line in shown if line.startswith("tiny-")]
    for line, fraction in zip(points, ("0.05", "0.1"), strict=True):
        assert line.endswith(f"slurm  tasks.tokenize.held_out_fraction={fraction}"), line
    assert [first.id(task) == second.id(task) for task in first.tasks] == [True] * 4 + [False]
    assert [second.tasks[task]["shared_with"] for task in second.tasks] == ["tiny-0"] * 4 + [None]
    release(first)
    second.slurm.run("scontrol", "release", second.id("tokenize"))
    first.wait()
    second.wait()
    assert made_once(root, 6)
    held_out = [manifest(links(root, job.name)["tokenize"])["stage"]["held_out_fraction"] for job in (first, second)]
    assert held_out == [0.05, 0.1]
    for task in UPSTREAM:
        assert links(root, "tiny-0")[task] == links(root, "tiny-1")[task]


def test_cancelling_one_point_leaves_what_the_other_wants(sweep):
    root, _, (first, second) = sweep
    printed = first.command("cancel", "tiny-0")
    assert "tiny-1" in str(printed)  # is said to wait for it
    assert first.states("tokenize") == ["CANCELLED"]
    for task in UPSTREAM:
        assert set(second.states(task)) == {"PENDING"}, task
    release(second)
    second.wait()
    assert set(links(root, "tiny-1")) == {*UPSTREAM, "tokenize"}
    assert "tokenize" not in links(root, "tiny-0")
    assert len(list(root.glob("*/*/manifest.json"))) == 5


def test_a_point_that_was_cancelled_can_be_submitted_again_while_the_other_waits(sweep):
    root, _, (first, second) = sweep
    shared = [first.id(task) for task in UPSTREAM]
    first.command("cancel", "tiny-0")
    submit_sweep(first.slurm, root, "0.05")
    assert [first.id(task) for task in UPSTREAM] == [second.id(task) for task in UPSTREAM] == shared
    assert {first.tasks[task]["shared_with"] for task in first.tasks} == {None}
    refused = submit_sweep(first.slurm, root, "0.05", status=4)
    assert "tiny-0: a job of this name is under way" in refused.stderr
    second.command("cancel", "tiny-1")
    assert [set(first.states(task)) for task in first.tasks] == 5 * [{"PENDING"}]


def test_cancelling_both_points_leaves_nothing(sweep):
    _, _, (first, second) = sweep
    first.command("cancel", "tiny-0")
    second.command("cancel", "tiny-1")
    for job in (first, second):
        for task in job.tasks:
            assert set(job.states(task)) == {"CANCELLED"}, task


def test_a_point_that_is_refused_leaves_the_others_as_they_are(cluster, tmp_path):
    root = tmp_path / "artifacts"
    done = submit_sweep(cluster, root, "0.05,7,0.1", status=2)
    assert done.stderr.startswith("error: tasks.tokenize.held_out_fraction: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout.rstrip().endswith("2 of 3 points went through; refused: tiny-1")
    assert sorted(path.parent.name for path in Path(root / "jobs").glob("*/job.json")) == ["tiny-0", "tiny-2"]
    record = json.loads((root / "jobs/tiny-2/job.json").read_text())
    assert [task["shared_with"] for task in record["tasks"]] == ["tiny-0"] * 4 + [None]
