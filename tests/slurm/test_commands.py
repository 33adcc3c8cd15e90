"""What a person does with a job that runs: status, wait, logs, cancel, retry, on a real SLURM."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from submitted import Submitted, wait_until
from support import MODEL_TASKS, PROJECT, run_command, run_pipeline
from trainings import RANK, only_process, processes

STEPS = 300
TRAINING = (
    "job=tiny",
    "run=slurm",
    "run.array=2",
    f"tasks.pretrain.steps={STEPS}",
    "tasks.pretrain.max_epochs=null",
    *(f"~tasks.{task}" for task in (*MODEL_TASKS, "report") if task not in ("pretrain", "export")),
)
REACHED = 40  # steps, at which it is disturbed


@pytest.fixture
def new_root(tiny_tokens, tmp_path):
    """Makes roots in which the data tasks of the tiny job are done."""

    def make(name: str) -> Path:
        shutil.copytree(tiny_tokens.parents[1], tmp_path / name, symlinks=True)
        shutil.rmtree(tmp_path / name / "jobs/tiny")
        return tmp_path / name

    return make


def status_of(cluster, root, **variables):
    env = {**cluster.env, **variables}
    found = json.loads(run_command("status", "tiny", "--json", f"root={root}", **env).stdout)
    return found, {task["name"]: task for task in found["tasks"]}


def steps_done(root):
    return sum(path.read_bytes().count(b"\n") for path in root.glob("model/pretrain-*/metrics.jsonl"))


def halt_after(job, steps):
    """Halt the training of a job once it has done so many steps, however fast it is; SLURM wakes what it ends."""
    wait_until(lambda: steps_done(job.root) >= steps, 120, job.what_is_there)
    signal_rank(job, signal.SIGSTOP)


def signal_rank(job, number):
    os.kill(only_process(job.id("pretrain"), RANK), number)


def start(cluster, place, *words):
    """Start a command that prints into a file."""
    line = [sys.executable, "-m", "pipeline", *map(str, words)]
    with open(place, "w", encoding="utf-8") as out:
        return subprocess.Popen(line, cwd=PROJECT, env={**os.environ, **cluster.env}, stdout=out, stderr=out)


def weights(root):
    (path,) = (root / "model").glob("pretrain-*/model.safetensors")
    return path.read_bytes()


def test_a_training_that_was_cancelled_requeued_and_retried_ends_in_the_same_bits(cluster, new_root, tmp_path):
    undisturbed, root = new_root("undisturbed"), new_root("disturbed")
    run_pipeline(*TRAINING, f"root={undisturbed}", **cluster.env)
    run_pipeline(*TRAINING, f"root={root}", **cluster.env)

    job = Submitted(cluster, root)
    halt_after(job, REACHED)
    found, tasks = status_of(cluster, root)
    training, export = tasks["pretrain"], tasks["export"]
    assert (found["state"], found["exit_status"], found["launcher"]) == ("running", None, "slurm")
    assert (training["total"], training["noun"], training["tries"]) == (STEPS, "steps", 1)
    assert training["nodes"] in cluster.nodes
    assert training["loss"] > 0
    assert training["tokens_per_s"] > 0
    assert training["left_s"] is not None
    assert (export["state"], export["reason"]) == ("waiting", "Dependency")
    assert tasks["tokenize"]["state"] == "done"

    run_command("cancel", "tiny", f"root={root}", **cluster.env)
    found, tasks = status_of(cluster, root)
    assert [tasks[name]["state"] for name in ("pretrain", "export")] == ["cancelled", "cancelled"]
    assert REACHED <= tasks["pretrain"]["done"] < STEPS
    assert "state saved" in tasks["pretrain"]["error"]
    assert cluster.job(tasks["pretrain"]["job_id"])["JobState"] == "CANCELLED"  # it has not begun itself again
    over = run_command("wait", "tiny", f"root={root}", status=75, **cluster.env).stdout
    assert over.endswith("tiny: cancelled\n")

    run_command("retry", "tiny", f"root={root}", **cluster.env)  # as many steps, though nobody says so again
    printed, log = tmp_path / "wait.txt", tmp_path / "logs.txt"
    waiting = start(cluster, printed, "wait", "tiny", f"root={root}")
    following = start(cluster, log, "logs", "tiny.pretrain", "--follow", f"root={root}")
    halt_after(job, tasks["pretrain"]["done"] + REACHED)
    wait_until(lambda: "pretrain  running, try 2 on " in printed.read_text(), 60, printed.read_text)
    cluster.run("scontrol", "requeue", job.id("pretrain"))
    cluster.start_now(job.id("pretrain"))
    wait_until(lambda: bool(processes(job.id("pretrain"), RANK)), 60, job.what_is_there)
    signal_rank(job, signal.SIGSTOP)
    wait_until(lambda: "pretrain  running, try 3 on " in printed.read_text(), 60, printed.read_text)
    signal_rank(job, signal.SIGCONT)
    assert waiting.wait(120) == 0, printed.read_text()
    assert "pretrain  done" in printed.read_text()
    assert "export  done" in printed.read_text()
    made = next(
        line for line in printed.read_text().splitlines() if line.startswith("pretrain  ") and " steps, " in line
    )
    assert "validation loss " in made
    assert printed.read_text().endswith(f"export: {root}/jobs/tiny/export\ntiny: done\n")
    assert following.wait(30) == 0, log.read_text()
    assert log.read_text().count("continues after step ") == 2  # the retry, and the requeue
    _, tasks = status_of(cluster, root)
    assert {task["state"] for task in tasks.values()} == {"done"}
    assert tasks["pretrain"]["done"] == STEPS

    run_command("wait", "tiny", f"root={undisturbed}", **cluster.env)
    assert weights(root) == weights(undisturbed)
    done = run_command("retry", "tiny", f"root={root}", **cluster.env).stdout
    assert "there is nothing to do again" in done
    assert "nothing of it waits or runs" in run_command("cancel", "tiny", f"root={root}", **cluster.env).stdout


def test_wait_ends_with_the_status_of_what_failed_and_dependents_say_why(cluster, new_root):
    root = new_root("root")
    shutil.rmtree(next(root.glob("tokens/tokenize-*")))
    words = [word for word in TRAINING if "max_epochs" not in word]
    # more than there is text for, which shows when it is tokenized
    run_pipeline(*words, "tasks.pretrain.steps=100000", f"root={root}", **cluster.env)
    found, without = status_of(cluster, root, PATH=str(root / "none"))  # as where there is no SLURM
    assert found["problem"].startswith("SLURM does not answer: ")
    assert (without["dedup"]["state"], without["export"]["state"]) == ("done", "unknown")
    refused = run_command("retry", "tiny", f"root={root}", status=4, **cluster.env).stderr
    assert "a job of this name is under way" in refused

    over = run_command("wait", "tiny", f"root={root}", status=2, **cluster.env).stdout
    why = "pretrain.max_epochs: 100,000 steps go "
    assert f": {why}" in over
    found, tasks = status_of(cluster, root)
    assert (found["state"], found["exit_status"]) == ("failed", 2)
    assert tasks["pretrain"]["error"].startswith(why)
    assert tasks["export"]["state"] == "cancelled"
    assert tasks["export"]["error"].startswith(f"waited for pretrain, which failed: {why}")
    table = run_command("status", "tiny", f"root={root}", **cluster.env).stdout
    assert table.count(why) == 1
    assert "waited for pretrain, which failed\n" in table
    assert "logs tiny.pretrain" in table
    assert "retry tiny" in table
    log = run_command("logs", "tiny.pretrain", f"root={root}", **cluster.env)
    assert why in log.stdout  # that of the SLURM job: no rank has printed anything

    run_command("retry", "tiny", f"root={root}", **cluster.env)  # what failed, and what never started
    _, again = status_of(cluster, root)
    assert int(again["export"]["job_id"]) > int(again["pretrain"]["job_id"]) > int(tasks["export"]["job_id"])
    run_command("cancel", "tiny.export", f"root={root}", **cluster.env)
    assert status_of(cluster, root)[1]["export"]["state"] == "cancelled"
    run_command("wait", "tiny", f"root={root}", status=2, **cluster.env)


def test_what_never_began_is_cancelled_and_is_so_whatever_is_in_files_beside_it(cluster, new_root):
    root = new_root("root")
    run_pipeline(*TRAINING, "run.flags=[--hold]", f"root={root}", **cluster.env)
    (directory,) = root.glob("model/pretrain-*")
    for text, name in itertools.product(("[]", "5", '{"slurm": 5, "job": "x"}'), ("claim", "result")):
        (directory / f"work/{name}.json").write_text(text)
        _, tasks = status_of(cluster, root)
        assert [tasks[name]["state"] for name in ("pretrain", "export")] == ["waiting", "waiting"]
    run_command("cancel", "tiny", f"root={root}", **cluster.env)
    _, tasks = status_of(cluster, root)
    by_command = [(tasks[name]["state"], tasks[name]["error"]) for name in ("pretrain", "export")]
    assert by_command == [("cancelled", ""), ("cancelled", "waited for pretrain, which was cancelled")]
    assert cluster.job(tasks["pretrain"]["job_id"])["JobState"] == "CANCELLED"

    run_command("retry", "tiny", f"root={root}", **cluster.env)
    _, tasks = status_of(cluster, root)
    cluster.scancel(tasks["pretrain"]["job_id"])
    cluster.wait_for(tasks["export"]["job_id"], "CANCELLED")
    _, tasks = status_of(cluster, root)
    assert [(tasks[name]["state"], tasks[name]["error"]) for name in ("pretrain", "export")] == by_command


def test_a_sweep_is_looked_at_retried_and_cancelled_under_its_name(cluster, new_root):
    root = new_root("root")
    run_pipeline(
        "-m", *TRAINING, "name=sw", "tasks.pretrain.seed=1,2", "run.flags=[--hold]", f"root={root}", **cluster.env
    )
    table = run_command("status", "sw", f"root={root}", **cluster.env).stdout.splitlines()
    assert [line.split()[:2] for line in table[1:]] == [["sw-0", "waiting"], ["sw-1", "waiting"]]
    held = run_command("retry", "sw", f"root={root}", status=4, **cluster.env).stderr.splitlines()
    for name, line in zip(("sw-0", "sw-1"), held, strict=True):
        assert line.startswith(f"error: {name}: pretrain is waiting (held; scontrol release ")
    cancelled = run_command("cancel", "sw", f"root={root}", **cluster.env).stdout
    assert cancelled.count(": cancelled, SLURM job ") == 4
    over = run_command("wait", "sw", f"root={root}", status=75, **cluster.env).stdout
    assert "\nsw-0: cancelled\n" in over
    assert over.endswith("\nsw-1: cancelled\n")
    again = run_command("status", "sw-1", f"root={root}", **cluster.env).stdout
    assert " name=sw-1 " in again


def test_an_element_that_was_cancelled_while_held_is_cancelled(cluster, new_root):
    root = new_root("root")
    shutil.rmtree(next(root.glob("tokens/tokenize-*")))
    run_pipeline(*TRAINING, "run.flags=[--hold]", f"root={root}", **cluster.env)
    _, tasks = status_of(cluster, root)
    cluster.scancel(f"{tasks['tokenize']['job_id']}_1")
    _, tasks = status_of(cluster, root)
    assert tasks["tokenize"]["elements"] == {"waiting": 1, "cancelled": 1}
    cluster.scancel(tasks["tokenize"]["job_id"])
    _, tasks = status_of(cluster, root)
    assert (tasks["tokenize"]["state"], tasks["tokenize"]["error"]) == ("cancelled", "")
