"""The tries at a task: their numbers, by which one that was replaced is stopped, and how many of them got nowhere.

Elements of an array are tried each for itself: of element 3 the files have "-00003" in their names.
"""

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.artifact import WORK, atomic
from pipeline.errors import ArtifactError
from pipeline.launch.lock import place
from pipeline.stage import ATTEMPT_FILE, CHECKPOINTS, PARTIAL

TRIES = "tries"  # in work/, with ".jsonl": what was done already when each try began


def begin_attempt(directory: Path, name: str = ATTEMPT_FILE) -> int:
    """Return the number of a new try at the task in `directory`; those of earlier tries may no longer write there."""
    path = directory / WORK / name
    try:
        number = int(path.read_text("ascii")) + 1
    except FileNotFoundError:
        number = 1
    except ValueError as error:
        raise ArtifactError(f"{path}: damaged ({error}); delete it if nobody else works here") from None
    with atomic(path) as temporary:
        temporary.write_text(str(number), "ascii")
    return number


def note_try(directory: Path, own: str) -> None:
    """Note that a try begins, and how much is done.

    Args:
        own: Which element it is of, as "-00003"; empty where it is of all ranks.
    """
    with open(directory / WORK / f"{TRIES}{own}.jsonl", "a", encoding="utf-8") as stream:
        row = {"done": _done(directory), "where": place(), "time": round(time.time(), 3)}
        stream.write(json.dumps(row) + "\n")


def idle_tries(directory: Path, own: str) -> int:
    """Return how many of the last tries, one after another, began with as much done as is now."""
    done, begun = _done(directory), [row.get("done") for row in _rows(directory / WORK / f"{TRIES}{own}.jsonl")]
    return next((count for count, other in enumerate(reversed(begun)) if other != done), len(begun))


def forget_tries(directory: Path) -> None:
    """Let the count of tries without progress begin anew, of all elements."""
    for path in (directory / WORK).glob(f"{TRIES}*.jsonl"):
        path.unlink(missing_ok=True)


def first_began(directory: Path) -> float:
    """Return when the first try began since the count began anew, in seconds since the epoch; now, if none is noted."""
    rows = (next(_rows(path), {}) for path in (directory / WORK).glob(f"{TRIES}*.jsonl"))
    times = [row["time"] for row in rows if isinstance(row.get("time"), int | float)]
    return min(times, default=time.time())


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with suppress(FileNotFoundError):
        for line in path.read_text("utf-8", errors="replace").splitlines():
            with suppress(ValueError):  # of a line cut by a kill
                row = json.loads(line)
                if isinstance(row, dict):
                    yield row


def _done(directory: Path) -> list[Any]:
    """Return what tells how far a task is: its newest checkpoint, the newest note inside a unit, units, and ranks."""
    work = directory / WORK
    steps = sorted(str(path.relative_to(directory)) for path in (directory / CHECKPOINTS).rglob("step-*[0-9]"))
    noted = max((path.stat().st_mtime_ns for path in (work / PARTIAL).glob("*.json")), default=0)
    return [steps[-1:], noted, *(len(list((work / notes).glob("*.json"))) for notes in ("units", "ranks"))]
