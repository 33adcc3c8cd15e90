"""What the directory of a task says of how far it is. Only small files and the ends of big ones are read."""

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.artifact import MANIFEST, WORK
from pipeline.jobs.record import JobRecord, TaskRecord
from pipeline.launch.claim import Claim, read_claim
from pipeline.launch.lock import LOCK, STALE_S, read_owner
from pipeline.launch.output import last_error, tail
from pipeline.perform import PREVIOUS, RESULT, read_result
from pipeline.stage import ATTEMPT_FILE, PROGRESS
from pipeline.track import METRICS

SILENT_S, SILENT_STEPS = 30.0, 10  # a training is silent after that time, and that of so many steps
CLOCK_S = 5.0  # by which clocks may differ


@dataclass(frozen=True)
class Marks:
    """What the newest start of a task, or of one element of its array, has left.

    Attributes:
        status: With which exit status it ended; null if it left none.
        problem: Why it ended so; while it has not, what the try before it ended with since it was submitted.
        began: Whether it has begun since it was submitted.
        tries: How often it has begun, as its logs count; 0 if it has not since it was submitted.
        owner: Who works on it, judged by the lock alone.
        host: The machine of that one.
        has_ended: Whether all of its ranks have ended well.
        log_error: The last error in the log of its SLURM job.
    """

    status: int | None = None
    problem: str = ""
    began: bool = False
    tries: int = 0
    owner: str | None = None
    host: str = ""
    has_ended: bool = False
    log_error: str = ""


@dataclass(frozen=True)
class Pace:
    """How far a task is.

    Attributes:
        done: Steps of a training; of another task what its ranks note, all together.
        total: Of how many; null if that is not known, as while elements of an array have not begun.
        noun: What they are.
        ranks: Processes of a data task that have ended.
        loss: Of the last step.
        tokens_per_s: Of the last step.
        left_s: Seconds that the rest takes at the pace of the last steps, or of the slowest rank.
        silent_s: Seconds since the last step, where that is long for the pace of those before.
    """

    done: int | None = None
    total: int | None = None
    noun: str = ""
    ranks: int = 0
    loss: float | None = None
    tokens_per_s: float | None = None
    left_s: float | None = None
    silent_s: float | None = None


@dataclass(frozen=True)
class Evidence:
    """What the directory of a task says.

    Attributes:
        is_gone: Whether there is none any more.
        is_done: Whether it holds an artifact.
        claim: The SLURM job that was last submitted for it.
        marks: What each part has left: of a task that is no array only the part "".
        preflight_error: The last error in the log of the job that tried its nodes.
    """

    is_gone: bool = False
    is_done: bool = False
    claim: Claim | None = None
    marks: Mapping[str, Marks] = field(default_factory=dict)
    pace: Pace = Pace()
    preflight_error: str = ""


def parts_of(task: TaskRecord) -> list[str]:
    """Return what the parts of a task that SLURM runs each for itself are called in its directory."""
    return [f"-{rank:05d}" for rank in range(task.ranks)] if task.is_array else [""]


def read_evidence(directory: Path, task: TaskRecord) -> Evidence:
    """Read what the directory of a task says."""
    is_done = (directory / MANIFEST).exists()
    marks = {part: _read_marks(directory, part) for part in parts_of(task)} if not is_done else {"": Marks()}
    tried = last_error(directory / "logs" / "preflight.log")
    return Evidence(False, is_done, read_claim(directory), marks, read_pace(directory, task), tried)


def _read_marks(directory: Path, part: str) -> Marks:
    work = directory / WORK
    submitted, began = _mtime(work / "task.json") or 0.0, _mtime(work / f"{ATTEMPT_FILE}{part}")
    has_begun = began is not None and began >= submitted
    result = _result_since(max(submitted, began or 0.0), directory, part, RESULT)
    told = result or _result_since(submitted, directory, part, PREVIOUS)
    owner = _live_owner(directory, LOCK + part)
    return Marks(
        status=result["status"] if result else None,
        problem=told["problems"][0] if told and told["problems"] else "",
        began=has_begun,
        tries=_number(work / f"{ATTEMPT_FILE}{part}") if has_begun else 0,
        owner=str(owner["words"]) if owner else None,
        host=str(owner["host"]) if owner else "",
        has_ended=bool(part) and (work / "ranks" / f"{part[1:]}.json").exists(),
        log_error=last_error(directory / "logs" / f"job{part}.log"),
    )


def _result_since(since: float, directory: Path, part: str, name: str) -> Mapping[str, Any] | None:
    """Return how a try ended that did so at this time or later, in seconds since the epoch."""
    ended = _mtime(directory / WORK / f"{name}{part}.json")
    return read_result(directory, part, name) if ended is not None and ended >= since else None


def _live_owner(directory: Path, lock: str) -> Mapping[str, Any] | None:
    """Return who works in a directory, as far as that can be seen from this machine without touching the lock."""
    owner = read_owner(directory, lock)
    if owner is None:
        return None
    if owner["host"] == socket.gethostname():
        since = owner.get("since", time.time_ns()) / 1e9
        return owner if is_running(int(owner["pid"]), since) else None
    beat = _mtime(directory / WORK / lock)
    return owner if beat is not None and time.time() - beat < STALE_S else None


def is_running(pid: int, since: float) -> bool:
    """Return whether the process of this machine that had this number then, in seconds since the epoch, still runs."""
    try:
        booted = int(Path("/proc/stat").read_text().partition("\nbtime ")[2].split()[0])
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, IndexError, ValueError):
        return False
    began = booted + int(numbers[18]) / os.sysconf("SC_CLK_TCK")
    return state != "Z" and began <= since + CLOCK_S


def launcher_runs(record: JobRecord) -> bool:
    """Return whether the process that runs a job lives, if that can be seen from this machine."""
    if record.pid is None or record.host != socket.gethostname():
        return False
    try:
        return is_running(record.pid, datetime.fromisoformat(record.submitted).timestamp())
    except ValueError:  # of a record that somebody has edited
        return False


def _mtime(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _number(path: Path) -> int:
    try:
        return int(path.read_text("ascii"))
    except (OSError, ValueError):  # damaged: the next try will say so
        return 0


def rows_of(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the last rows of a file of JSON lines, in their order; what a kill cut is left out."""
    for line in tail(path).splitlines():
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                yield row


def read_pace(directory: Path, task: TaskRecord) -> Pace:
    """Return how far a task is: from the rows of a training's steps, else from the notes of its ranks."""
    work = directory / WORK
    rows = [row for row in rows_of(directory / METRICS) if all(_is_number(row.get(name)) for name in ("step", "time"))]
    total = _steps(work / "task.json", "stage")
    if rows and total is not None:
        return _pace_of_steps(rows, total, _mtime(work / ATTEMPT_FILE) or 0.0)
    pace = _pace_of_notes([note for path in sorted((work / PROGRESS).glob("*.json")) if (note := _note(path))], task)
    if rows and pace.done is None:  # its notes went when it was published; of several parts the rows go through all
        pace = Pace(_steps(directory / MANIFEST, "stats") or rows[-1]["step"], None, "steps")
    ended = 0 if rows else _count(work / "ranks")
    return replace(pace, ranks=ended, loss=_newest(rows, "loss"), tokens_per_s=_newest(rows, "tokens_per_s"))


def _note(path: Path) -> Mapping[str, Any] | None:
    """Return what a rank's `Progress` notes; null while that is being written."""
    try:
        note = json.loads(path.read_text("ascii"))
    except (OSError, ValueError):
        return None
    kinds = {"done": int | float, "total": int | float, "noun": str, "left_s": int | float | None, "time": int | float}
    is_whole = isinstance(note, dict) and all(isinstance(note.get(name, ""), kind) for name, kind in kinds.items())
    return note if is_whole else None


def _pace_of_notes(notes: Sequence[Mapping[str, Any]], task: TaskRecord) -> Pace:
    """Return how far all ranks are: the whole is known once all have begun, and lasts as long as the slowest."""
    if not notes:
        return Pace()
    alike = [note for note in notes if note["noun"] == notes[0]["noun"]]  # the others are in another phase
    done, noun = round(sum(note["done"] for note in alike)), notes[0]["noun"]
    if len(alike) < (task.ranks if task.is_array else 1):
        return Pace(done, None, noun)
    now = time.time()
    left = [note for note in alike if note["done"] < note["total"]]
    left_s = None
    if all(note["left_s"] is not None for note in left):  # the notes of a long unit are old
        left_s = max((max(0.0, note["left_s"] - (now - note["time"])) for note in left), default=0.0)
    return Pace(done, round(sum(note["total"] for note in alike)), noun, left_s=left_s)


def _pace_of_steps(rows: list[Mapping[str, Any]], total: int, began: float) -> Pace:
    last = rows[-1]
    recent = [row for row in rows if row["time"] >= began and row["step"] <= last["step"]] or [last]
    steps, seconds = last["step"] - recent[0]["step"], last["time"] - recent[0]["time"]
    pace = Pace(last["step"], total, "steps", 0, _newest(rows, "loss"), _newest(rows, "tokens_per_s"))
    if steps <= 0:
        return pace
    since_s = max(0.0, time.time() - last["time"])
    left_s = max(0.0, (total - last["step"]) * seconds / steps - since_s)
    is_silent = since_s > max(SILENT_S, SILENT_STEPS * seconds / steps)
    return replace(pace, left_s=left_s, silent_s=since_s if is_silent else None)


def _newest(rows: list[Mapping[str, Any]], name: str) -> float | None:
    """Return the last value of a number; a training that has several parts calls it PART/NAME."""
    found = (row[key] for row in reversed(rows) for key in row if key == name or key.endswith(f"/{name}"))
    return next((float(value) for value in found if _is_number(value)), None)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _steps(path: Path, part: str) -> int | None:
    """Return the "steps" in a part of a JSON file; null where there are none."""
    try:
        steps = json.loads(path.read_text("utf-8"))[part].get("steps")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return steps if isinstance(steps, int) else None


def _count(directory: Path) -> int:
    try:
        return sum(entry.name.endswith(".json") for entry in os.scandir(directory))
    except OSError:
        return 0
