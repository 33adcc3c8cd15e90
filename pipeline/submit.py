"""Submits a planned job to SLURM: freezes the tasks and the code, and leaves one job of SLURM for each task."""

import hashlib
import os
import shutil
import sys
import uuid
from pathlib import Path

from pipeline.errors import ArtifactError, LaunchError
from pipeline.execute import check_disk, freeze, link
from pipeline.launch import scheduler
from pipeline.launch.claim import live_claim, write_claim
from pipeline.launch.local import PACKAGE
from pipeline.launch.lock import forget_tries
from pipeline.launch.slurm import Slurm, sbatch_flags
from pipeline.operate import print_submitted
from pipeline.perform import want
from pipeline.plan import Command, Task
from pipeline.record import JobRecord, TaskRecord, new_record, read_record, write_record
from pipeline.worker import commit

SCRIPT = next((p for p in (PACKAGE / "slurm/stage.sbatch", PACKAGE.parent / "slurm/stage.sbatch") if p.is_file()), None)
NOT_CODE = shutil.ignore_patterns("__pycache__", "conf", "slurm")


def submit(tasks: list[Task], command: Command, job: str | None) -> JobRecord:
    """Submit what is not done and is not being made already; all of it or, where SLURM refuses a task, nothing.

    Raises:
        LaunchError: If a job of this name is running, a task cannot be submitted, or there is no SLURM here.
        ArtifactError: If there is not room for an output.
    """
    root, name = Path(command.root), job or tasks[0].name
    live = live_jobs(root, name)
    if live:
        raise LaunchError(
            f"{name}: a job of this name is under way (SLURM job {', '.join(live)}); wait for it "
            f"(python -m pipeline status {name}), or end it (python -m pipeline cancel {name})"
        )
    submission = Submission(root, name, keep_code(root))
    try:
        for task in tasks:
            submission.add(task, command)
    except BaseException:
        scheduler.cancel(submission.submitted)
        raise
    record = submission.record()
    write_record(root, record)
    print_submitted(record, tasks)
    return record


def live_jobs(root: Path, name: str) -> list[str]:
    """Return the ids of the SLURM jobs of a job that wait or run."""
    try:
        record = read_record(root, name)
    except ArtifactError:
        return []
    ids = [task.slurm for task in record.tasks if task.slurm and not task.shared_with]
    return sorted({seen.id.partition("_")[0] for seen in scheduler.look(ids).values() if not seen.is_over})


class Submission:
    """A job while its tasks are submitted, one after another in an order in which they can run."""

    def __init__(self, root: Path, name: str, code: Path) -> None:
        self.root, self.name, self.code = root, name, code
        self.submitted: list[str] = []
        self._records: dict[str, TaskRecord] = {}
        self._partitions, self._max_array = scheduler.partitions(), scheduler.max_array()

    def record(self) -> JobRecord:
        """Return the record of what was submitted."""
        return new_record(self.name, "slurm", list(self._records.values()), commit(), str(self.code.absolute()))

    def add(self, task: Task, command: Command) -> None:
        """Submit a task, unless it is done or another job has submitted it."""
        run = task.run
        assert isinstance(run, Slurm)
        record = TaskRecord.of(task, run).model_copy(update={"is_array": task.stage.ranks == "units"})
        if task.done is not None:
            link(self.root, self.name, task.name, task.done.path)
        elif (claim := live_claim(task.directory)) is not None:
            want(task.directory, self.name, task.name)
            record = record.model_copy(update={"slurm": claim.slurm, "shared_with": claim.job})
        else:
            record = self._submit(task, run, command, record)
        self._records[task.name] = record

    def _submit(self, task: Task, run: Slurm, command: Command, record: TaskRecord) -> TaskRecord:
        check_disk(task, command)
        if freeze(task, command, self.name, run) is None:
            return record
        forget_tries(task.directory)
        after = [other for name in record.needs if (other := self._records[name].slurm) is not None]
        token = f"pipeline {uuid.uuid4().hex}"
        words = self.words(task, run, after, token)
        (task.directory / "logs").mkdir(exist_ok=True)
        job = scheduler.submit(words, environment(run, self.code), token)
        self.submitted.append(job)
        write_claim(task.directory, self.name, job)
        return record.model_copy(update={"slurm": job})

    def words(self, task: Task, run: Slurm, after: list[str], token: str) -> list[str]:
        """Return the command that submits a task.

        Args:
            after: Ids of the SLURM jobs that have to end well before.
            token: A comment that no other job has.
        """
        partition = self._partitions.get(run.partition or "") or next(
            (one for one in self._partitions.values() if one.is_default), None
        )
        limit_s = partition.limit_s if partition else None
        directory = task.directory.absolute()
        log = "job-%5a.log" if task.stage.ranks == "units" else "job.log"
        dependency = [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []
        return [
            "sbatch",
            "--parsable",
            f"--job-name={self.name}.{task.name}",
            f"--comment={token}",
            f"--output={str(directory).replace('%', '%%')}/logs/{log}",
            f"--chdir={Path.cwd()}",
            "--open-mode=append",
            "--requeue",
            f"--signal=B:USR2@{run.notice_s}",
            "--export=ALL",
            *dependency,
            *sbatch_flags(run, task.stage, limit_s),
            str(script()),
            "task",
            str(directory),
        ]


def script() -> Path:
    """Return slurm/stage.sbatch. Raises LaunchError if this installation has none."""
    if SCRIPT is None:
        raise LaunchError(f"{PACKAGE}: there is no slurm/stage.sbatch beside it; install the package again")
    return SCRIPT


def environment(run: Slurm, code: Path) -> dict[str, str]:
    """Return the variables that tell slurm/stage.sbatch how to begin."""
    python = run.python or ("python" if run.setup else sys.executable)
    return {
        "PIPELINE_SETUP": "\n".join(run.setup),
        "PIPELINE_PYTHON": python,
        "PIPELINE_CODE": str(code.absolute()),
    }


def keep_code(root: Path) -> Path:
    """Copy the code that runs now to where no edit reaches it, `<root>/code/<hash>`; return that directory."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.*")):
        if path.is_file() and not {"__pycache__", "conf", "slurm"} & set(path.relative_to(PACKAGE).parts):
            digest.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes())
    kept = root / "code" / digest.hexdigest()[:16]
    if not kept.exists():
        temporary = kept.with_name(f"{kept.name}.{os.getpid()}.tmp")
        shutil.copytree(PACKAGE, temporary / PACKAGE.name, ignore=NOT_CODE)
        try:
            temporary.rename(kept)
        except OSError:  # another submission was faster
            shutil.rmtree(temporary)
    return kept
