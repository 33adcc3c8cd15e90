"""`python -m pipeline status [JOB ...] [--watch] [--json] [root=DIR]`: how far jobs are, or the tasks of one job.

Several jobs may be named; the name of a sweep stands for its points, NAME-0, NAME-1, …

--watch shows it again and again until nothing waits or runs any more; Ctrl-C only ends the looking. --json prints one
object for scripts: {"job", "state", "exit_status", "launcher", "submitted", "command", "problem", "tasks": [{"name",
"kind", "state", "reason", "waits_for", "job_id", "shared_with", "nodes", "begins", "tries", "elements", "element",
"done", "total", "noun", "ranks_done", "ranks", "loss", "tokens_per_s", "left_s", "silent_s", "error", "exit_status",
"directory", "made", "result"}, ...]}; of a sweep, of several jobs and of all a list of those. A state is "done",
"running", "waiting", "failed", "lost" (ended without a word), "cancelled", "stopped" (its state is saved; retry
continues it), "never started", "unknown" where SLURM does not answer, or of a job "damaged", whose record cannot be
read. What a done task "made", and its "result", are in the words of a local run. What is not known is null.

`status` itself ends with 0, however the job is, or with 3 where one is damaged or there is no such root; `wait` ends
with the job's own exit status.
"""

import json
import re
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.errors import ArtifactError, ConfigError
from pipeline.jobs.look import look
from pipeline.jobs.notes import describe, made_by, note
from pipeline.jobs.record import RECORD, JobRecord, read_record
from pipeline.jobs.states import CANCELLED, DONE, FAILED, LOST, NEVER, RUNNING, JobStatus, TaskStatus
from pipeline.jobs.words import expand, parse, say, say_again
from pipeline.progress import clock, terminal_width
from pipeline.settings import choices_of
from pipeline.stages import AnyStage, headline

FLAGS = {"--watch": bool, "--json": bool}
REFRESH_S = 3.0
DAMAGED = "damaged"
STYLES = {DONE: "green", RUNNING: "cyan", FAILED: "red", LOST: "red", CANCELLED: "yellow", DAMAGED: "red"}
LESS_TELLING = ("node", "tokens/s", "job id", "loss", "left", "progress")  # in this order
OF_ALL = ("job=", "stage=", "name=", "root=", "run=", "run.", "tracker")  # words of any command
LACKING = re.compile(r"run\.setup|run\.python|there is no '|its nodes were tried first")
RESULTS = {kind: stage.result for kind, stage in choices_of(AnyStage).items() if stage.result is not None}
UNBOUNDED = 1000  # columns, where nobody sees a terminal


def status(arguments: Sequence[str]) -> int:
    """Print how far jobs are; return the exit status.

    Raises:
        ConfigError: If a word is none of those above.
        ArtifactError: If there is no such job, or no such root.
    """
    words = parse("status", arguments, None, FLAGS, most=len(arguments))
    if not words.root.is_dir():
        raise ArtifactError(f"{words.root}: no such directory, so no job was started there; root=DIR says where")
    names = expand(words.root, words.names)
    is_one, as_json = len(names) == 1 and names == words.names, bool(words.flags.get("--json"))
    found = _Found([])
    if words.flags.get("--watch"):
        with suppress(KeyboardInterrupt):  # nothing but the looking ends
            found = _watch(words.root, names, is_one, as_json)
    else:
        found = _look(words.root, names)
        print(_as_json(found, is_one, 1) if as_json else _text(_page(found, is_one, words.root)))
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


def _look(root: Path, names: Sequence[str]) -> _Found:
    """Return how far those jobs are, or all. Raises ArtifactError if the record of one that is named cannot be read."""
    if names:
        return _Found(look(root, [read_record(root, name) for name in names]))
    records, damaged = [], {}
    for path in sorted((root / "jobs").glob(f"*/{RECORD}")):
        try:
            records.append(read_record(root, path.parent.name))
        except ArtifactError as error:
            damaged[path.parent.name] = str(error)
    return _Found(look(root, records), damaged)


def _as_json(found: _Found, is_one: bool, indent: int | None) -> str:
    plain = [_plain(one) for one in found.jobs]
    unknown = {"exit_status": ArtifactError.exit_status, "launcher": None, "submitted": None, "command": None}
    for name, problem in found.damaged.items():
        plain.append({"job": name, "state": DAMAGED, **unknown, "problem": problem, "tasks": []})
    return json.dumps(plain[0] if is_one else plain, indent=indent, ensure_ascii=False)


def _plain(job: JobStatus) -> dict[str, Any]:
    plain = job.plain()
    for told, task in zip(plain["tasks"], job.tasks, strict=True):
        manifest = made_by(task)
        told["made"], told["result"] = headline(manifest) if manifest else (None, None)
    return plain


def _watch(root: Path, names: Sequence[str], is_one: bool, as_json: bool) -> _Found:
    """Show again and again how far it is until all is over: drawn in place on a terminal, else when it has changed."""
    if as_json:
        while True:
            found = _look(root, names)
            print(_as_json(found, is_one, None), flush=True)
            if found.is_over:
                return found
            time.sleep(REFRESH_S)
    if terminal_width() is not None:
        with Live(console=Console(highlight=False), auto_refresh=False, vertical_overflow="visible") as screen:
            while True:
                found = _look(root, names)
                screen.update(_page(found, is_one, root), refresh=True)
                if found.is_over:
                    return found
                time.sleep(REFRESH_S)
    shown = ""
    while True:
        found = _look(root, names)
        if (text := _text(_page(found, is_one, root))) != shown:
            print(text, flush=True)
            shown = text
        if found.is_over:
            return found
        time.sleep(REFRESH_S)


def _page(found: _Found, is_one: bool, root: Path) -> Group:
    """Return what is shown: a table of jobs, or of the tasks of one."""
    problems = [Text(text, "yellow") for text in dict.fromkeys(one.problem for one in found.jobs) if text]
    if not is_one:
        none = Text("no job was started here; root=DIR says where")
        return Group(*(_jobs(found) if found.jobs or found.damaged else [none]), *problems)
    job = found.jobs[0]
    left_out = _left_out(job, terminal_width())
    notes = _notes(job) if "note" in left_out else []
    return Group(_tasks(job, left_out), *notes, *problems, *map(Text, hints(job, root)))


def _text(page: Group) -> str:
    """Return a page as plain lines without padding: colours and folding only where a terminal shows it."""
    width = terminal_width()
    console = Console(width=width or UNBOUNDED, highlight=False)
    with console.capture() as text:
        for part in page.renderables:  # a command stays in one line, to be copied
            console.print(part, crop=False, soft_wrap=isinstance(part, Text) and part.overflow is None)
    return "\n".join(line.rstrip() for line in text.get().splitlines())


def _jobs(found: _Found) -> list[Table | Text]:
    """Return the table of jobs; a terminal that is too narrow shows below it what they were started with."""
    width, settings = terminal_width(), _settings([one.record for one in found.jobs])
    table = _jobs_with(found, settings)
    if width is None or Console(width=UNBOUNDED).measure(table).maximum <= width:
        return [table]
    lines = [Text.assemble((f"{name}: ", "bold"), said, overflow="fold") for name, said in settings.items() if said]
    return [_jobs_with(found, {}), *lines]


def _jobs_with(found: _Found, settings: Mapping[str, str]) -> Table:
    table = _table("job", "state", "done", "now", "started (UTC)", "on", "with" if settings else "")
    for one in found.jobs:
        now = [task for task in one.tasks if task.state == one.state and task.state != DONE]
        what = ", ".join(task.name for task in now[:3]) + (", …" if len(now) > 3 else "")
        done = f"{sum(task.state == DONE for task in one.tasks)}/{len(one.tasks)}"
        state = Text(one.state, STYLES.get(one.state, ""))
        said = settings.get(one.record.name, "")
        started = one.record.submitted[:16].replace("T", " ")
        table.add_row(one.record.name, state, done, what, started, one.record.launcher, said)
    for name in found.damaged:
        table.add_row(name, Text(DAMAGED, STYLES[DAMAGED]), "", "", "", "", "")
    return table


def _settings(records: Sequence[JobRecord]) -> dict[str, str]:
    """Return the words of each command that say what is made, as far as they tell these jobs apart."""
    said = {one.name: [word for word in one.command if "=" in word and not word.startswith(OF_ALL)] for one in records}
    of_all = set.intersection(*map(set, said.values())) if len(said) > 1 else set()
    return {name: " ".join(word for word in words if word not in of_all) for name, words in said.items()}


def _left_out(job: JobStatus, width: int | None) -> Sequence[str]:
    """Return the columns for which a terminal is too narrow: notes, which get lines of their own, and what tells less.

    Elsewhere all are shown: a note in the line of its task, for grep.
    """
    if width is None:
        return []
    rows = [_cells(task) for task in job.tasks]
    left_out = empty = [heading for row in rows[:1] for heading in row if not any(str(one[heading]) for one in rows)]
    for number in range(len(LESS_TELLING) + 1):
        if Console(width=UNBOUNDED).measure(_tasks(job, left_out)).maximum <= width:
            break
        left_out = [*empty, "note", *LESS_TELLING[:number]]
    return left_out


def _tasks(job: JobStatus, left_out: Collection[str]) -> Table:
    """Return the table of a job's tasks."""
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


def _notes(job: JobStatus) -> list[Text]:
    """Return the notes, those that are the same in one line: a column of a narrow terminal has no room."""
    notes = dict.fromkeys(filter(None, map(note, job.tasks)))
    of_note = {said: ", ".join(task.name for task in job.tasks if note(task) == said) for said in notes}
    return [Text.assemble((f"{names}: ", "bold"), said, overflow="fold") for said, names in of_note.items()]


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
    if job.record.command:
        lines.append(f"after changing a setting:        {say_again(job.record, root)}")
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
