"""How a task is, and why, in the few words that a table, a line of `wait` or the end of a log has room for."""

import re
from datetime import date
from functools import cache
from pathlib import Path

from pipeline.artifact import Manifest, read_manifest
from pipeline.errors import ArtifactError
from pipeline.jobs.states import DONE, RUNNING, UNKNOWN, WAITED, WAITING, TaskStatus
from pipeline.progress import clock
from pipeline.stages import headline

SAME = "; the same command continues"  # which a job has not
EXITED = re.compile(r"exited with status \d+$")  # of a rank whose last line says why
ADVICE = re.compile("(?<=memory has run out):.*|; (?:raise run|spread the model|run fewer ranks).*")
LONGEST = 30  # letters of a reason of SLURM's beside a state


def describe(task: TaskStatus) -> str:
    """Return the state of a task in a few words: of an array how many elements are in which, and in which try it is."""
    words, total = task.state, sum(task.elements.values())
    if total > 1:
        counts = [f"{count}/{total} {state}" for state, count in sorted(task.elements.items(), key=_done_first)]
        words = ", ".join(counts)
    words += why_waiting(task)
    return f"{words}, try {task.tries}" if task.tries > 1 and task.state not in (DONE, WAITING) else words


def why_waiting(task: TaskStatus) -> str:
    """Return what a task that is not over waits for; reasons of SLURM that do not say that by themselves in words."""
    if task.is_over:
        return ""
    if task.state == UNKNOWN or task.reason == "by its lock":
        return " (no word from SLURM)"
    if task.waits_for and task.reason in ("", "Dependency"):
        return f" for {task.waits_for[0]}" + (", …" if len(task.waits_for) > 1 else "")
    if task.reason == "BeginTime" and (task.begins or task.tries):
        begins = task.begins.replace("T", " ").removeprefix(f"{date.today()} ")
        return f" (begins {'again ' * (task.tries > 0)}{begins or 'within 2 min'})"  # SLURM's own delay
    if way := way_out(task):
        what = "held" if task.reason.startswith("JobHeld") else task.reason.lower()
        return f" ({what}; {way})"
    if task.silent_s is not None:
        return f" (no step for {clock(task.silent_s)})"
    return f" ({task.reason})" if 0 < len(task.reason) <= LONGEST else ""


def way_out(task: TaskStatus) -> str:
    """Return the command that lets go on what somebody, or SLURM, has halted; nothing of what goes on by itself."""
    if task.state == RUNNING and task.reason == "SUSPENDED":
        return f"scontrol resume {task.job_id}"
    if task.state == WAITING and "held" in task.reason.lower():
        return f"scontrol release {task.job_id}"
    return ""


def _done_first(item: tuple[str, int]) -> tuple[bool, str]:
    return item[0] != DONE, item[0]


def note(task: TaskStatus) -> str:
    """Return what a task has made, or why it is not done, in a line; `reason` says more of what to do about memory."""
    return ADVICE.sub("", reason(task))


def reason(task: TaskStatus) -> str:
    """Return what a task has made, or why it is not done; of one that waited for another without that one's reason."""
    if task.state == DONE:
        manifest = made_by(task)
        amount, number = headline(manifest) if manifest else ("", "")
        return number or amount
    said = task.reason if task.state == WAITING and len(task.reason) > LONGEST else ""
    if task.error.startswith(WAITED):
        return task.error.partition(": ")[0]
    return "; ".join(filter(None, [said, _without_noise(task.error, task.directory)]))


def _without_noise(error: str, directory: str) -> str:
    """Return an error in a line without the directory of its task; with the last line of a rank that has exited."""
    line, _, log = error.partition("; the end of ")
    own = re.escape("/".join(Path(directory).parts[-2:]))  # it may have been moved, or be relative
    line = re.sub(rf"(^|: |; )[^:;]*{own}: ", r"\1", line.partition("\n")[0].replace(SAME, ""))
    return f"{line}: {log.splitlines()[-1].strip()}" if log and EXITED.search(line) else line


def made_by(task: TaskStatus) -> Manifest | None:
    """Return the manifest of a done task; null if there is none that can be read."""
    return _manifest(task.directory) if task.state == DONE else None


@cache
def _manifest(directory: str) -> Manifest | None:  # which no one changes any more
    try:
        return read_manifest(Path(directory))
    except (OSError, ArtifactError):
        return None
