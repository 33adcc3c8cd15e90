"""A successor for a SLURM job that cannot be begun again (JobRequeue is off, or --no-requeue), so that its job goes on.

The same task is submitted once more, as it was submitted, and whatever waited for the old job waits for the new one.
"""

import os
import re
import uuid
from pathlib import Path

from pipeline.artifact import write_json
from pipeline.errors import ArtifactError
from pipeline.jobs.batch import environment, task_words
from pipeline.jobs.record import RECORD, read_record
from pipeline.jobs.sharing import deciding
from pipeline.launch import scheduler
from pipeline.launch.claim import write_claim
from pipeline.launch.slurm import Slurm
from pipeline.perform import wanted
from pipeline.settings import encode
from pipeline.worker import FrozenTask


def submit_successor(task: FrozenTask, old: str) -> str:
    """Submit the task of this job once more; return the id of the new job.

    Args:
        old: Id of this job; of an array's element, "12_3", only this element is submitted.

    Raises:
        LaunchError: If SLURM does not take it.
    """
    directory = Path(task.directory)
    assert isinstance(task.run, Slurm)
    assert task.job is not None
    partition = scheduler.show(old)["Partition"]
    limit_s = scheduler.partitions()[partition].limit_s
    planned = read_record(directory.parent.parent, task.job)
    array, _, element = old.partition("_")
    token = f"pipeline {uuid.uuid4().hex}"
    words = task_words(planned, task, limit_s, [], token)
    if element:
        words = [re.sub(r"^--array=.*", f"--array={element}", word) for word in words]
    for name in [name for name in os.environ if name.startswith("SLURM_") and name != "SLURM_CONF"]:
        del os.environ[name]  # of this job: the next one has its own
    with deciding(directory):
        new = scheduler.submit(words, environment(task, planned.code), token)
        move_dependents(old, new, task.run.ranks)
        if not element:
            write_claim(directory, task.job, new)
            _correct_records(directory, array, new)
    return new


def move_dependents(old: str, new: str, length: int) -> None:
    """Let every job that waits for `old` wait for `new`.

    Args:
        old: Where it is an element of an array, those that wait for the whole array wait for its other elements too.
        length: Of that array.
    """
    array, _, element = old.partition("_")
    others = [f"{array}_{i}" for i in range(length) if element and i != int(element)]
    for job, dependency in scheduler.dependencies().items():
        after = re.findall(r"afterok:(\d+(?:_(?:\d+|\*))?)", dependency)
        if not {old, f"{array}_*", array} & {*after}:
            continue
        moved = [
            part
            for one in after
            for part in ([new] if one == old else [*others, new] if one in (array, f"{array}_*") else [one])
        ]
        scheduler.depend(job, list(dict.fromkeys(moved)))


def _correct_records(directory: Path, old: str, new: str) -> None:
    """Let the records of all jobs that have this task name its new SLURM job."""
    root = directory.parent.parent
    for name, _ in wanted(directory):
        try:
            record = read_record(root, name)
        except ArtifactError:  # it was started anew, or is gone
            continue
        tasks = [task.model_copy(update={"slurm": new}) if task.slurm == old else task for task in record.tasks]
        write_json(root / "jobs" / name / RECORD, encode(record.model_copy(update={"tasks": tasks})))
