"""One submitted task inside of its SLURM job, as slurm/stage.sbatch runs it: `python -m pipeline task DIR`.

When it ends without an end - told to stop, its time over, a machine lost - it lets SLURM begin the same job again.
"""

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.artifact import MANIFEST, WORK, open_artifact
from pipeline.env import STOP_SIGNALS, Share, StopRequest
from pipeline.errors import ConfigError, LaunchError, Lost, PipelineError, Preempted
from pipeline.execute import link
from pipeline.launch import scheduler
from pipeline.launch.lock import slurm_job
from pipeline.launch.slurm import Slurm
from pipeline.perform import perform, wanted
from pipeline.plan import stage_of
from pipeline.worker import FrozenTask, read_task

UNDER_WAY = ("RUNNING", "COMPLETING", "PREEMPTED", "PENDING")  # states of a job that nobody has cancelled
PATIENCE_S = 120.0  # until SLURM ends a job that was requeued


def run_task(arguments: Sequence[str]) -> int:
    """Run the task frozen in a directory; return the exit status.

    Raises:
        ConfigError: If that is not one directory, or this is no SLURM job.
        PipelineError: Why the task failed.
    """
    if len(arguments) != 1 or "SLURM_JOB_ID" not in os.environ:
        raise ConfigError("task: wanted one directory of a submitted task, in a job of SLURM; run=slurm submits one")
    directory = Path(arguments[0])
    with StopRequest().listening(*STOP_SIGNALS) as stop:
        task = read_task(directory / WORK / "task.json")
        try:
            fitted, share = _fit(task)
            perform(fitted, share, stop)
        except (Lost, Preempted) as error:
            print(f"{task.name}: {error}", file=sys.stderr, flush=True)
            return _begin_again(error)
    if (directory / MANIFEST).exists():
        for job, name in wanted(directory):
            link(directory.parent.parent, job, name, directory)
    return 0


def _fit(task: FrozenTask) -> tuple[FrozenTask, Share]:
    """Return the task for the nodes that this job has, and the ranks that it runs of it."""
    run = task.run
    if not isinstance(run, Slurm):
        raise ConfigError(f"{task.directory}: was frozen for run={run.kind}; run=slurm submits it")
    if task.stage.ranks == "units" and "SLURM_ARRAY_TASK_ID" in os.environ:
        return task, Share(world=run.ranks, first=int(os.environ["SLURM_ARRAY_TASK_ID"]), count=1)
    if task.stage.ranks == "group" and (nodes := int(os.environ["SLURM_JOB_NUM_NODES"])) < run.nodes:
        run = _shrink(task, run, nodes)
        task = task.model_copy(update={"run": run})
    return task, Share(world=run.ranks, first=0, count=run.ranks)


def _shrink(task: FrozenTask, run: Slurm, nodes: int) -> Slurm:
    """Return the settings for the most of the nodes that the task can use.

    Raises:
        LaunchError: If it can use none.
    """
    upstream = {name: stage_of(open_artifact(Path(path))) for name, path in task.inputs.items()}
    for fewer in range(nodes, (run.elastic or run.nodes) - 1, -1):
        if not list(task.stage.check(upstream, run.on(fewer))):
            print(f"{task.name}: on {fewer} nodes instead of {run.nodes} (run.elastic)", flush=True)
            return run.on(fewer)
    raise LaunchError(f"{task.name}: cannot be spread over {nodes} nodes or fewer; see run.elastic and run.nodes")


def _begin_again(error: PipelineError) -> int:
    """Let SLURM begin this job again, unless somebody has cancelled it; return the exit status otherwise."""
    job = slurm_job()
    assert job is not None
    try:
        if scheduler.show(job)["JobState"] not in UNDER_WAY:
            return error.exit_status
        scheduler.requeue(job)
    except LaunchError as problem:
        print(f"this job cannot be begun again ({problem}); `python -m pipeline retry` submits it", file=sys.stderr)
        return error.exit_status
    print("SLURM begins this job again", flush=True)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(PATIENCE_S)
    return Preempted.exit_status
