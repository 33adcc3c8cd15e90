"""One submitted task inside of its SLURM job, as slurm/stage.sbatch runs it: `python -m pipeline task DIR`.

When it ends without an end - told to stop, its time over, a machine lost - it lets SLURM begin the same job again.
"""

import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pipeline.artifact import MANIFEST, WORK, open_artifact
from pipeline.env import Share, StopRequest
from pipeline.errors import ConfigError, LaunchError, Lost, PipelineError, Preempted
from pipeline.execute import link
from pipeline.launch import scheduler
from pipeline.launch.lock import slurm_job
from pipeline.launch.output import tail
from pipeline.launch.slurm import Slurm
from pipeline.perform import perform, wanted
from pipeline.plan import stage_of
from pipeline.progress import tell
from pipeline.worker import FrozenTask, read_task

OF_THE_CLUSTER = ("TimeLimit", "NodeDown")  # why SLURM ends a job that nobody has cancelled
PATIENCE_S = 600.0  # of a job that has come to its end without a controller to ask
PAUSE_S = 5.0
SEEN_S = 60.0  # until a manifest shows: a network's disk may remember for so long that it was not there


def run_task(arguments: Sequence[str], stop: StopRequest) -> int:
    """Run the task frozen in a directory; return the exit status.

    Raises:
        ConfigError: If that is not one directory, or this is no SLURM job.
        PipelineError: Why the task failed.
    """
    if len(arguments) != 1 or "SLURM_JOB_ID" not in os.environ:
        raise ConfigError("task: wanted one directory of a submitted task, in a job of SLURM; run=slurm submits one")
    directory = Path(arguments[0])
    task = read_task(directory / WORK / "task.json")
    comeback = Comeback()
    stop.hand_on = lambda: threading.Thread(target=comeback.secure, daemon=True).start()
    try:
        _await_inputs(task, stop)
        fitted, share = _fit(task)
        perform(fitted, share, stop, anew=False)
    except (Lost, Preempted) as error:
        tell(f"{task.name}: {error}", sys.stderr)
        return comeback.arrange(error)
    if (directory / MANIFEST).exists():
        for job, name in wanted(directory):
            link(directory.parent.parent, job, name, directory)
    return 0


def _await_inputs(task: FrozenTask, stop: StopRequest) -> None:
    """Return once this node sees what the tasks before have made, or does not see it for too long."""
    deadline = time.monotonic() + SEEN_S
    while not all((Path(path) / MANIFEST).exists() for path in task.inputs.values()):
        if stop or time.monotonic() > deadline or (Path(task.directory) / MANIFEST).exists():
            return
        time.sleep(1)


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
    problems: list[tuple[str, str]] = []
    for fewer in range(nodes, (run.elastic or run.nodes) - 1, -1):
        if not (problems := list(task.stage.check(upstream, run.on(fewer)))):
            tell(f"{task.name}: on {fewer} node{'s' if fewer > 1 else ''} instead of {run.nodes} (run.elastic)")
            return run.on(fewer)
    why = "".join(f" ({problem})" for _, problem in problems[-1:])
    raise LaunchError(f"{task.name}: cannot be spread over {nodes} nodes or fewer{why}; see run.elastic and run.nodes")


def begin_again(error: PipelineError) -> int:
    """Let the job that runs a command by hand begin again, where that may help; return its exit status."""
    return Comeback().arrange(error) if isinstance(error, Lost | Preempted) else error.exit_status


class Comeback:
    """Lets the SLURM job that this process is in begin again, with the same id; never one that was cancelled.

    While SLURM ends a job all look alike: COMPLETING. One that it will begin again by itself (preempted, requeued by
    an administrator, a node lost) already counts one start more; of one whose time is over, or that lost a node, it
    says so; the others were cancelled.
    """

    def __init__(self) -> None:
        self._job = slurm_job() or ""
        self._lock, self._arranged = threading.Lock(), False

    def secure(self) -> None:
        """See to it already now where SLURM has begun to end this job: it will not leave the time for it later."""
        with self._lock:
            try:
                told = scheduler.show(self._job)
            except LaunchError:
                return
            if told["JobState"] != "RUNNING" and not self._arranged and not self._is_cancelled(told):
                with suppress(LaunchError):  # it is tried again at the end
                    self._begin(told)

    def arrange(self, error: PipelineError) -> int:
        """Let the job begin again; return its exit status now."""
        with self._lock:
            try:
                if not self._arranged:
                    told = self._ask()
                    if self._is_cancelled(told):
                        tell("this job was cancelled")
                        return error.exit_status
                    self._begin(told)
            except LaunchError as problem:
                tell(
                    f"this job cannot be begun again ({problem}); its state is saved: `python -m pipeline retry` "
                    "submits it",
                    sys.stderr,
                )
                return error.exit_status
        return Preempted.exit_status

    def _ask(self) -> dict[str, str]:
        """Return what SLURM says of this job, when it answers again."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return scheduler.show(self._job)
            except LaunchError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(PAUSE_S)

    def _begin(self, told: Mapping[str, str]) -> None:
        if not _comes_by_itself(told):
            try:
                scheduler.requeue(self._job)
            except LaunchError:
                if not _comes_by_itself(self._ask()):
                    raise
        self._arranged = True
        tell("SLURM begins this job again")

    def _is_cancelled(self, told: Mapping[str, str]) -> bool:
        if told["JobState"] == "RUNNING" or _comes_by_itself(told) or told["Reason"] in OF_THE_CLUSTER:
            return False
        return not _was_preempted()


def _comes_by_itself(told: Mapping[str, str]) -> bool:
    return int(told["Restarts"]) > int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _was_preempted() -> bool:
    """Return whether SLURM wrote into the log of a job that it ends for others (PreemptMode=CANCEL) that it did so."""
    last = tail(Path("/proc/self/fd/2")).rpartition("*** JOB ")[2].partition("\n")[0]
    return "DUE TO PREEMPTION" in last and last.startswith(os.environ["SLURM_JOB_ID"] + " ")
