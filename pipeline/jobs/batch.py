"""What sbatch is told for each task of a job: its words, and the variables beside them."""

import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.code import PACKAGE
from pipeline.errors import LaunchError
from pipeline.jobs.record import JobRecord
from pipeline.launch.slurm import Slurm, is_array, sbatch_flags
from pipeline.worker import FrozenTask

SCRIPT = next((p for p in (PACKAGE / "slurm/stage.sbatch", PACKAGE.parent / "slurm/stage.sbatch") if p.is_file()), None)
PREFLIGHT_MINUTES = 10  # at the most: an import from a busy disk may take minutes


def task_words(job: JobRecord, task: FrozenTask, limit_s: int | None, after: Sequence[str], token: str) -> list[str]:
    """Return the command that submits a task.

    Args:
        limit_s: Longest job that the partition takes, in seconds; null where it takes any.
        after: Ids of the SLURM jobs that have to end well before.
        token: A comment that no other job has.
    """
    log = "job-%5a.log" if is_array(_run(task), task.stage) else "job.log"
    dependency = [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []
    flags = [*dependency, *sbatch_flags(_run(task), task.stage, limit_s)]
    return _words(job, task, f"{job.name}.{task.name}", log, token, flags)


def needs_preflight(task: FrozenTask) -> bool:
    """Return whether the nodes of a task are tried first: those of a training on several."""
    run = _run(task)
    return run.preflight and task.stage.ranks == "group" and run.nodes > 1


def preflight_asks(task: FrozenTask) -> str:
    """Return what a preflight depends on: tasks of which this is the same need only one."""
    return task.run.model_dump_json(exclude={"time", "checkpoints", "parallel"})


def preflight_words(job: JobRecord, task: FrozenTask, limit_s: int | None, token: str) -> list[str]:
    """Return the command that submits the job that tries the nodes of a task."""
    brief = _run(task).model_copy(update={"time": str(PREFLIGHT_MINUTES)})
    flags = sbatch_flags(brief, task.stage, limit_s)
    return _words(job, task, f"{job.name}.{task.name}.preflight", "preflight.log", token, flags, "preflight")


def _words(
    job: JobRecord, task: FrozenTask, name: str, log: str, token: str, flags: Sequence[str], command: str = "task"
) -> list[str]:
    directory = str(Path(task.directory).absolute())
    return [
        "sbatch",
        "--parsable",
        f"--job-name={name}",
        f"--comment={token}",
        f"--output={directory.replace('%', '%%')}/logs/{log}",
        f"--chdir={job.directory}",
        "--open-mode=append",
        "--requeue",
        "--export=ALL",
        *flags,
        str(script()),
        command,
        directory,
    ]


def environment(task: FrozenTask, code: str | None) -> dict[str, str]:
    """Return the variables that tell slurm/stage.sbatch how to begin.

    Args:
        code: The directory of the code as it is at submission.
    """
    run = _run(task)
    python = run.python or ("python" if run.setup else sys.executable)
    return {"PIPELINE_SETUP": "\n".join(run.setup), "PIPELINE_PYTHON": python, "PIPELINE_CODE": code or ""}


def script() -> Path:
    """Return slurm/stage.sbatch. Raises LaunchError if this installation has none."""
    if SCRIPT is None:
        raise LaunchError(f"{PACKAGE}: there is no slurm/stage.sbatch beside it; install the package again")
    return SCRIPT


def _run(task: FrozenTask) -> Slurm:
    assert isinstance(task.run, Slurm)
    return task.run
