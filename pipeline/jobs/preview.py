"""What `run=slurm --plan` shows: the commands that would submit a job, what they ask for, and what would be refused."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from pipeline.artifact import MANIFEST
from pipeline.errors import ConfigError, LaunchError
from pipeline.execute import needed_bytes
from pipeline.jobs.batch import environment, needs_preflight, preflight_asks, preflight_words, task_words
from pipeline.jobs.record import JobRecord
from pipeline.jobs.refusals import Cluster, read_cluster, refusals, refuse_live, unseen
from pipeline.jobs.submit import fit_arrays, frozen_job
from pipeline.launch.claim import live_claim
from pipeline.launch.failures import gigabytes
from pipeline.launch.scheduler import NoSlurm
from pipeline.launch.slurm import Slurm, seconds_of
from pipeline.operate import print_plan
from pipeline.plan import Command, Task
from pipeline.progress import clock
from pipeline.worker import FrozenTask

TOKEN = "pipeline"  # a submission adds a number that no other has


def preview(tasks: list[Task], command: Command, job: str | None) -> None:
    """Print the plan of a job for SLURM; nothing is submitted, and nothing written.

    Without a SLURM that answers, it says what could not be looked at.

    Raises:
        ConfigError: With everything that would be refused.
    """
    assert isinstance(command.run, Slurm)
    root, unchecked = Path(command.root), ""
    problems: list[str] = []
    cluster: Cluster | None = None
    try:
        cluster = read_cluster()
        fit_arrays(tasks, cluster)
    except LaunchError as error:
        what = "SLURM is not on this machine" if isinstance(error, NoSlurm) else str(error)
        unchecked = f"not checked ({what}): partitions, nodes, accounts, arrays, and whether the job is under way"
    record, frozen = frozen_job(tasks, command, job)
    try:
        if cluster is not None:
            refuse_live(root, record.name)
    except LaunchError as error:
        problems.append(str(error))
    problems += refusals(root, frozen, cluster, command.run)
    print_plan(tasks, command)
    _print_commands(record, frozen, cluster)
    for line in filter(None, [*unseen(command.run), unchecked]):
        print(f"\n{line}")
    if problems:
        print("\nrefused would be:", flush=True)
        raise ConfigError(*problems)


def _print_commands(job: JobRecord, tasks: Sequence[FrozenTask], cluster: Cluster | None) -> None:
    preflights: dict[str, str] = {}  # the task that has it, by what it asks for
    made = {task.name for task in tasks if (Path(task.directory) / MANIFEST).exists()}
    if len(made) < len(tasks):
        said = [f"{name}={shlex.quote(value)}" for name, value in environment(tasks[0], job.code).items() if value]
        print("\nexport " + " ".join(said))
    for record, task in zip(job.tasks, tasks, strict=True):
        if task.name in made:
            continue
        claim = live_claim(Path(task.directory)) if cluster is not None else None
        if claim is not None:
            print(f"\n{task.name}: is made by SLURM job {claim.slurm} of {claim.job}, which is waited for")
            continue
        assert isinstance(task.run, Slurm)
        limit_s = cluster.limit_s(task.run) if cluster else None
        after = [f"<{name}>" for name in record.needs if name not in made]
        print(f"\n{task.name}: {_estimate(task, limit_s)}")
        if needs_preflight(task):
            first = preflights.setdefault(preflight_asks(task), task.name)
            after.append(f"<{first}.preflight>")
            if first == task.name:
                print(shlex.join(preflight_words(job, task, limit_s, TOKEN)))
        print(shlex.join(task_words(job, task, limit_s, after, TOKEN)))


def _estimate(task: FrozenTask, limit_s: int | None) -> str:
    """Say what a task needs, as far as that is known before it runs."""
    run = task.run
    assert isinstance(run, Slurm)
    limits = [limit for limit in (seconds_of(run.time or ""), limit_s) if limit is not None]
    time = f"jobs of {_duration(min(limits))} at the most" if limits else "the partition's default time"
    disk, is_known = needed_bytes(task)
    beside = "" if is_known else ", and what its inputs bring, which are not made yet"
    memory = "memory: not known before it runs"
    if task.memory_bytes is not None:
        memory = f"memory of a rank: {gigabytes(task.memory_bytes)} for the model's states, and the activations"
    return f"{time}; disk: {gigabytes(disk)}{beside}; {memory}"


def _duration(seconds: int) -> str:
    """Return a limit of time so that nobody takes minutes for hours."""
    return clock(seconds) if seconds >= 3600 else f"{-(-seconds // 60)} min"
