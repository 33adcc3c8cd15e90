"""What a person sees: the settings of a stage, the plan before a job, the table after it; and artifacts by name."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.artifact import Artifact, Manifest
from pipeline.errors import ArtifactError, ConfigError
from pipeline.jobs.record import JobRecord
from pipeline.jobs.words import say
from pipeline.launch import AnyRun
from pipeline.launch.slurm import Slurm, is_array
from pipeline.plan import Command, Task
from pipeline.progress import clock, terminal_width
from pipeline.remote import is_url, open_anywhere
from pipeline.settings import choices_of, nearest
from pipeline.stage import Stage
from pipeline.stages import AnyStage, headline
from pipeline.stages.imported import open_input
from pipeline.worker import FrozenTask


def find_artifact(name: str, root: Path, *kinds: str, whole: bool = True) -> Artifact:
    """Open what a person calls an artifact: a path, a URL, or JOB.TASK for what that job last made.

    Args:
        whole: Whether every file must be there and of its size.

    Raises:
        ArtifactError: If there is none, with the nearest name of a job or task.
    """
    job, _, task = name.rpartition(".")
    if is_url(name) or Path(name).exists() or not job or "/" in name:
        return open_input(name, root, *kinds, whole=whole)
    for directory, wanted, noun in ((root / "jobs", job, "job"), (root / "jobs" / job, task, "task")):
        known = [entry.name for entry in directory.iterdir() if not entry.is_file()] if directory.is_dir() else []
        if wanted not in known:
            raise ArtifactError(f"{name}: no {noun} called '{wanted}' has run in {directory}{nearest(wanted, known)}")
    return open_anywhere(str(root / "jobs" / job / task), root, *kinds, whole=whole)


def print_plan(tasks: list[Task], command: Command) -> None:
    """Print what is done, what would run, where, with how many ranks, and why."""
    table = _table("task", "state", "runs on", "directory", "why")
    for task in tasks:
        where = "" if task.done else describe_run(task)
        table.add_row(task.name, "done" if task.done else "to run", where, str(task.directory), _short(task.why))
    _print(table)
    waiting = sum(task.done is None for task in tasks)
    _print(f"{waiting} of {len(tasks)} tasks would run; nothing was started.")


def print_submitted(root: Path, record: JobRecord, tasks: Sequence[FrozenTask]) -> None:
    """Print which SLURM job makes each task, and where."""
    table = _table("task", "SLURM job", "runs on", "directory")
    for task, submitted in zip(tasks, record.tasks, strict=True):
        job = submitted.slurm or "done"
        shared = f" of {submitted.shared_with}" if submitted.shared_with else ""
        shared += f" after preflight {submitted.preflight}" if submitted.preflight else ""
        table.add_row(task.name, f"{job}{shared}", describe_run(task), submitted.directory)
    _print(table)
    if any(submitted.slurm for submitted in record.tasks):
        _print(f"submitted; how far it is: {say(f'status {record.name}', root)}")
    else:
        _print("nothing to submit: all was made before (run.* and tracker say how, not what; a changed setting reruns)")


def describe_run(task: Task | FrozenTask) -> str:
    """Say what runs a task."""
    run = task.run
    ranks = f"{run.ranks} rank{'s' if run.ranks > 1 else ''}"
    if not isinstance(run, Slurm):
        return f"{run.kind}, {ranks}"
    if is_array(run, task.stage):
        return f"array of {run.ranks}"
    gpus = f", {run.gpus_per_node} GPU{'s' * (run.gpus_per_node > 1)} on each" if run.gpus_per_node else ""
    return f"{run.nodes} node{'s' if run.nodes > 1 else ''}, {ranks}{gpus}"


def print_settings(group: str, kind: str) -> None:
    """Print every setting of a choice, with type and default, and of all that it holds.

    Args:
        group: "stage", or "run"; any other `kind` of this than "local" is a cluster.

    Raises:
        ConfigError: If there is no such stage.
    """
    choices = choices_of(AnyStage if group == "stage" else AnyRun)
    if group == "stage" and kind not in choices:
        raise ConfigError(f"stage: no stage is called '{kind}'{nearest(kind, list(choices))}")
    schema = choices.get(kind, Slurm).model_json_schema()
    for name, node in {f"{group}={kind}": schema, **schema.get("$defs", {})}.items():
        _print(f"{name}: {node.get('description', '')}\n")
        table = _table("key", "type", "default")
        for key, field in node.get("properties", {}).items():
            default = json.dumps(field["default"]) if "default" in field else "(needed)"
            table.add_row(f"  {key}", _type(field), default)
        _print(table)
        _print("")


def _type(node: Mapping[str, Any]) -> str:
    """Return the type of a JSON schema in a few words."""
    branches = node.get("anyOf") or node.get("oneOf")
    if branches:
        return " | ".join(_type(branch) for branch in branches)
    if "$ref" in node:
        return str(node["$ref"]).rsplit("/", 1)[1]
    if "const" in node or "enum" in node:
        return " | ".join(map(str, node.get("enum", [node.get("const")])))
    if node.get("type") == "array":
        return f"list of {_type(node.get('items', {}))}"
    return str(node.get("type", "any"))


def _short(why: str) -> str:
    """Return the first three reasons, and how many more there are."""
    reasons = why.split("; ")
    return "; ".join([*reasons[:3], f"and {len(reasons) - 3} more"]) if len(reasons) > 3 else why


def print_task(task: Task) -> None:
    """Print one line for a task that has just ended."""
    if task.done is not None:
        _print(made_line(task.name, task.stage, task.done))


def made_line(name: str, stage: Stage, made: Artifact) -> str:
    """Return one line for a task that has ended well."""
    return "  ".join([f"{name} done in {clock(made.manifest.made.seconds)}", *filter(None, stage.headline(made.stats))])


def print_end(tasks: list[Task], ran: list[str], command: Command, job: str | None) -> None:
    """Print what every finished task made, and where the results that people open are."""
    print_made({task.name: task.done.manifest if task.done else None for task in tasks}, ran)
    results = []
    for task in tasks:
        if task.done is not None and task.stage.result is not None:
            path = Path(command.root) / "jobs" / job / task.name if job else task.done.path
            results.append((task.name, path / task.stage.result))
    if not ran:
        _print("nothing to run: all was made before (run.* and tracker say how, not what; a changed setting reruns)")
    if command.stage is not None and tasks[0].done is not None:
        seen = bool(ran) and tasks[0].stage.streams and terminal_width() is not None
        for line in () if seen else tasks[0].stage.show(tasks[0].done):
            _print(line)
        results = results or [(tasks[0].name, tasks[0].done.path)]
    for name, path in results:
        _print(f"{name}: {path}")


def print_made(made: Mapping[str, Manifest | None], ran: Collection[str]) -> None:
    """Print what each task made; null is one that is not done. Those of `ran` were made just now."""
    table = _table("task", "made", "seconds", "result", "")
    for name, manifest in made.items():
        if manifest is None:
            table.add_row(name, "", "", "", "not done")
        else:
            amount, number = headline(manifest)
            state = "" if name in ran else "done before"
            table.add_row(name, amount, f"{manifest.made.seconds:.1f}", number, state)
    _print(table)


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, justify="right" if heading == "seconds" else "left", no_wrap=True)
    return table


def _print(what: Table | str) -> None:
    """Print without folding lines or padding them: paths can be copied, and a narrow terminal wraps them itself."""
    console = Console(width=1000, highlight=False)
    with console.capture() as text:
        console.print(what, crop=False, soft_wrap=isinstance(what, str), markup=False)
    print("\n".join(line.rstrip() for line in text.get().splitlines()), flush=True)
