"""Submits a planned job to SLURM: freezes the tasks and the code, and leaves one job of SLURM for each task."""

import sys
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from pipeline.artifact import MANIFEST, WORK
from pipeline.errors import ArtifactError, ConfigError, LaunchError
from pipeline.execute import begin, check_disk, freeze, link
from pipeline.jobs.batch import (
    code_place,
    environment,
    keep_code,
    needs_preflight,
    preflight_asks,
    preflight_words,
    task_words,
)
from pipeline.jobs.record import JobRecord, TaskRecord, new_record, read_record, write_record
from pipeline.jobs.refusals import Cluster, bounded, read_cluster, refusals, refuse_live, refuse_working
from pipeline.jobs.sharing import deciding, unwant
from pipeline.launch import scheduler
from pipeline.launch.claim import Claim, forget_claim, live_claim, write_claim
from pipeline.launch.lock import forget_tries
from pipeline.launch.slurm import Slurm
from pipeline.operate import print_submitted
from pipeline.perform import want
from pipeline.plan import Command, Task
from pipeline.preflight import RESULT
from pipeline.worker import FrozenTask, commit


def submit(tasks: list[Task], command: Command, job: str | None) -> JobRecord:
    """Submit what is not done and is not being made already; all of it or, where SLURM refuses a task, nothing.

    Raises:
        ConfigError: With everything that the cluster would refuse.
        LaunchError: If a job of this name is running, a task cannot be submitted, or there is no SLURM here.
        ArtifactError: If there is not room for an output.
    """
    root, cluster = Path(command.root), read_cluster()
    fit_arrays(tasks, cluster)
    record, frozen = frozen_job(tasks, command, job)
    assert isinstance(command.run, Slurm)
    return submit_frozen(root, record, frozen, cluster, command.run)


def frozen_job(tasks: list[Task], command: Command, job: str | None) -> tuple[JobRecord, list[FrozenTask]]:
    """Return the record of a job that nobody has submitted, and its frozen tasks; nothing is written."""
    name = job or tasks[0].name
    frozen = [freeze(task, command, name, task.run) for task in tasks]
    records = [TaskRecord.of(task, task.run) for task in tasks]
    return new_record(name, "slurm", records, commit(), str(code_place(Path(command.root)))), frozen


def fit_arrays(tasks: Iterable[Task], cluster: Cluster) -> None:
    """Let no array be longer than the cluster allows, and say where one would have been."""
    for task in tasks:
        run = task.run
        if isinstance(run, Slurm) and task.stage.ranks == "units" and task.done is None:
            task.run = bounded(run, cluster)
            if task.run.ranks < run.ranks:
                print(
                    f"{task.name}: an array of {task.run.ranks} instead of run.array={run.ranks}: this cluster's "
                    "MaxArraySize allows no longer one",
                    flush=True,
                )


def submit_frozen(
    root: Path,
    planned: JobRecord,
    tasks: Sequence[FrozenTask],
    cluster: Cluster | None = None,
    said: Slurm | None = None,
) -> JobRecord:
    """Submit what is not done of frozen tasks; return the record with the SLURM jobs that make them.

    Args:
        planned: The record of the job, of tasks that wait for nothing yet.
        said: The settings as the command line said them, for messages.

    Raises:
        ConfigError, LaunchError, ArtifactError: As `submit`.
    """
    cluster = cluster or read_cluster()
    refuse_live(root, planned.name)
    refuse_working(tasks)
    if problems := refusals(root, tasks, cluster, said):
        raise ConfigError(*problems)
    for task in tasks:
        if not (Path(task.directory) / MANIFEST).exists():
            check_disk(task, root)
    if planned.code == str(code_place(root)):
        keep_code(root)
    submission = Submission(root, planned, cluster)
    try:
        for task, alone in zip(tasks, planned.tasks, strict=True):
            submission.add(task, alone)
    except BaseException:
        submission.undo()
        raise
    record = submission.record()
    if any(task.slurm for task in record.tasks) or not _is_recorded(root, record):
        write_record(root, record, tasks)
    print_submitted(root, record, tasks)
    return record


def _is_recorded(root: Path, record: JobRecord) -> bool:
    """Return whether the job was started before with these very tasks: what is known of that is not to be lost."""
    try:
        old = read_record(root, record.name)
    except ArtifactError:
        return False
    return [task.directory for task in old.tasks] == [task.directory for task in record.tasks]


class Submission:
    """A job while its tasks are submitted, one after another in an order in which they can run."""

    def __init__(self, root: Path, planned: JobRecord, cluster: Cluster) -> None:
        self.root, self.planned, self.cluster = root, planned, cluster
        self._records: dict[str, TaskRecord] = {}
        self._submitted: list[str] = []  # ids
        self._begun: list[Path] = []  # directories
        self._preflights: dict[str, str] = {}  # id of the SLURM job that tries nodes, by what it asks for

    def record(self) -> JobRecord:
        """Return the record of what was submitted."""
        return self.planned.model_copy(update={"tasks": list(self._records.values())})

    def add(self, task: FrozenTask, record: TaskRecord) -> None:
        """Submit a task, unless it is done or another job has submitted it."""
        directory = Path(task.directory)
        record = record.model_copy(update={"is_array": task.stage.ranks == "units"})
        if (directory / MANIFEST).exists():
            link(self.root, self.planned.name, task.name, directory)
        else:
            with deciding(directory):
                claim = live_claim(directory)
                record = self._submit(task, record) if claim is None else self._share(directory, record, claim)
        self._records[task.name] = record

    def _share(self, directory: Path, record: TaskRecord, claim: Claim) -> TaskRecord:
        """Let this job wait for what a SLURM job makes that was submitted already."""
        want(directory, self.planned.name, record.name)
        if (directory / MANIFEST).exists():  # it has just ended, and has led to it whoever wanted it till then
            link(self.root, self.planned.name, record.name, directory)
        other = None if claim.job == self.planned.name else claim.job  # itself, before it was cancelled
        return record.model_copy(update={"slurm": claim.slurm, "shared_with": other})

    def undo(self) -> None:
        """Leave nothing submitted, and nothing claimed."""
        try:
            scheduler.cancel(self._submitted)
        except LaunchError as error:
            left = " ".join(self._submitted)
            print(f"what was submitted could not be cancelled ({error}); later: scancel {left}", file=sys.stderr)
            return
        for directory in self._begun:
            forget_claim(directory)
            unwant(directory, self.planned.name)

    def _submit(self, task: FrozenTask, record: TaskRecord) -> TaskRecord:
        directory = Path(task.directory)
        if not begin(task):  # somebody has just made it without SLURM
            link(self.root, self.planned.name, task.name, directory)
            return record
        self._begun.append(directory)
        forget_tries(directory)
        (directory / "logs").mkdir(exist_ok=True)
        after = [other for name in record.needs if (other := self._records[name].slurm) is not None]
        preflight = self._try_nodes(task) if needs_preflight(task) else None
        after += [preflight] if preflight else []
        assert isinstance(task.run, Slurm)
        limit_s = self.cluster.limit_s(task.run)
        slurm = self._sbatch(task, lambda token: task_words(self.planned, task, limit_s, after, token))
        write_claim(directory, self.planned.name, slurm)
        return record.model_copy(update={"slurm": slurm, "preflight": preflight})

    def _try_nodes(self, task: FrozenTask) -> str:
        """Return the SLURM job that tries the nodes of a task: one for all tasks that ask for the same."""
        assert isinstance(task.run, Slurm)
        (Path(task.directory) / WORK / RESULT).unlink(missing_ok=True)
        limit_s = self.cluster.limit_s(task.run)
        asked = preflight_asks(task)
        if asked not in self._preflights:
            self._preflights[asked] = self._sbatch(
                task, lambda token: preflight_words(self.planned, task, limit_s, token)
            )
        return self._preflights[asked]

    def _sbatch(self, task: FrozenTask, words: Callable[[str], list[str]]) -> str:
        token = f"pipeline {uuid.uuid4().hex}"
        slurm = scheduler.submit(words(token), environment(task, self.planned.code), token)
        self._submitted.append(slurm)
        return slurm
