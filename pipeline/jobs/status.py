"""`python -m pipeline status [JOB] [--watch] [--json] [root=DIR]`: how far jobs are, or the tasks of one job.

--watch shows it again and again until nothing waits or runs any more; Ctrl-C only ends the looking. --json prints one
object for scripts: {"job", "state", "exit_status", "launcher", "submitted", "command", "problem", "tasks": [{"name",
"kind", "state", "reason", "waits_for", "job_id", "shared_with", "nodes", "begins", "tries", "elements", "element",
"done", "total", "noun", "ranks_done", "ranks", "loss", "tokens_per_s", "left_s", "error", "exit_status", "directory"},
...]}; without JOB a list of those. A state is "done", "running", "waiting", "failed", "lost" (ended without a word),
"cancelled", "stopped" (its state is saved; retry continues it), "never started", "unknown" where SLURM does not answer,
or of a job "damaged", whose record cannot be read. What is not known is null. `status` itself ends with 0, however the
job is, or with 3 where one is damaged; `wait` ends with the job's own exit status.
"""

import json
import re
import shlex
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.errors import ArtifactError, ConfigError
from pipeline.jobs.look import look
from pipeline.jobs.record import RECORD, JobRecord, read_record
from pipeline.jobs.states import (
    CANCELLED,
    DONE,
    FAILED,
    LOST,
    NEVER,
    RUNNING,
    WAITED,
    WAITING,
    JobStatus,
    TaskStatus,
)
from pipeline.jobs.words import parse, say
from pipeline.progress import clock, terminal_width
from pipeline.settings import choices_of
from pipeline.stages import AnyStage

FLAGS = {"--watch": bool, "--json": bool}
REFRESH_S = 3.0
DAMAGED = "damaged"
STYLES = {DONE: "green", RUNNING: "cyan", FAILED: "red", LOST: "red", CANCELLED: "yellow", DAMAGED: "red"}
LESS_TELLING = ("node", "tokens/s", "job id", "loss")  # in this order
OF_ALL = ("job=", "stage=", "root=", "run=", "run.", "tracker")  # words of any command
LACKING = re.compile(r"run\.setup|run\.python|there is no '|its nodes were tried first")
RESULTS = {kind: stage.result for kind, stage in choices_of(AnyStage).items() if stage.result is not None}
UNBOUNDED = 1000  # columns, where nobody sees a terminal


def status(arguments: Sequence[str]) -> int:
    """Print how far jobs are; return the exit status.

    Raises:
        ConfigError: If a word is none of those above.
        ArtifactError: If there is no such job.
    """
    words = parse("status", arguments, None, FLAGS)
    name = words.names[0] if words.names else None
    as_json = bool(words.flags.get("--json"))
    found = _Found([])
    if words.flags.get("--watch"):
        with suppress(KeyboardInterrupt):  # nothing but the looking ends
            found = _watch(words.root, name, as_json)
    else:
        found = _look(words.root, name)
        print(_as_json(found, name is not None, 1) if as_json else _text(_page(found, name, words.root)))
    for problem in found.damaged.values():
        print(f"error: {problem}", file=sys.stderr, flush=True)
    return ArtifactError.exit_status if found.damaged else 0


@dataclass(frozen=True)
class _Found:
    """How far jobs are, and of those whose record cannot be read, by their names, what is wrong with it."""

    jobs: Sequence[JobStatus]
    damaged: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        return all(one.is_over for one in self.jobs)


def _look(root: Path, name: str | None) -> _Found:
    """Return how far one job is, or all. Raises ArtifactError if the record of that one cannot be read."""
    if name:
        return _Found(look(root, [read_record(root, name)]))
    records, damaged = [], {}
    for path in sorted((root / "jobs").glob(f"*/{RECORD}")):
        try:
            records.append(read_record(root, path.parent.name))
        except ArtifactError as error:
            damaged[path.parent.name] = str(error)
    return _Found(look(root, records), damaged)


def _as_json(found: _Found, is_one: bool, indent: int | None) -> str:
    plain = [one.plain() for one in found.jobs]
    unknown = {"exit_status": ArtifactError.exit_status, "launcher": None, "submitted": None, "command": None}
    for name, problem in found.damaged.items():
        plain.append({"job": name, "state": DAMAGED, **unknown, "problem": problem, "tasks": []})
    return json.dumps(plain[0] if is_one else plain, indent=indent, ensure_ascii=False)


def _watch(root: Path, name: str | None, as_json: bool) -> _Found:
    """Show again and again how far it is until all is over: drawn in place on a terminal, else when it has changed."""
    if as_json:
        while True:
            found = _look(root, name)
            print(_as_json(found, name is not None, None), flush=True)
            if found.is_over:
                return found
            time.sleep(REFRESH_S)
    if terminal_width() is not None:
        with Live(console=Console(highlight=False), auto_refresh=False, vertical_overflow="visible") as screen:
            while True:
                found = _look(root, name)
                screen.update(_page(found, name, root), refresh=True)
                if found.is_over:
                    return found
                time.sleep(REFRESH_S)
    shown = ""
    while True:
        found = _look(root, name)
        if (text := _text(_page(found, name, root))) != shown:
            print(text, flush=True)
            shown = text
        if found.is_over:
            return found
        time.sleep(REFRESH_S)


def _page(found: _Found, name: str | None, root: Path) -> Group:
    """Return what is shown: a table of jobs, or of the tasks of one."""
    problems = [Text(text, "yellow") for text in dict.fromkeys(one.problem for one in found.jobs) if text]
    if name is None:
        none = Text("no job was started here; root=DIR says where")
        return Group(_jobs(found) if found.jobs or found.damaged else none, *problems)
    job = found.jobs[0]
    notes = _notes(job) if terminal_width() is not None else []  # else in the line of their task, for grep
    return Group(_tasks(job, terminal_width()), *notes, *problems, *map(Text, hints(job, root)))


def _text(page: Group) -> str:
    """Return a page as plain lines without padding: colours and folding only where a terminal shows it."""
    width = terminal_width()
    console = Console(width=width or UNBOUNDED, highlight=False)
    with console.capture() as text:
        console.print(page, crop=False)
    return "\n".join(line.rstrip() for line in text.get().splitlines())


def _jobs(found: _Found) -> Table:
    table = _table("job", "state", "done", "now", "started", "on", "with")
    for one in found.jobs:
        now = [task for task in one.tasks if task.state == one.state and task.state != DONE]
        what = ", ".join(task.name for task in now[:3]) + (", …" if len(now) > 3 else "")
        done = f"{sum(task.state == DONE for task in one.tasks)}/{len(one.tasks)}"
        state = Text(one.state, STYLES.get(one.state, ""))
        table.add_row(
            one.record.name, state, done, what, one.record.submitted, one.record.launcher, _settings(one.record)
        )
    for name in found.damaged:
        table.add_row(name, Text(DAMAGED, STYLES[DAMAGED]), "", "", "", "", "")
    return table


def _settings(record: JobRecord) -> str:
    """Return the words of a command that say what is made: they tell the points of a sweep apart."""
    return " ".join(word for word in record.command if "=" in word and not word.startswith(OF_ALL))


def _tasks(job: JobStatus, width: int | None) -> Table:
    """Return the table of a job's tasks; a terminal that is too narrow does without its less telling columns."""
    if width is None:
        return _tasks_without(job, frozenset())
    for number in range(len(LESS_TELLING) + 1):
        table = _tasks_without(job, frozenset(("note", *LESS_TELLING[:number])))
        if Console(width=UNBOUNDED).measure(table).maximum <= width:
            break
    return table


def _tasks_without(job: JobStatus, left_out: Collection[str]) -> Table:
    rows = [_cells(task) for task in job.tasks]
    headings = [heading for heading in _cells(job.tasks[0]) if heading not in left_out] if rows else []
    table = _table(*headings)
    for row in rows:
        table.add_row(*(row[heading] for heading in headings))
    return table


def _cells(task: TaskStatus) -> dict[str, Text | str]:
    return {
        "task": task.name,
        "state": Text(describe(task), STYLES.get(task.state, "")),
        "job id": (task.job_id or "") + (f" of {task.shared_with}" if task.shared_with else ""),
        "node": task.nodes,
        "progress": _progress(task),
        "loss": "" if task.loss is None else f"{task.loss:.4f}",
        "tokens/s": "" if task.tokens_per_s is None else f"{task.tokens_per_s:,.0f}",
        "left": "" if task.left_s is None else clock(task.left_s),
        "note": note(task),
    }


def note(task: TaskStatus) -> str:
    """Return why a task is not done, in a line; of one that waited for another without that one's reason."""
    if not task.error or task.state == DONE:
        return ""
    line = task.error.splitlines()[0].partition("; the end of ")[0]
    return line.partition(": ")[0] if line.startswith(WAITED) else line


def _notes(job: JobStatus) -> list[Text]:
    """Return the notes, those that are the same in one line: a column of a narrow terminal has no room."""
    notes = dict.fromkeys(filter(None, map(note, job.tasks)))
    of_note = {said: ", ".join(task.name for task in job.tasks if note(task) == said) for said in notes}
    return [Text.assemble((f"{names}: ", "bold"), said, overflow="fold") for said, names in of_note.items()]


def describe(task: TaskStatus) -> str:
    """Return the state of a task in a few words: of an array how many elements are in which, and which try it is."""
    words, total = task.state, sum(task.elements.values())
    if total > 1:
        counts = [f"{count}/{total} {state}" for state, count in sorted(task.elements.items(), key=_done_first)]
        words = ", ".join(counts)
    if task.state in (WAITING, RUNNING):
        words += _why_waiting(task)
    return f"{words}, try {task.tries}" if task.tries > 1 and task.state != DONE else words


def _why_waiting(task: TaskStatus) -> str:
    """Return what a task waits for; the reasons of SLURM that do not say that by themselves in plain words."""
    if task.waits_for and task.reason in ("", "Dependency"):
        return f" for {task.waits_for[0]}" + (", …" if len(task.waits_for) > 1 else "")
    if task.reason == "BeginTime" and (task.begins or task.tries):
        begins = task.begins.replace("T", " ").removeprefix(f"{date.today()} ")
        return f" (begins {'again ' * (task.tries > 0)}{begins or 'within 2 min'})"  # SLURM's own delay
    if task.reason in ("JobHeldUser", "JobHeldAdmin"):
        return f" (held; scontrol release {task.job_id})"
    return f" ({task.reason})" if task.reason else ""


def _done_first(item: tuple[str, int]) -> tuple[bool, str]:
    return item[0] != DONE, item[0]


def _progress(task: TaskStatus) -> str:
    if task.done is not None:
        if task.total:
            return f"{task.done:,}/{task.total:,} {task.noun}"
        return f"{task.done:,} {task.noun.removesuffix('s') if task.done == 1 else task.noun}"
    if task.ranks > 1 and task.state != DONE and task.ranks_done:
        return f"{task.ranks_done}/{task.ranks} ranks"
    return ""


def hints(job: JobStatus, root: Path) -> list[str]:
    """Return what to do next, where something has to be done; of a job that is done what a person opens of it."""
    name, state = job.record.name, job.state
    if not job.is_over:
        return []
    if state == DONE:
        made = [(task.name, RESULTS[task.kind]) for task in job.tasks if task.kind in RESULTS]
        return [f"{task}: {root / 'jobs' / name / task / result}" for task, result in made]
    bad = next(task for task in job.tasks if task.state == state)
    lines = [f"continue with the same settings: {say(f'retry {name}', root)}"]
    if words := [word for word in job.record.command if not word.startswith("root=")]:
        lines.append(f"after changing a setting:        {say(shlex.join(words), root)}")
    if _needs_change(bad):
        lines.reverse()
    if why := _why(job, bad):
        lines.insert(0, f"why: {say(why, root)}")
    return lines


def _why(job: JobStatus, bad: TaskStatus) -> str:
    """Return the words of the command that shows why a task ended so; none where nothing of it is kept."""
    was_tried = bad.state == NEVER and any(task.preflight for task in job.record.tasks if task.name == bad.name)
    if not (bad.state in (FAILED, LOST) or was_tried) or not (Path(bad.directory) / "logs").is_dir():
        return ""
    return f"logs {job.record.name}.{bad.name}" + (f" --rank {bad.element}" if bad.element else "")


def _needs_change(bad: TaskStatus) -> bool:
    """Return whether the same settings would fail again: they were refused, or a node lacks what they name."""
    return bad.exit_status == ConfigError.exit_status or LACKING.search(bad.error) is not None


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        right = heading in ("loss", "tokens/s", "left")
        table.add_column(heading, justify="right" if right else "left", overflow="fold", no_wrap=heading != "with")
    return table
