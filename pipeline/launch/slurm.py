"""What a cluster is and what a task asks of it: the settings of `run=slurm` and of every cluster in conf/run."""

import re
import shlex
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from pipeline.progress import clock
from pipeline.settings import Input, Settings, marked
from pipeline.stage import Run, Stage, TaskName

TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d{1,2}))?(?::(?P<third>\d{1,2}))?")
MEMORY = re.compile(r"(\d+)([KMGT]?)")


def _written(value: Any) -> Any:
    """Return what a person wrote where YAML makes a number of it, as of an account or a variable."""
    return str(value) if type(value) is int else value


def _time(value: Any) -> Any:
    """Return a limit of time as sbatch knows it. Numbers from 60 on are refused: YAML makes one of 24:00:00 too."""
    if type(value) is int and value >= 60:
        quoted = f'wanted "{clock(value)}", in quotes, or "{value}" for minutes'
        raise ValueError(f"YAML makes {value} of {clock(value)} without quotes; {quoted}")
    if isinstance(value := _written(value), str) and TIME.fullmatch(value) is None:
        raise ValueError(f'\'{value}\' is no time; wanted "8:00:00" or "1-12:00:00"')
    return value


def _memory(value: str) -> str:
    if MEMORY.fullmatch(value) is None:
        raise ValueError(f"'{value}' is no memory; wanted a number and K, M, G or T, as \"64G\"")
    if value.isdecimal() and value != "0":
        raise ValueError(f'{value} has no unit, so SLURM would give {value} MB; wanted "{value}G", or "{value}M"')
    return value


def _flags(words: list[str]) -> list[str]:
    """Refuse a word that belongs to no flag, which sbatch would take for the script."""
    for before, word in pairwise(["", *words]):
        if not word.startswith("-") and (not before.startswith("-") or "=" in before):
            whole = f'; a comma separates, so quote "{before},{word}"' if "=" in before else ""
            raise ValueError(f"'{word}' does not begin with '-'{whole}")
    return words


def _lines(said: Any) -> Any:
    """Return lines of shell one for one, whether they were written as one text or as several."""
    texts = [said] if isinstance(said, str) else said
    if not isinstance(texts, list):
        return said
    return [line for text in texts for line in (text.splitlines() if isinstance(text, str) else [text])]


def _words(said: Any) -> Any:
    """Return the words of a text."""
    return shlex.split(said) if isinstance(said, str) else said


Text = Annotated[str, BeforeValidator(_written)]
Time = Annotated[str, BeforeValidator(_time)]
Memory = Annotated[Text, AfterValidator(_memory)]
Lines = Annotated[list[str], BeforeValidator(_lines)]
Words = Annotated[list[Text], BeforeValidator(_words)]
Flags = Annotated[Words, AfterValidator(_flags)]

# what only the nodes of a training have; other tasks ask for it in `data` or `tasks`
OF_TRAINING = ("nodes", "ranks_per_node", "gpus_per_node", "memory_per_node", "constraint")


class Resources(Settings):
    """What is asked of SLURM for a task; null asks for nothing, or is as said one level up.

    Attributes:
        partition, account, qos, constraint: As sbatch knows them.
        time: Limit of one job, as "8:00:00" or "2-00:00:00"; a training that needs longer goes on in a chain of jobs.
        nodes: Machines of a training.
        ranks_per_node: Processes of a training on each; null is one for each GPU, or one.
        gpus_per_node: GPUs of each machine.
        cpus_per_rank: Processors of each process.
        memory_per_node: As "64G"; "0" is all that a machine has.
        array: Processes of a data task, each an element of an array of jobs.
        at_once: Elements of an array that may run at a time.
        flags: More flags of sbatch, as they are.
    """

    partition: Text | None = None
    account: Text | None = None
    qos: Text | None = None
    constraint: Text | None = None
    time: Time | None = None
    nodes: int | None = Field(default=None, ge=1)
    ranks_per_node: int | None = Field(default=None, ge=1)
    gpus_per_node: int | None = Field(default=None, ge=0)
    cpus_per_rank: int | None = Field(default=None, ge=1)
    memory_per_node: Memory | None = None
    array: int | None = Field(default=None, ge=1)
    at_once: int | None = Field(default=None, ge=1)
    flags: Flags | None = None


class Slurm(Run):
    """Jobs of a SLURM cluster: one for a task, an array for a data task.

    Attributes:
        partition ... flags: As of `Resources`, for the trainings.
        data: What tasks without a model ask for instead; of the trainings neither nodes, GPUs, memory nor constraint.
        model: What tasks that compute with a model but do not train ask for instead of what one rank of a training has.
        tasks: What a task asks for instead, by its name.
        setup: Lines of shell that make the environment of a job: modules, an environment to activate.
        python: The interpreter; null is that of the submission, or where there is a setup what it calls python.
        container: Words before the interpreter of every rank: [apptainer, exec, --nv, IMAGE].
        srun: More flags of srun, as they are.
        environment: Variables of every rank: of NCCL and the interconnect.
        elastic: The fewest nodes that a training goes on with where it cannot have all; null is all of them, and so are
            more than `nodes`.
        preflight: Whether the nodes are tried by a short job before a training on several of them.
        notice_s: How long before the end of a job's time its training is told to save and stop; where saving took so
            long that twice as much is more, that.
    """

    kind: Literal["slurm"] = "slurm"
    partition: Text | None = None
    account: Text | None = None
    qos: Text | None = None
    constraint: Text | None = None
    time: Time | None = None
    nodes: int = Field(default=1, ge=1)
    ranks_per_node: int | None = Field(default=None, ge=1)
    gpus_per_node: int = Field(default=0, ge=0)
    cpus_per_rank: int | None = Field(default=None, ge=1)
    memory_per_node: Memory | None = None
    array: int = Field(default=4, ge=1)
    at_once: int | None = Field(default=None, ge=1)
    flags: Flags = []
    data: Resources = Resources()
    model: Resources = Resources()
    tasks: dict[TaskName, Resources] = {}
    setup: Lines = []
    python: str | None = None
    container: Words = []
    srun: Flags = []
    environment: dict[str, Text] = {}
    elastic: int | None = Field(default=None, ge=1)
    preflight: bool = True
    notice_s: int = Field(default=120, ge=1)
    tries: int = Field(default=3, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _count_ranks(cls, data: Any) -> Any:
        """Let `ranks` be those of all nodes, whichever of the two was said."""
        if not isinstance(data, Mapping):
            return data
        nodes, ranks, each = (data.get(name) or 0 for name in ("nodes", "ranks", "ranks_per_node"))
        nodes, each = nodes or 1, each or (0 if ranks else data.get("gpus_per_node") or 1)
        if not all(isinstance(number, int) for number in (nodes, ranks, each)):
            return data  # for words of its own
        if ranks and ((each and ranks != nodes * each) or ranks % nodes):
            raise ValueError(f"{ranks} ranks do not spread over {nodes} nodes; say run.ranks_per_node alone")
        return {**data, "ranks": ranks or nodes * each}

    @property
    def each(self) -> int:
        """Ranks of a training on each of its nodes."""
        return self.ranks // self.nodes

    def of(self, name: str, stage: Stage) -> Self:
        """Return the settings of one task, with `ranks` all of its processes."""
        data = {field: getattr(self, field) for field in type(self).model_fields}
        layers, on_device = [self.tasks.get(name, Resources())], uses_device(stage)
        if stage.ranks != "group":
            layers.insert(0, self.model if on_device else self.data)
        if not on_device:
            data |= {field: type(self).model_fields[field].default for field in OF_TRAINING}
        for layer in layers:
            data |= {field: value for field, value in layer if value is not None}
        said = {field: value for layer in layers for field, value in layer if value is not None}
        each = said.get("ranks_per_node") or said.get("gpus_per_node") or self.each
        if stage.ranks == "group":
            data |= {"ranks_per_node": each, "ranks": data["nodes"] * each}
        else:
            data |= {"nodes": 1, "ranks_per_node": None, "ranks": data["array"] if stage.ranks == "units" else 1}
            if on_device:
                memory = said.get("memory_per_node") or share_of(data["memory_per_node"], self.each)
                data |= {"gpus_per_node": min(data["gpus_per_node"], 1), "memory_per_node": memory}
        if data["nodes"] <= (data["elastic"] or 0):
            data["elastic"] = None
        return self.model_copy(update={**data, "tasks": {}, "data": Resources(), "model": Resources()})

    def on(self, nodes: int) -> Self:
        """Return the same on another number of nodes."""
        return self.model_copy(update={"nodes": nodes, "ranks": nodes * self.each})


def share_of(memory: str | None, parts: int) -> str | None:
    """Return that part of the memory of a node, in whole megabytes; "0", all that it has, stays all."""
    if memory is None or memory == "0" or parts == 1:
        return memory
    return f"{max(1, int(megabytes(memory) / parts))}M"


def megabytes(memory: str) -> float:
    """Return the megabytes of an amount of memory as sbatch writes it."""
    found = MEMORY.fullmatch(memory)
    assert found is not None
    return float(found[1]) * 1024.0 ** ("KMGT".index(found[2] or "M") - 1)


def is_array(run: Slurm, stage: Stage) -> bool:
    """Return whether a task is an array of jobs; `run` is of this task, from `Slurm.of`."""
    return stage.ranks == "units" and run.ranks > 1


def uses_device(stage: Stage) -> bool:
    """Return whether a stage computes with a model, so that it wants the nodes of a training."""
    return stage.ranks == "group" or any("model" in mark.kinds for _, mark, _ in marked(stage, Input))


def seconds_of(time: str) -> int | None:
    """Return the seconds of a time limit as SLURM writes it: minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S; null if none."""
    if (found := TIME.fullmatch(time)) is None:
        return None
    days, *parts = (None if part is None else int(part) for part in found.groups())
    given = [part for part in parts if part is not None]
    if days is not None:
        hours, minutes, seconds = [*given, 0, 0][:3]
        return 86400 * days + 3600 * hours + 60 * minutes + seconds
    if len(given) == 3:
        return 3600 * given[0] + 60 * given[1] + given[2]
    return 60 * given[0] + (given[1] if len(given) == 2 else 0)


def sbatch_flags(run: Slurm, stage: Stage, limit_s: int | None) -> list[str]:
    """Return the flags of sbatch for what a task asks for.

    Args:
        run: Of this task, from `Slurm.of`.
        limit_s: Longest job that the partition takes, in seconds; null where it takes any.
    """
    named = {name: getattr(run, name) for name in ("partition", "account", "qos", "constraint")}
    flags = [f"--{name}={value}" for name, value in named.items() if value is not None]
    if run.time is not None:
        wanted = seconds_of(run.time)
        flags.append(f"--time={-(-limit_s // 60) if limit_s and wanted and wanted > limit_s else run.time}")
    if is_array(run, stage):
        share = f"%{run.at_once}" if run.at_once else ""
        flags += [f"--array=0-{run.ranks - 1}{share}", "--nodes=1", "--ntasks=1"]
    else:
        flags += _nodes(run)
    if run.cpus_per_rank is not None:
        flags.append(f"--cpus-per-task={run.cpus_per_rank}")
    if run.memory_per_node is not None:
        flags.append(f"--mem={run.memory_per_node}")
    if run.gpus_per_node and not any(flag.startswith(("--gres", "--gpus")) for flag in run.flags):
        flags.append(f"--gres=gpu:{run.gpus_per_node}")  # unless a site wants it said in another way
    return [*flags, *run.flags]


def _nodes(run: Slurm) -> list[str]:
    if run.elastic is None:
        return [f"--nodes={run.nodes}", f"--ntasks-per-node={run.each}"]
    # Note: with --ntasks-per-node SLURM gives the fewest nodes of a range, even where all are free
    return [f"--nodes={run.elastic}-{run.nodes}", f"--mincpus={run.each * (run.cpus_per_rank or 1)}"]
