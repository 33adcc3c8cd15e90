"""A job that a test submits to a real SLURM, and what it leaves: its record, its directories, its artifacts."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import run_pipeline

OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
PAUSE_S = 0.2
SHORTER = (  # the tiny job from raw text to report, without three tasks that mostly import torch once more
    *(f"~tasks.{task}" for task in ("finetune", "evaluate", "generate")),
    "tasks.report.tasks={shard: '@shard', tokenize: '@tokenize', pretrain: '@pretrain', export: '@export'}",
)


class Submitted:
    """A job under its name in `root`; `slurm` is the cluster of the fixture."""

    def __init__(self, slurm: Any, root: Path, name: str = "tiny") -> None:
        self.slurm, self.root, self.name = slurm, root, name

    def submit(self, *words: object) -> str:
        """Run `job=NAME run=slurm` with more words, and return what it printed."""
        words = (f"job={self.name}", "run=slurm", "run.threads=1", *words, f"root={self.root}")
        return run_pipeline(*words, SLURM_CONF=self.slurm.env["SLURM_CONF"]).stdout

    def command(self, *words: str) -> str:
        """Run another command, such as `retry`, to its good end, and return what it printed."""
        done = self.slurm.run(sys.executable, "-m", "pipeline", *words, f"root={self.root}")
        return str(done.stdout)

    @property
    def tasks(self) -> dict[str, dict[str, Any]]:
        """What job.json says of each task."""
        record = json.loads((self.root / "jobs" / self.name / "job.json").read_text())
        return {task["name"]: task for task in record["tasks"]}

    def id(self, task: str) -> str:
        """The id of a task's SLURM job."""
        return str(self.tasks[task]["slurm"])

    def directory(self, task: str) -> Path:
        return Path(self.tasks[task]["directory"])

    def manifest(self, task: str) -> dict[str, Any]:
        return manifest(self.directory(task))

    def elements(self, task: str) -> list[dict[str, str]]:
        """What SLURM says of a task's job, or of each element of its array."""
        lines = self.slurm.run("scontrol", "-o", "show", "job", self.id(task)).stdout.splitlines()
        return [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]

    def states(self, task: str) -> list[str]:
        return sorted(element["JobState"] for element in self.elements(task))

    def wait(self, *tasks: str, timeout_s: float = 240) -> None:
        """Return when SLURM has nothing more to do for these tasks, or for all."""
        names = tasks or [name for name, task in self.tasks.items() if task["slurm"]]

        def is_over() -> bool:
            return all(state in OVER for name in names for state in self.states(name))

        wait_until(is_over, timeout_s, self.what_is_there)

    def what_is_there(self) -> str:
        """The queue and the ends of the logs, for the message of a test that fails."""
        queue = self.slurm.run("squeue", "-r", "-t", "all", "-o", "%i %j %T %r %N").stdout
        logs = sorted((self.root / "jobs" / self.name).glob("*/logs/*.log"))
        ends = [f"{log}:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-5:]) for log in logs]
        return "\n".join([queue, *ends])


def wait_until(is_so: Callable[[], bool], timeout_s: float, describe: Callable[[], str] = str) -> None:
    """Return once it is so; AssertionError with a description if it is not in time."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {describe()}"
        time.sleep(PAUSE_S)


def manifest(directory: Path) -> dict[str, Any]:
    """The manifest of an artifact."""
    found: dict[str, Any] = json.loads((directory / "manifest.json").read_text())
    return found


def losses(directory: Path) -> list[float]:
    """The loss of every step of a training."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]
