"""Faults drawn at random over a whole job on a real SLURM: nothing is lost or doubled, the weights are the same bits.

PIPELINE_CAMPAIGN_ROUNDS says how many rounds (2), PIPELINE_CAMPAIGN_SEED draws the same faults again.
"""

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from submitted import OVER, SHORTER, Submitted, losses, manifest, wait_until
from support import run_pipeline

from pipeline.artifact import open_artifact

ROUNDS = int(os.environ.get("PIPELINE_CAMPAIGN_ROUNDS", "2"))
SEED = int(os.environ.get("PIPELINE_CAMPAIGN_SEED", random.randrange(1_000_000)))
TASKS = ("shard", "clean", "dedup", "train_tokenizer", "tokenize", "pretrain", "export", "report")
OFTEN = (
    "shard",
    "clean",
    "clean",
    "tokenize",
    "tokenize",
    "pretrain",
    "pretrain",
    "pretrain",
    "export",
)  # what a fault is drawn for
STEPS = 120
SETTINGS = (
    *SHORTER,
    "tasks.shard.part_bytes=30_000",
    f"tasks.pretrain.steps={STEPS}",
    f"tasks.pretrain.validate_every_steps={STEPS}",
    "run.checkpoints.every_steps=15",
)
FAULTS_EACH_ROUND = 4
DELAY_S = 2.0
ROUND_S = 600  # on a machine that has other work
OTHERS_S, TRAINING_S = 1.5, 6.0  # of a task's life, within which it is hit


class Faults:
    """What can happen to a task that runs. Each takes the task's name, and the id and the nodes of one of its jobs."""

    def __init__(self, job: Submitted, draw: random.Random) -> None:
        self.job, self.slurm, self.draw = job, job.slurm, draw

    def kill_step(self, task: str, job_id: str, node: str) -> None:
        self.slurm.run("scancel", "--signal=KILL", f"{job_id}.0", check=False)  # it may have ended

    def kill_rank(self, task: str, job_id: str, node: str) -> None:
        self._kill("python", f"rank.py\0{self.job.directory(task)}/work/task.json")

    def kill_driver(self, task: str, job_id: str, node: str) -> None:
        self._kill("python", f"pipeline\0task\0{self.job.directory(task)}")

    def kill_srun(self, task: str, job_id: str, node: str) -> None:
        self._kill("srun", f"rank.py\0{self.job.directory(task)}/work/task.json")

    def requeue(self, task: str, job_id: str, node: str) -> None:
        self.slurm.run("scontrol", "requeue", job_id, check=False)

    def crash_node(self, task: str, job_id: str, node: str) -> None:
        self.slurm.crash(node)  # SLURM would notice by itself after half a minute
        self.slurm.run("scontrol", "update", f"NodeName={node}", "State=down", "Reason=crash")
        self.slurm.start(node)
        self.slurm.run("scontrol", "update", f"NodeName={node}", "State=resume", check=False)

    def restart_controller(self, task: str, job_id: str, node: str) -> None:
        # in order: one that is killed right after it started a job starts it again, and then drains the node for that
        controller = int((self.slurm.directory / "run/slurmctld.pid").read_text())
        os.kill(controller, signal.SIGTERM)
        wait_until(lambda: is_gone(controller), 30)
        self.slurm.restart_controller()

    def preempt(self, task: str, job_id: str, node: str) -> None:
        self.slurm.submit("-p", "high", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")

    def _kill(self, program: str, words: str) -> None:
        """End one process of a program with these words on its command line, as `kill -9` does."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                line = (process / "cmdline").read_text(errors="replace")
                if Path(line.partition("\0")[0]).name.startswith(program) and words in line:
                    found.append(int(process.name))
        with suppress(ProcessLookupError, IndexError):
            os.kill(self.draw.choice(found), signal.SIGKILL)


KINDS = ("kill_step", "kill_rank", "kill_driver", "kill_srun", "requeue", "crash_node", "restart_controller", "preempt")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The same job on the same layout, two ranks, where nothing happens."""
    root = tmp_path_factory.mktemp("undisturbed") / "artifacts"
    run_pipeline("job=tiny", f"root={root}", "run.ranks=2", "run.threads=1", *SETTINGS)
    return root / "jobs/tiny"


@pytest.mark.parametrize("number", range(ROUNDS))
def test_a_job_under_random_faults_makes_what_an_undisturbed_one_makes(number, undisturbed, cluster, tmp_path):
    draw = random.Random(f"{SEED} {number}")
    plan = sorted(
        ((draw.choice(OFTEN), draw.choice(KINDS), draw.uniform(0.1, 1)) for _ in range(FAULTS_EACH_ROUND)),
        key=lambda fault: TASKS.index(fault[0]),
    )
    # of a new controller srun, where it is just about to begin, hears only after two minutes: too long for short tasks
    plan = [fault for fault in plan if fault[0] == "pretrain" or fault[1] != "restart_controller"]
    print(f"PIPELINE_CAMPAIGN_SEED={SEED}, round {number}:", *plan, sep="\n  ")
    job = Submitted(cluster, tmp_path / "artifacts")
    job.submit("run.partition=low", "run.nodes=2", "run.array=3", "run.preflight=false", *SETTINGS)
    Round(job, plan, draw).suffer()
    for task in TASKS:
        artifact = open_artifact(job.root / "jobs/tiny" / task)
        assert list(artifact.check(artifact.names, task)) == []
    for task in ("shard", "clean", "dedup", "train_tokenizer", "tokenize"):
        made, wanted = manifest(job.root / "jobs/tiny" / task), manifest(undisturbed / task)
        assert made["files"] == wanted["files"], task
        counted = {name: n for name, n in wanted["stats"].items() if isinstance(n, int)}
        assert {name: made["stats"].get(name) for name in counted} == counted, task
    weights = (job.root / "jobs/tiny/pretrain/model.safetensors").read_bytes()
    assert weights == (undisturbed / "pretrain/model.safetensors").read_bytes()
    assert losses(job.root / "jobs/tiny/pretrain") == losses(undisturbed / "pretrain")
    assert manifest(job.root / "jobs/tiny/pretrain")["made"]["ranks"] == 2


def is_gone(process: int) -> bool:
    """Whether a process has ended, though nobody may have asked for its status yet."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return True


class Round:
    """A submitted job while faults come over it."""

    def __init__(self, job: Submitted, plan: list[tuple[str, str, float]], draw: random.Random) -> None:
        self.job, self.draw, self.faults = job, draw, plan
        self.kinds, self.began = Faults(job, draw), time.monotonic()
        self.delayed: dict[str, float] = {}  # since when a requeued job has been held back
        self.next: tuple[str, float] | None = None  # the task that is to be hit, and when

    def suffer(self) -> None:
        """Let the faults come, each while its task runs; submit again what SLURM has given up, until all is made."""
        while True:
            assert time.monotonic() < self.began + ROUND_S, self.job.what_is_there()
            made = [task for task in TASKS if (self.job.root / "jobs/tiny" / task / "manifest.json").exists()]
            rows = self.rows()
            if all(row["state"] in OVER for row in rows):
                if len(made) == len(TASKS):
                    return
                ends = ", ".join(f"{row['task']} {row['id']} {row['state']} {row['reason']}" for row in rows)
                self.say(f"something has failed ({ends}): retried")
                self.job.command("retry", "tiny")
            self.shorten_delays({row["id"] for row in rows if row["reason"] == "BeginTime"})
            self.strike([row for row in rows if row["state"] == "RUNNING"], made)
            time.sleep(0.1)

    def shorten_delays(self, delayed: set[str]) -> None:
        """Let requeued jobs start after some seconds, not two minutes.

        Not at once: SLURM takes the last word of the killed start for that of the next, which has failed then.
        """
        self.delayed = {job_id: self.delayed.get(job_id, time.monotonic()) for job_id in delayed}
        for job_id, since in self.delayed.items():
            if time.monotonic() > since + DELAY_S:
                self.job.slurm.run("scontrol", "update", f"JobId={job_id}", "StartTime=now", check=False)

    def rows(self) -> list[dict[str, str]]:
        """What SLURM says of all elements of the job."""
        columns = ("id", "array", "task", "state", "reason", "nodes")
        lines = self.job.slurm.run("squeue", "-h", "-r", "-t", "all", "-o", "%i|%F|%j|%T|%r|%N").stdout.splitlines()
        ids = {task["slurm"] for task in self.job.tasks.values()}
        rows = [dict(zip(columns, line.split("|"), strict=True)) for line in lines]
        return [row | {"task": row["task"].partition(".")[2]} for row in rows if row["array"] in ids]

    def strike(self, running: list[dict[str, str]], made: list[str]) -> None:
        """Do the next fault whose task runs, at its moment; those of tasks that are made come too late."""
        self.faults = [fault for fault in self.faults if fault[0] not in made]
        hit = [row for row in running if any(row["task"] == task for task, _, _ in self.faults)]
        if not hit:
            self.next = None
            return
        row = self.draw.choice(hit)
        fault = next(fault for fault in self.faults if fault[0] == row["task"])
        if self.next is None or self.next[0] != fault[0]:
            self.next = fault[0], time.monotonic() + fault[2] * (TRAINING_S if fault[0] == "pretrain" else OTHERS_S)
        if time.monotonic() < self.next[1]:
            return
        node = self.draw.choice(self.job.slurm.run("scontrol", "show", "hostnames", row["nodes"]).stdout.split())
        self.say(f"{fault[1]}: {fault[0]}, SLURM job {row['id']} on {node}")
        self.faults.remove(fault)
        self.next = None
        getattr(self.kinds, fault[1])(fault[0], row["id"], node)

    def say(self, what: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f} s: {what}")
