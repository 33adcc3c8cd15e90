"""The words of a command about jobs: names, `--flags` with or without a value, and root=DIR."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import ArtifactError, ConfigError
from pipeline.jobs.record import RECORD, JobRecord, TaskRecord, read_record
from pipeline.settings import nearest

OTHERS_SAY = {"-f": "--follow", "-n": "--lines", "--tail": "--lines"}  # tail, kubectl


def say(words: str, root: Path) -> str:
    """Return a command as a person gives it, with the root where that is not the usual one."""
    usual = root.absolute() == Path("artifacts").absolute()
    return f"python -m pipeline {words}" + ("" if usual else f" root={shlex.quote(str(root))}")


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
