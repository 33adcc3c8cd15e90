"""The words of a command about jobs: names, `--flags` with or without a value, and root=DIR."""

import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import ArtifactError, ConfigError, PipelineError, Preempted
from pipeline.jobs.record import RECORD, JobRecord, TaskRecord, read_record
from pipeline.settings import nearest

OTHERS_SAY = {"-f": "--follow", "-n": "--lines", "--tail": "--lines"}  # tail, kubectl


def say(words: str, root: Path, directory: Path | None = None) -> str:
    """Return a command as a person gives it, with the root where that is not the usual one.

    Args:
        directory: Where it is given; null is here.
    """
    usual = root.resolve() == ((directory or Path()) / "artifacts").resolve()
    return f"python -m pipeline {words}" + ("" if usual else f" root={shlex.quote(str(root))}")


def say_again(record: JobRecord, root: Path) -> str:
    """Return the command that starts a job anew: where it was started, for the root and the name that it now has."""
    said = [word for word in record.command if not word.startswith("root=")]
    names = [number for number, word in enumerate(said) if word.startswith("name=")]
    for number in names:  # that of a point of a sweep has its number
        said[number] = f"name={record.name}"
    if not names and record.name not in _chosen(said):
        said.append(f"name={record.name}")
    directory = Path(record.directory)
    if directory == Path.cwd():
        return say(shlex.join(said), root)
    return f"cd {shlex.quote(record.directory)} && {say(shlex.join(said), root.absolute(), directory)}"


def _chosen(command: Iterable[str]) -> list[str]:
    """Return what a job is called that these words start, as far as they give it no name."""
    pairs = [word.partition("=") for word in command]
    names = [Path(value.strip("'\"")).name for key, _, value in pairs if key in ("job", "stage")]
    return [re.sub(r"\.ya?ml$", "", name) for name in names]


@dataclass
class Words:
    """What a person said: the names, the flags that were given, and where the jobs are."""

    names: list[str] = field(default_factory=list)
    flags: dict[str, int | bool] = field(default_factory=dict)
    root: Path = Path("artifacts")


def parse(
    command: str, arguments: Sequence[str], noun: str | None, flags: Mapping[str, type] | None = None, most: int = 1
) -> Words:
    """Return the words of a command.

    Args:
        noun: What a name is, as "JOB"; null where none has to be given.
        flags: Flags that there are, as "--rank"; of type `int` those that take a number, of type `bool` the others.
        most: How many names there may be.

    Raises:
        ConfigError: With every word that is none of the command's.
    """
    words, flags, problems, rest = Words(), flags or {}, list[str](), list(arguments)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name == "root" and value:
            words.root = Path(value)
        elif name in flags and flags[name] is int:
            value = value if equals else rest.pop(0) if rest else ""
            if value.isdecimal() and len(value) < 10:
                words.flags[name] = int(value)
            else:
                problems.append(f"{command}: {name}: wanted a number, found '{value}'")
        elif word in flags:
            words.flags[word] = True
        elif word.startswith("-") or (equals and not Path(word).exists()):
            problems.append(f"{command}: no word is called '{name}'{_meant(name, flags, rest)}")
        else:
            words.names.append(word)
    if len(words.names) > most:
        problems.append(f"{command}: '{words.names[most]}' is one name too many")
    if noun and not words.names:
        problems.append(f"{command}: say which: python -m pipeline {command} {noun}")
    if problems:
        raise ConfigError(*problems)
    return words


def _meant(name: str, flags: Mapping[str, type], rest: list[str]) -> str:
    """Return what a word may have been meant to be, as the end of a message; the number after it goes."""
    meant = OTHERS_SAY.get(name, "")
    if flags.get(meant) is int and rest and rest[0].isdecimal():
        rest.pop(0)
    return f"; did you mean '{meant}'?" if meant in flags else nearest(name, [*flags, "root"])


def find_task(root: Path, name: str) -> tuple[JobRecord, TaskRecord]:
    """Return the job and the task that JOB.TASK names. Raises ArtifactError if there is none, with the nearest."""
    job, dot, task = name.rpartition(".")
    if not dot:
        record = read_record(root, name)
        known = ", ".join(f"{name}.{one.name}" for one in record.tasks)
        raise ArtifactError(f"{name}: wanted a task of that job; there is {known}")
    record = read_record(root, job)
    for one in record.tasks:
        if one.name == task:
            return record, one
    known_names = [one.name for one in record.tasks]
    raise ArtifactError(f"{name}: job '{job}' has no task called '{task}'{nearest(task, known_names)}")


def find(root: Path, name: str) -> tuple[JobRecord, TaskRecord | None]:
    """Return the job that a name names, and the task if it names JOB.TASK. Raises ArtifactError if there is neither."""
    if "." in name and not (root / "jobs" / name / RECORD).exists():
        return find_task(root, name)
    return read_record(root, name), None


def expand(root: Path, names: Sequence[str]) -> list[str]:
    """Return the jobs, or JOB.TASK, that names stand for, each once.

    The name of a sweep, of which no job is called, stands for its points: NAME-0, NAME-1, …
    """
    known = [path.parent.name for path in (root / "jobs").glob(f"*/{RECORD}")]
    found: list[str] = []
    for name in names:
        job, _, task = name.rpartition(".")
        is_known = name in known or job in known
        points = [] if is_known else _points(name, known) or [f"{one}.{task}" for one in _points(job, known)]
        found += points or [name]
    return list(dict.fromkeys(found))


def _points(name: str, known: Iterable[str]) -> list[str]:
    points = [one for one in known if re.fullmatch(re.escape(name) + r"-\d+", one)]
    return sorted(points, key=lambda one: int(one.rpartition("-")[2]))


def for_each(names: Sequence[str], act: Callable[[str], None]) -> int:
    """Do the same to several jobs, whatever is wrong with one of them; return the exit status of the first of these.

    Raises:
        PipelineError: What is wrong, where there is only one.
    """
    status = 0
    for name in names:
        try:
            act(name)
        except PipelineError as error:
            if len(names) == 1 or isinstance(error, Preempted):
                raise
            print(f"error: {error}", file=sys.stderr, flush=True)
            status = status or error.exit_status
    return status
