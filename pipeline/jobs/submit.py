"""Submits a planned job to SLURM: freezes the tasks and the code, and leaves one job of SLURM for each task."""

import os
import signal
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pipeline.artifact import MANIFEST, WORK, atomic
from pipeline.code import code_place, keep_code
from pipeline.env import STOP_SIGNALS, StopRequest
from pipeline.errors import ArtifactError, ConfigError, LaunchError
from pipeline.execute import begin, check_disk, freeze, link
from pipeline.jobs.batch import environment, needs_preflight, preflight_asks, preflight_words, task_words
from pipeline.jobs.record import FROZEN, RECORD, JobRecord, TaskRecord, beginning, new_record, read_record, write_record
from pipeline.jobs.refusals import Cluster, bounded, read_cluster, refusals, refuse_live, refuse_working, unseen
from pipeline.jobs.sharing import deciding, unwant, who_else_wants
from pipeline.jobs.words import say
from pipeline.launch import scheduler
from pipeline.launch.claim import Claim, forget_claim, live_claim, write_claim
from pipeline.launch.slurm import Slurm, is_array
from pipeline.launch.tries import forget_tries
from pipeline.operate import print_submitted
from pipeline.perform import want, wanted
from pipeline.plan import Command, Task
from pipeline.preflight import RESULT
from pipeline.worker import FrozenTask, commit


def submit(tasks: list[Task], command: Command, job: str | None) -> None:
    """Submit what is not done and is not being made already; all of it or, where SLURM refuses a task, nothing.

    Raises:
        ConfigError: With everything that the cluster would refuse.
        LaunchError: If a job of this name is running, a task cannot be submitted, or there is no SLURM here.
        ArtifactError: If there is not room for an output.
    """
    assert isinstance(command.run, Slurm)
    root, cluster = Path(command.root), read_cluster()
    fit_arrays(tasks, cluster)
    record, frozen = frozen_job(tasks, command, job)
    for line in unseen(command.run):
        print(line, flush=True)
    print_submitted(root, submit_frozen(root, record, frozen, cluster, command.run), frozen)


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
        Preempted: If a signal asked for a stop; nothing stays submitted.
    """
    cluster = cluster or read_cluster()
    _refuse(root, planned, tasks, cluster, said)
    if planned.code and not Path(planned.code).exists():
        keep_code(Path(planned.code))
    with StopRequest().listening(*STOP_SIGNALS, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT) as stop:
        with beginning(root, planned.name):
            refuse_live(root, planned.name)
            submission = Submission(root, planned, tasks, cluster, stop)
            submission.begin()
        stop.hand_on = say_stop
        try:
            for task in tasks:
                submission.add(task)
            submission.check_stop()
        except BaseException as error:
            submission.undo(error)
            raise
        return submission.end()


def _refuse(root: Path, planned: JobRecord, tasks: Sequence[FrozenTask], cluster: Cluster, said: Slurm | None) -> None:
    """Raise what `submit_frozen` raises for a job that cannot be submitted now."""
    refuse_live(root, planned.name)
    refuse_working(tasks)
    if problems := refusals(root, tasks, cluster, said):
        raise ConfigError(*problems)
    for task in tasks:
        if not (Path(task.directory) / MANIFEST).exists():
            check_disk(task, root)


def say_stop() -> None:
    """Say that a signal was heard, though SLURM has to answer first; within a signal handler nothing may be printed."""
    os.write(2, b"waits for the answer of SLURM, then takes back what was submitted\n")


def _is_recorded(root: Path, record: JobRecord) -> bool:
    """Return whether the job was started before with these very tasks: what is known of that is not to be lost."""
    try:
        old = read_record(root, record.name)
    except ArtifactError:
        return False
    return [task.directory for task in old.tasks] == [task.directory for task in record.tasks]


class Submission:
    """A job while its tasks are submitted, one after another in an order in which they can run.

    Its record is there from the beginning, and names this process, so that other jobs see what this one waits for.
    """

    def __init__(
        self, root: Path, planned: JobRecord, tasks: Sequence[FrozenTask], cluster: Cluster, stop: StopRequest
    ) -> None:
        self.root, self.tasks, self.cluster, self.stop = root, tasks, cluster, stop
        self.planned = planned.model_copy(update={"host": None, "pid": None})
        arrays = {task.name for task in tasks if isinstance(task.run, Slurm) and is_array(task.run, task.stage)}
        self._records = {
            record.name: record.model_copy(update={"is_array": record.name in arrays}) for record in planned.tasks
        }
        self._begun: list[Path] = []  # directories, of which this job has submitted or was about to submit a SLURM job
        self._marked: list[Path] = []  # directories that have not had a mark of this job before
        self._preflights: dict[str, str] = {}  # id of the SLURM job that tries nodes, by what it asks for
        self._places = [root / "jobs" / planned.name / name for name in (FROZEN, RECORD)]
        self._recorded = _is_recorded(root, planned)
        self._before = [path.read_bytes() if path.exists() else None for path in self._places]

    def begin(self) -> None:
        """Let others see that this job is being submitted."""
        if all((Path(task.directory) / MANIFEST).exists() for task in self.tasks):
            return
        try:
            self._write({"host": socket.gethostname(), "pid": os.getpid()})
        except BaseException:
            self._restore()
            raise

    def end(self) -> JobRecord:
        """Return the record of what was submitted, and leave it: where nothing was, that of an earlier time."""
        if any(task.slurm for task in self._records.values()) or not self._recorded:
            return self._write({})
        self._restore()
        return self.planned

    def check_stop(self) -> None:
        """Raise Preempted if a signal asked for a stop."""
        if self.stop:
            raise self.stop.error(f"{self.planned.name}: nothing was submitted")

    def add(self, task: FrozenTask) -> None:
        """Submit a task, unless it is done or another job has submitted it."""
        self.check_stop()
        directory, record = Path(task.directory), self._records[task.name]
        if (directory / MANIFEST).exists():
            link(self.root, self.planned.name, task.name, directory)
            return
        with deciding(directory) as lock:
            if (self.planned.name, task.name) not in wanted(directory):
                self._marked.append(directory)
            claim = live_claim(directory)
            record = self._submit(task, record, lock) if claim is None else self._share(directory, record, claim)
            self._records[task.name] = record
            self._write({"host": socket.gethostname(), "pid": os.getpid()})  # before anybody else may decide

    def _write(self, submitter: dict[str, Any]) -> JobRecord:
        record = self.planned.model_copy(update={"tasks": list(self._records.values()), **submitter})
        write_record(self.root, record, self.tasks)
        return record

    def _restore(self) -> None:
        """Leave the record as it was before."""
        for path, content in zip(self._places, self._before, strict=True):
            if content is None:
                path.unlink(missing_ok=True)
            else:
                with atomic(path) as temporary:
                    temporary.write_bytes(content)

    def _share(self, directory: Path, record: TaskRecord, claim: Claim) -> TaskRecord:
        """Let this job wait for what a SLURM job makes that was submitted already."""
        want(directory, self.planned.name, record.name)
        write_claim(directory, claim.job, claim.slurm, claim.token)  # whose answer may have been lost
        if (directory / MANIFEST).exists():  # it has just ended, and has led to it whoever wanted it till then
            link(self.root, self.planned.name, record.name, directory)
        other = None if claim.job == self.planned.name else claim.job  # itself, before it was cancelled
        return record.model_copy(update={"slurm": claim.slurm, "shared_with": other})

    def undo(self, error: BaseException) -> None:
        """Leave nothing submitted and nothing claimed, but for what other jobs have begun to wait for.

        Raises:
            LaunchError: If SLURM does not let it, with `error` and the way out; then the record stays.
        """
        kept = set()
        try:
            for directory in reversed(self._begun):
                with deciding(directory):
                    if not self._take_back(directory):
                        kept.add(str(directory.absolute()))
            needed = {record.preflight for record in self._records.values() if record.directory in kept}
            scheduler.cancel(sorted({*self._preflights.values()} - needed))
            for directory in self._marked:
                unwant(directory, self.planned.name)
        except LaunchError as problem:
            raise LaunchError(
                f"{error}; what was submitted before could not be cancelled ({problem}); later: "
                f"{say(f'cancel {self.planned.name}', self.root)}"
            ) from None
        self._restore()

    def _take_back(self, directory: Path) -> bool:
        """Cancel what was submitted for a task; false if another job wants it by now."""
        claim = live_claim(directory)
        if claim is not None and claim.job == self.planned.name and claim.slurm is not None:
            if who_else_wants(self.root, self.planned.name, directory, claim.slurm):
                return False
            scheduler.cancel([claim.slurm])
        if claim is None or claim.job == self.planned.name:
            forget_claim(directory)
        return True

    def _submit(self, task: FrozenTask, record: TaskRecord, lock: int) -> TaskRecord:
        directory = Path(task.directory)
        if not begin(task):  # somebody has just made it without SLURM
            link(self.root, self.planned.name, task.name, directory)
            return record
        forget_tries(directory)
        (directory / "logs").mkdir(exist_ok=True)
        after = [other for name in record.needs if (other := self._records[name].slurm) is not None]
        preflight = self._try_nodes(task, lock) if needs_preflight(task) else None
        after += [preflight] if preflight else []
        assert isinstance(task.run, Slurm)
        token, limit_s = scheduler.new_token(), self.cluster.limit_s(task.run)
        self._begun.append(directory)
        write_claim(directory, self.planned.name, None, token)
        slurm = self._sbatch(task, task_words(self.planned, task, limit_s, after, token), token, lock)
        write_claim(directory, self.planned.name, slurm, token)
        return record.model_copy(update={"slurm": slurm, "preflight": preflight})

    def _try_nodes(self, task: FrozenTask, lock: int) -> str:
        """Return the SLURM job that tries the nodes of a task: one for all tasks that ask for the same."""
        assert isinstance(task.run, Slurm)
        (Path(task.directory) / WORK / RESULT).unlink(missing_ok=True)
        token, limit_s = scheduler.new_token(), self.cluster.limit_s(task.run)
        asked = preflight_asks(task)
        if asked not in self._preflights:
            words = preflight_words(self.planned, task, limit_s, token)
            self._preflights[asked] = self._sbatch(task, words, token, lock)
        return self._preflights[asked]

    def _sbatch(self, task: FrozenTask, words: list[str], token: str, lock: int) -> str:
        return scheduler.submit(words, environment(task, self.planned.code), token, [lock], self.check_stop)
