"""A training as a job of SLURM that something happens to, and the same training undisturbed to compare it with."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from submitted import Submitted, wait_until
from support import MODEL_TASKS, run_pipeline

NAME = "pretrain"
OTHERS = [f"~tasks.{task}" for task in (*MODEL_TASKS, "report") if task != NAME]


class Training(Submitted):
    """The tiny job's pretraining, submitted to SLURM on tokens that are there already; `steps` of the optimizer."""

    def __init__(self, slurm: Any, root: Path, steps: int, *words: str, others: list[str] = OTHERS) -> None:
        super().__init__(slurm, root)
        self.steps = steps
        self.submit(*others, *of_steps(steps), *words)
        self.job, self.made = self.id(NAME), self.directory(NAME)

    @property
    def step(self) -> int:
        """The last step that was done."""
        rows = self.made / "metrics.jsonl"
        return (
            int(json.loads(rows.read_text().splitlines()[-1])["step"]) if rows.exists() and rows.stat().st_size else 0
        )

    @property
    def tries(self) -> int:
        """How often it was begun."""
        path = self.made / "work/attempt"
        return int(path.read_text()) if path.exists() else 0

    def wait_for_step(self, step: int, try_number: int = 1) -> None:
        """Return once a try has reached a step."""

        def is_there() -> bool:
            return self.tries == try_number and self.rank_runs() and self.step >= step

        wait_until(is_there, 120, self.what_is_there)

    def rank_runs(self) -> bool:
        """Whether the ranks of the newest try have begun to train: their hearts say of which they are."""
        try:
            beat = (self.made / "work/heartbeats/00000").read_text()
        except FileNotFoundError:
            return False
        return f'"attempt":{self.tries}' in beat.replace(" ", "")

    def again(self) -> None:
        """Skip the two minutes for which SLURM holds a job back that was queued again."""
        self.slurm.start_now(self.job)

    def wait_for_try(self, number: int) -> None:
        """Return once it was begun so often."""
        wait_until(lambda: self.tries >= number, 60, self.what_is_there)

    def finish(self) -> dict[str, str]:
        """Return what SLURM says of the job, once it has ended well and its artifact is proven."""
        self.wait(NAME)
        told = self.slurm.job(self.id(NAME))
        assert told["JobState"] == "COMPLETED", self.what_is_there()
        assert self.step == self.steps
        self.slurm.run(sys.executable, "-m", "pipeline", "verify", str(self.made))
        return dict(told)

    def is_running(self) -> bool:
        """Whether SLURM says that it runs, or is being ended."""
        return self.slurm.job(self.job)["JobState"] in ("RUNNING", "COMPLETING")

    def log(self) -> str:
        return (self.made / "logs/job.log").read_text()

    def rank_log(self) -> str:
        return (self.made / "logs/rank-00000.log").read_text()

    def kill(self, word: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to the processes of the job that have a word in their command."""
        found = processes(self.job, word)
        assert found, f"no '{word}' runs: {self.what_is_there()}"
        for process in found:
            os.kill(process, number)


def of_steps(steps: int) -> list[str]:
    return [f"tasks.{NAME}.steps={steps}", f"tasks.{NAME}.max_epochs=100"]


RANK, DRIVER = "rank.py", "\0task\0"


def processes(job: str, word: str) -> list[int]:
    """Return the ids of the Python processes in a SLURM job that have a word in their command."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words, variables = (place / "cmdline").read_bytes(), (place / "environ").read_bytes()
        except OSError:
            continue
        is_python = b"python" in words.partition(b"\0")[0]
        if is_python and word.encode() in words and f"SLURM_JOB_ID={job}\0".encode() in variables:
            found.append(int(place.name))
    return found


def only_process(job: str, word: str) -> int:
    """Return the id of the one process that is found so; what it forks looks like it for a moment."""
    found: list[int] = []

    def is_alone() -> bool:
        found[:] = processes(job, word)
        return len(found) == 1

    wait_until(is_alone, 60, lambda: f"{found}")
    return found[0]


def weights(directory: Path) -> dict[str, bytes]:
    """The bits of every tensor of a model."""
    from safetensors import safe_open

    with safe_open(directory / "model.safetensors", "numpy") as file:
        return {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118 (no mapping)


def undisturbed(new_root: Callable[[], Path], steps: int, ranks: int) -> Path:
    """The directory of the same training, run without SLURM and without any fault."""
    root = new_root()
    words = [*OTHERS, *of_steps(steps), f"run.ranks={ranks}", "run.threads=1", f"root={root}"]
    run_pipeline("job=tiny", *words)
    return (root / "jobs/tiny" / NAME).resolve()
