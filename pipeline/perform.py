"""One frozen task, wherever it runs: begun under its lock, its ranks launched and begun again, its result published."""

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.artifact import MANIFEST, WORK, write_json
from pipeline.env import Share, StopRequest
from pipeline.errors import ArtifactError, ConfigError, LaunchError, Lost, PipelineError, Preempted
from pipeline.launch import local, srun
from pipeline.launch.lock import LOCK, STALE_S, locked, place, slurm_job
from pipeline.launch.output import last_error
from pipeline.launch.slurm import Slurm
from pipeline.launch.tries import begin_attempt, first_began, forget_tries, idle_tries, note_try
from pipeline.plan import identify_sources
from pipeline.progress import tell
from pipeline.stage import ATTEMPT_FILE, CHECKPOINTS, PROGRESS, SCRATCH
from pipeline.worker import FrozenTask, publish, read_task

RESULT, PREVIOUS = "result", "previous"  # in work/: how the newest try ended, and the one before
WANTED = "wanted"  # in work/: JOB.TASK of every job that this is a task of
LAST = "; the last time: "
PUBLISHED_LOCK = "lock-publish"


class Replaced(LaunchError):
    """A later try has begun elsewhere, as when a node that was cut off comes back: nothing more is written here."""


def perform(task: FrozenTask, share: Share, stop: StopRequest, anew: bool = True) -> None:
    """Run a share of the ranks of a frozen task, and publish its artifact when all of its ranks have ended.

    Ranks that are lost are begun again where this process may do so, `run.tries` times without progress.

    Args:
        anew: Whether a person has just begun this, so that earlier tries do not count; a job that SLURM has begun
            again goes on counting all the same.

    Raises:
        PipelineError: Why it could not; the same is left in `work/result.json`.
    """
    directory = Path(task.directory)
    own = "" if share.is_all else f"-{share.first:05d}"
    patience_s = 2 * STALE_S if slurm_job() else 0.0
    with locked(directory, LOCK + own, patience_s) as lock:
        if anew and not int(os.environ.get("SLURM_RESTART_COUNT", "0")):
            forget_tries(directory)
        if (directory / MANIFEST).exists():
            return
        try:
            _check_world(directory, share)
            _run_ranks(task, share, own, lock, stop)
            leave_result(directory, own, None)
            if share.is_all:
                _publish(task)
            else:
                _publish_if_last(task, share)
        except Replaced:
            raise
        except PipelineError as error:
            leave_result(directory, own, error)
            raise


def _publish_if_last(task: FrozenTask, share: Share) -> None:
    """Publish once all elements of an array have ended; the last of them does."""
    directory = Path(task.directory)
    with locked(directory, PUBLISHED_LOCK, float("inf")):  # which who is gone does not hold
        if not (directory / MANIFEST).exists() and _have_ended(directory, share.world):
            _check_world(directory, share)
            _publish(task)


def _run_ranks(task: FrozenTask, share: Share, own: str, lock: int, stop: StopRequest) -> None:
    directory = Path(task.directory)
    if not share.is_all and (directory / WORK / "ranks" / f"{share.first:05d}.json").exists():
        return None  # this element had ended before
    set_aside_result(directory, own)
    _refuse_idle(task, own, last_problem(directory, own))
    while True:
        note_try(directory, own)
        try:
            return _try(task, share, own, lock, stop)
        except (Lost, Preempted) as error:
            if isinstance(error, Lost) and not stop and task.run.tries > 1:
                _refuse_idle(task, own, str(error))
            if stop or isinstance(task.run, Slurm) or task.run.tries == 1:
                raise  # SLURM begins it again, where it can be on other machines
            tell(f"{task.name}: {error}\n{task.name}: begun again")


def _refuse_idle(task: FrozenTask, own: str, last: str) -> None:
    """Give up a task that was begun so often without any progress. Raises LaunchError with what happened last."""
    if (idle := idle_tries(Path(task.directory), own)) >= task.run.tries:
        last = last.rpartition(LAST)[2]  # it may have been given up before
        raise LaunchError(f"{task.directory}: begun {idle} times without any progress{LAST}{last}")


def _try(task: FrozenTask, share: Share, own: str, lock: int, stop: StopRequest) -> None:
    directory, name = Path(task.directory), ATTEMPT_FILE + own
    attempt = begin_attempt(directory, name)
    if share.is_all:
        clear(directory)
    check_sources(task)
    try:
        if isinstance(task.run, Slurm):
            srun.launch(directory, task.run, share, (attempt, name), stop)
        else:
            local.launch(directory, task.run, attempt, lock, stop)
    except PipelineError as error:
        _check_replaced(directory, name, attempt, error)
        raise
    finally:
        check_sources(task, undo=True)  # what was read is what the fingerprint says
    _check_replaced(directory, name, attempt, None)


def _check_replaced(directory: Path, name: str, attempt: int, error: PipelineError | None) -> None:
    with suppress(OSError, ValueError):
        if int((directory / WORK / name).read_text("ascii")) != attempt:
            raise Replaced(
                f"{directory}: try {attempt} was followed by another one; nothing more is written"
            ) from error


def _check_world(directory: Path, share: Share) -> None:
    """Refuse what an element of an array left or would leave, once the task was begun anew with other ranks."""
    if share.is_all:
        return
    if (world := read_task(directory / WORK / "task.json").run.ranks) != share.world:
        raise Replaced(
            f"{directory}: was begun anew with {world} ranks, and this is one of {share.world}; nothing more is written"
        )


def clear(directory: Path) -> None:
    """Make room for a try of all ranks: what an earlier one left half-written goes, finished units stay."""
    for old in ("ranks", PROGRESS):
        shutil.rmtree(directory / WORK / old, ignore_errors=True)
    for notes in ("units", "ranks"):
        (directory / WORK / notes).mkdir(parents=True, exist_ok=True)
    shutil.rmtree(directory / WORK / SCRATCH, ignore_errors=True)
    for path in directory.glob("*.tmp"):
        path.unlink()


def check_sources(task: FrozenTask, undo: bool = False) -> None:
    """Refuse raw files that are no longer those of the plan; `undo` drops the work that may be made of others.

    Raises:
        ArtifactError: If they changed.
    """
    for name in changed_sources(task):
        for unfinished in (WORK + "/units", CHECKPOINTS) if undo else ():
            shutil.rmtree(Path(task.directory) / unfinished, ignore_errors=True)
        raise ArtifactError(f"{name}: its files changed while the job ran; run it again")


def changed_sources(task: FrozenTask) -> list[str]:
    """Return the settings, by their dotted paths, whose raw files are no longer those of the plan."""
    found = identify_sources(task.stage)
    return [f"{task.where}.{name}" for name, identity in found.items() if identity != task.sources[name]]


def _have_ended(directory: Path, world: int) -> bool:
    return all((directory / WORK / "ranks" / f"{rank:05d}.json").exists() for rank in range(world))


def _publish(task: FrozenTask) -> None:
    publish(task, time.time() - first_began(Path(task.directory)), task.run.ranks)


def leave_result(directory: Path, own: str, error: PipelineError | None) -> None:
    """Leave how a try ended, for `status`; on a full disk the exit status has to do."""
    problems = [] if error is None else list(error.problems) if isinstance(error, ConfigError) else [str(error)]
    with suppress(OSError, ArtifactError):
        path = directory / WORK / f"{RESULT}{own}.json"
        write_json(path, outcome(0 if error is None else error.exit_status, problems))


def outcome(status: int, problems: Sequence[str]) -> dict[str, Any]:
    """Return how something ended, where and when."""
    return {
        "status": status,
        "problems": list(problems),
        "where": place(),
        "job": slurm_job(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def set_aside_result(directory: Path, own: str) -> None:
    """Keep under another name how the last try ended, so that what is there from now on is of the one that begins.

    Of one that left nothing it is said what the log of its SLURM job tells. On a full disk a file can still be renamed.
    """
    result, previous = (directory / WORK / f"{name}{own}.json" for name in (RESULT, PREVIOUS))
    try:
        result.replace(previous)
    except FileNotFoundError:
        previous.unlink(missing_ok=True)
        attempt, task = directory / WORK / f"{ATTEMPT_FILE}{own}", directory / WORK / "task.json"
        with suppress(OSError, ArtifactError):
            if attempt.stat().st_mtime >= task.stat().st_mtime:  # else it is of a start before this one
                why = last_error(directory / "logs" / f"job{own}.log") or "it ended without a word"
                write_json(previous, outcome(LaunchError.exit_status, [why]))


def read_result(directory: Path, own: str = "", name: str = RESULT) -> Mapping[str, Any] | None:
    """Return what `leave_result` left of a task, or of an element of its array ("-00003"); null if nothing of use."""
    try:
        result = json.loads((directory / WORK / f"{name}{own}.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    kinds = {"status": int, "problems": list, "time": str}
    is_whole = isinstance(result, dict) and all(isinstance(result.get(name), kind) for name, kind in kinds.items())
    return result if is_whole and all(isinstance(line, str) for line in result["problems"]) else None


def last_problem(directory: Path, own: str) -> str:
    """Return what went wrong at the last try that left a word."""
    result = read_result(directory, own, PREVIOUS)
    return "; ".join(result["problems"]) if result and result["problems"] else "it left no reason; see its logs"


def want(directory: Path, job: str, task: str) -> None:
    """Note that a job has a task that is made in this directory, so that its link will lead there."""
    (directory / WORK / WANTED).mkdir(parents=True, exist_ok=True)
    (directory / WORK / WANTED / f"{job}.{task}").touch()


def wanted(directory: Path) -> list[tuple[str, str]]:
    """Return the jobs, and what each calls the task, that are to be led to this directory."""
    names = sorted(path.name for path in (directory / WORK / WANTED).glob("*.*"))
    return [(name.rpartition(".")[0], name.rpartition(".")[2]) for name in names]
