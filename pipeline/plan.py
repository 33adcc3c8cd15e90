"""A job made concrete: checked, ordered tasks with fingerprints, directories, and why each must run."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from pipeline.artifact import MANIFEST, WORK, Artifact, open_artifact, read_manifest
from pipeline.errors import ArtifactError, ConfigError
from pipeline.launch import AnyRun
from pipeline.launch.local import Local
from pipeline.launch.slurm import Slurm
from pipeline.remote import is_url
from pipeline.settings import Input, Settings, Source, decode, encode, fingerprint, marked, nearest
from pipeline.stage import ATTEMPT_FILE, CHECKPOINTS, PARTIAL, Stage, TaskName, say_problem
from pipeline.stages import AnyStage
from pipeline.stages.imported import Imported, open_input
from pipeline.text.sources import identify
from pipeline.track import AnyTracker, Jsonl, TensorBoard


class Command(Settings):
    """Everything that a command line and its YAML files say.

    Attributes:
        root: Directory of all artifacts.
        name: What the run is called; null is what its job is, or its stage.
        plan: Only say what would be done.
        stage: One stage to run alone, or
        tasks: the stages of a job by task name; an input `@name` is the output of that task.
    """

    root: str = Field(default="artifacts", min_length=1)
    name: TaskName | None = None
    plan: bool = False
    stage: AnyStage | None = None
    tasks: dict[TaskName, AnyStage] = Field(default={})
    run: AnyRun = Local()
    tracker: AnyTracker = Jsonl()


class StageHolder(Settings):
    """Decodes the stage settings in a manifest."""

    stage: Annotated[AnyStage | Imported, Field(discriminator="kind")]


@dataclass
class Task:
    """One stage of a job.

    Attributes:
        where: Dotted path of its settings.
        run: How it runs: the command's settings for this task.
        needs: The tasks whose output it reads, by the dotted path of the setting that names each.
        outside: Path or URL of the artifacts that no task of the job makes, by the same.
        inputs: Directory of each input, by the same.
        sources: Identity of its raw files at planning, by the same.
        memory_bytes: What each rank needs at the least; null where that is not known.
        done: Its artifact, if that is complete.
        why: Why it must run, if it is not.
    """

    name: str
    where: str
    stage: AnyStage
    run: AnyRun
    needs: dict[str, str] = field(default_factory=dict)
    outside: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, Path] = field(default_factory=dict)
    sources: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    directory: Path = Path()
    memory_bytes: int | None = None
    done: Artifact | None = None
    why: str = ""


def plan(command: Command, job: str | None) -> list[Task]:
    """Return the tasks of a command in an order in which they can run, each with its state.

    Args:
        job: What the run is called; null of a stage that has no name of its own.

    Raises:
        ConfigError: With every problem that is known without running anything.
        ArtifactError: If an input from outside is missing, damaged or of the wrong kind.
    """
    if command.stage is None and not command.tasks:
        raise ConfigError(
            "nothing to do: say job=NAME or stage=KIND; python -m pipeline --help lists both"
            if job == command.name
            else "tasks: the job has none"
        )
    if command.stage is not None and command.tasks:
        raise ConfigError("stage: a job brings its own stages; say either job=NAME or stage=KIND")
    if isinstance(command.tracker, TensorBoard) and find_spec("tensorboard") is None:
        raise ConfigError("tracker.kind: tensorboard is not installed; pip install -e '.[tensorboard]' brings it")
    if is_url(command.root):
        raise ConfigError(
            f"root: wanted a directory of this machine, found '{command.root}'; an input may be a URL, but artifacts "
            "are written to a disk"
        )
    if command.stage is not None:
        stages = {str(command.stage.kind): (command.stage, "stage")}
    else:
        stages = {name: (stage, f"tasks.{name}") for name, stage in command.tasks.items()}
    if command.stage is None and isinstance(command.run, Slurm):
        _check_names(command.run, list(stages))
    tasks = {name: Task(name, where, stage, command.run.of(name, stage)) for name, (stage, where) in stages.items()}
    _connect(tasks)
    ordered = _order(tasks)
    outside = {task.name: _open_outside(task, Path(command.root)) for task in ordered}
    _check(ordered, tasks, outside)
    for task in ordered:
        _place(task, tasks, outside[task.name], command, job)
    _check_inputs(ordered, tasks, outside)
    return ordered


def _check_names(run: Slurm, names: list[str]) -> None:
    """Refuse settings for tasks that the job does not have."""
    unknown = [name for name in run.tasks if name not in names]
    problems = [f"run.tasks.{name}: the job has no such task{nearest(name, names)}" for name in unknown]
    if problems:
        raise ConfigError(*problems)


def _connect(tasks: Mapping[str, Task]) -> None:
    """Tell references to tasks from paths, and refuse references that cannot be."""
    problems = []
    for task in tasks.values():
        for name, mark, value in marked(task.stage, Input):
            place = f"{task.where}.{name}"
            if not value.startswith("@"):
                task.outside[name] = value
                continue
            other = tasks.get(value[1:])
            if other is None:
                problems.append(f"{place}: no task is called '{value[1:]}'{nearest(value[1:], list(tasks))}")
            elif other.stage.produces not in mark.kinds and mark.kinds:
                wanted = " or ".join(mark.kinds)
                problems.append(
                    f"{place}: wanted an artifact of kind {wanted}, but task '{other.name}' makes one of "
                    f"kind '{other.stage.produces}'"
                )
            else:
                task.needs[name] = other.name
    if problems:
        raise ConfigError(*problems)


def _order(tasks: Mapping[str, Task]) -> list[Task]:
    graph = {name: dict.fromkeys(task.needs.values()) for name, task in tasks.items()}
    try:
        return [tasks[name] for name in TopologicalSorter(graph).static_order()]
    except CycleError as error:
        cycle = " → ".join(reversed(error.args[1]))
        raise ConfigError(f"tasks: these need one another, so none can be first: {cycle}") from None


def _open_outside(task: Task, root: Path) -> dict[str, Artifact]:
    kinds = {name: mark.kinds for name, mark, _ in marked(task.stage, Input)}
    return {
        name: open_input(place, root, *kinds[name], where=f"{task.where}.{name}")
        for name, place in task.outside.items()
    }


def _check(ordered: list[Task], tasks: Mapping[str, Task], outside: Mapping[str, Mapping[str, Artifact]]) -> None:
    """Let every stage look for what cannot work, given the settings of what makes its inputs."""
    problems = []
    for task in ordered:
        upstream: dict[str, Stage] = {}
        for name, other in task.needs.items():
            upstream[name] = tasks[other].stage
            upstream |= {f"{name}/{inner}": tasks[one].stage for inner, one in tasks[other].needs.items()}
        for name, artifact in outside[task.name].items():
            upstream[name] = stage_of(artifact)
        found = list(task.stage.check(upstream, task.run))
        problems += [say_problem(task.where, name, problem) for name, problem in found]
        task.memory_bytes = None if found else task.stage.memory_bytes(upstream, task.run)
    if problems:
        raise ConfigError(*problems)


def _check_inputs(
    ordered: list[Task], tasks: Mapping[str, Task], outside: Mapping[str, Mapping[str, Artifact]]
) -> None:
    """Let every stage that has to run look for what cannot work with those of its inputs that are made."""
    problems = []
    for task in ordered:
        if task.done is None:
            made = {name: artifact for name, other in task.needs.items() if (artifact := tasks[other].done) is not None}
            found = task.stage.check_inputs({**outside[task.name], **made}, task.run)
            problems += [say_problem(task.where, name, problem) for name, problem in found]
    if problems:
        raise ConfigError(*problems)


def stage_of(artifact: Artifact) -> Stage:
    """Return the stage that made an artifact. Raises ArtifactError if this version does not know its settings."""
    try:
        return decode(StageHolder, {"stage": artifact.manifest.stage}).stage
    except ConfigError as error:
        raise ArtifactError(
            f"{artifact.place}: made by another version, whose settings this one does not know ({error.problems[0]}); "
            "make it again"
        ) from None


def _place(
    task: Task, tasks: Mapping[str, Task], outside: Mapping[str, Artifact], command: Command, job: str | None
) -> None:
    """Give a task its fingerprint, directory and state."""
    root = Path(command.root)
    identities: dict[str, Any] = {name: artifact.manifest.fingerprint for name, artifact in outside.items()}
    identities |= {name: tasks[other].fingerprint for name, other in task.needs.items()}
    try:
        task.sources = identify_sources(task.stage)
    except ArtifactError as error:
        raise ArtifactError(f"{task.where}: {error}") from None
    settings = encode(task.stage)
    for name, identity in {**identities, **task.sources}.items():
        _put(settings, name, identity)
    identity = {"stage": settings, "version": task.stage.version}
    if more := task.stage.identity(task.run):
        identity["more"] = more
    task.fingerprint = fingerprint(identity)
    own = root / task.stage.produces / f"{task.name}-{task.fingerprint}"
    places = [own, *sorted(own.parent.glob(f"*-{task.fingerprint}"))]  # another job may call the same task otherwise
    task.directory = next((path for path in places if (path / WORK / "task.json").is_file()), own)
    if (made := next((path for path in places if (path / MANIFEST).is_file()), None)) is not None:
        task.done, task.directory = open_artifact(made, task.stage.produces), made
        if task.done.manifest.fingerprint != task.fingerprint:
            raise ArtifactError(f"{made}: its manifest has another fingerprint; delete it and run this again")
    task.inputs = {name: artifact.path for name, artifact in outside.items()}
    task.inputs |= {name: tasks[other].directory for name, other in task.needs.items()}
    if task.done is None:
        link = root / "jobs" / (job or "") / task.name
        task.why = _why(task, [other for other in task.needs.values() if tasks[other].done is None], link)


def identify_sources(stage: Stage) -> dict[str, Any]:
    """Return the identity of a stage's raw files, by the dotted path of the setting that names them."""
    return {name: identify(value) for name, _, value in marked(stage, Source)}


def _put(data: Any, path: str, value: Any) -> None:
    """Replace the item at a dotted path of nested lists and mappings."""
    *parents, last = path.split(".")
    for key in parents:
        data = data[int(key)] if isinstance(data, list) else data[key]
    data[int(last) if isinstance(data, list) else last] = value


def _why(task: Task, waiting_for: list[str], link: Path) -> str:
    if any((task.directory / WORK).glob(f"{ATTEMPT_FILE}*")):
        return "unfinished: continues" if _is_something_saved(task.directory) else "unfinished: nothing is saved"
    if waiting_for:
        return f"after {', '.join(dict.fromkeys(waiting_for))}"
    if not (link / MANIFEST).is_file():
        return "never made"
    try:
        changed = list(_differences(read_manifest(link).stage, encode(task.stage), ""))
    except ArtifactError:
        return "the last one was made by another version"
    return "; ".join(changed) if changed else "its input or its code changed"


def _is_something_saved(directory: Path) -> bool:
    """Return whether an unfinished task has a checkpoint, a finished unit, or part of one, to go on from."""
    checkpoints = (directory / CHECKPOINTS).rglob("step-*[0-9]")
    return any(checkpoints) or any(any((directory / WORK / notes).glob("*.json")) for notes in ("units", PARTIAL))


def _differences(old: Any, new: Any, path: str) -> Iterator[str]:
    """Yield "key old → new" for every setting that is not the same."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield f"{path} {json.dumps(old)} → {json.dumps(new)}"
