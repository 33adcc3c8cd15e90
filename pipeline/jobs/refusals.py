"""What a cluster would refuse of a job, said before anything is frozen or submitted; all of it together."""

import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.artifact import MANIFEST, WORK
from pipeline.errors import LaunchError
from pipeline.jobs.batch import script
from pipeline.jobs.evidence import launcher_runs
from pipeline.jobs.look import cluster_of
from pipeline.jobs.record import RECORD, read_record
from pipeline.jobs.sharing import DECIDING, deciding, own
from pipeline.jobs.words import say
from pipeline.launch import scheduler
from pipeline.launch.claim import live_claim
from pipeline.launch.lock import LOCK, locked, read_owner
from pipeline.launch.scheduler import Partition
from pipeline.launch.slurm import Slurm, megabytes, sbatch_flags, seconds_of, uses_device
from pipeline.settings import nearest
from pipeline.worker import FrozenTask

SHORTEST_S = 60  # SLURM counts in minutes
OWN_LOG = "the logs of a task are in its directory, in logs/"
OWN_WAY = "a submission needs what sbatch prints of itself; `python -m pipeline wait JOB` waits"
OWN_RANKS = "run.ranks_per_node says how many processes, and run.array how many elements"
OWN_FLAGS = {  # of sbatch, each with what to say instead
    "clusters": "submit on a login node of that cluster",
    "partition": "run.partition says it",
    "time": "run.time says it",
    "array": "run.array and run.at_once say how many elements",
    "dependency": "a task waits for those whose output it reads: '@TASK' in the job file",
    "output": OWN_LOG,
    "error": OWN_LOG,
    "open-mode": OWN_LOG,
    "comment": "a submission finds its SLURM jobs by it",
    "job-name": "the job and its task give the name",
    "export": "run.environment and run.setup say what ranks find in their environment",
    "chdir": "a task runs where the job was submitted; cd there",
    "nodes": "run.nodes and run.elastic say how many",
    "ntasks": OWN_RANKS,
    "ntasks-per-node": OWN_RANKS,
    "ntasks-per-core": OWN_RANKS,
    "ntasks-per-socket": OWN_RANKS,
    "ntasks-per-gpu": OWN_RANKS,
    "kill-on-invalid-dep": "what waits for a task that failed never starts",
    **dict.fromkeys(("requeue", "no-requeue"), "a job that is ended early goes on by itself; run.tries says how often"),
    "signal": "run.notice_s says how long before its end a training is told",
    "wrap": "a task says what runs",
    **dict.fromkeys(("parsable", "wait", "test-only", "quiet", "version", "help", "usage"), OWN_WAY),
}
SHORT_FLAGS = {
    **{"a": "array", "d": "dependency", "o": "output", "e": "error", "J": "job-name", "D": "chdir", "N": "nodes"},
    **{"n": "ntasks", "W": "wait", "Q": "quiet", "V": "version", "h": "help"},
    **{"M": "clusters", "p": "partition", "t": "time"},
}
WITHOUT_VALUE = "HIOQVWhksv"  # of sbatch's short flags
VARIABLES = {"time": "SBATCH_TIMELIMIT", "memory_per_node": "SBATCH_MEM_PER_NODE", "gpus_per_node": "SBATCH_GRES"}
ASKED_BY = {"gpus_per_node": ("--gres", "--gpus"), "memory_per_node": ("--mem",), "cpus_per_rank": ("--cpus-per-task",)}

Answers = dict[tuple[str, ...], tuple[str, str] | None]  # of `scheduler.refusal`, by what was asked


@dataclass(frozen=True)
class Cluster:
    """What a cluster has: its partitions by name, and how many elements an array of jobs may have."""

    partitions: dict[str, Partition]
    max_array: int

    def partitions_of(self, run: Slurm) -> list[Partition]:
        """Return the known partitions that a task may go to: run.partition can name several, as "a,b"."""
        if names := run.partition or os.environ.get("SBATCH_PARTITION"):
            return [self.partitions[name] for name in names.split(",") if name in self.partitions]
        return [one for one in self.partitions.values() if one.is_default]

    def limit_s(self, run: Slurm) -> int | None:
        """Return the seconds of the longest job that every partition of a task takes; null where they take any."""
        return min((one.limit_s for one in self.partitions_of(run) if one.limit_s is not None), default=None)


def read_cluster() -> Cluster:
    """Return what this cluster has. Raises LaunchError if SLURM does not say, or would submit to another one."""
    scheduler.refuse_other_clusters()
    return Cluster(scheduler.partitions(), scheduler.max_array())


def bounded(run: Slurm, cluster: Cluster) -> Slurm:
    """Return the settings of a data task with an array no longer than the cluster allows."""
    most = min(run.ranks, cluster.max_array)
    return run.model_copy(update={"array": most, "ranks": most})


def live_jobs(root: Path, name: str) -> list[str]:
    """Return the ids of the SLURM jobs of a job that wait or run. Raises LaunchError if SLURM does not answer."""
    if not (root / "jobs" / name / RECORD).is_file():
        return []
    record = read_record(root, name)
    if cluster_of(record) not in (None, scheduler.cluster()):  # who submits such a task anew is told where to ask
        return []
    ids = {one for task in own(record) for one in (task.slurm, task.preflight) if one}
    return sorted({scheduler.array_of(seen.id) for seen in scheduler.look(ids).values() if not seen.is_over}, key=int)


def refuse_live(root: Path, name: str) -> None:
    """Refuse to start a job anew that is being submitted, or whose SLURM jobs wait or run.

    One whose submission died is not refused: what it has submitted is found by its claims.

    Raises:
        LaunchError: If it is under way, or SLURM does not say.
    """
    if (root / "jobs" / name / RECORD).is_file() and (record := read_record(root, name)).pid is not None:
        if record.launcher == "slurm" and launcher_runs(record):
            raise LaunchError(f"{name}: process {record.pid} on {record.host} is submitting a job of this name")
        return
    if live := live_jobs(root, name):
        raise under_way(root, name, f"SLURM job {', '.join(live)}")


def under_way(root: Path, name: str, where: str) -> LaunchError:
    """Return the error of a job that is started while one of its name waits or runs."""
    return LaunchError(
        f"{name}: a job of this name is under way ({where}); wait for it ({say(f'wait {name}', root)}), end it "
        f"({say(f'cancel {name}', root)}), or call this one name=OTHER"
    )


def refuse_working(tasks: Sequence[FrozenTask]) -> None:
    """Refuse tasks that somebody works at without a claim. Raises LaunchError with who does."""
    for directory in (Path(task.directory) for task in tasks):
        if not _signed(directory, LOCK + "*"):
            continue
        with deciding(directory):  # a submission holds the lock for a moment too, and then leaves a claim
            if live_claim(directory) is None:
                if read_owner(directory) is not None:
                    with locked(directory):
                        pass
                refuse_elements(directory)


def refuse_elements(directory: Path) -> None:
    """Refuse a task at which elements of an array work, or publish. Raises LaunchError with who does."""
    for name in _signed(directory, f"{LOCK}-*"):
        with locked(directory, name):
            pass


def _signed(directory: Path, pattern: str) -> list[str]:
    """Return the names of the locks of a task that were not released, as far as anybody knows."""
    names = sorted(path.name for path in (directory / WORK).glob(pattern) if not path.name.endswith(".now"))
    return [name for name in names if name != DECIDING and read_owner(directory, name) is not None]


def refusals(root: Path, tasks: Sequence[FrozenTask], cluster: Cluster | None, said: Slurm | None = None) -> list[str]:
    """Return a line for everything that would be refused.

    Args:
        cluster: Null where there is no SLURM: then only what is wrong everywhere is found.
        said: The settings as the command line said them, so that a line names the one to change.

    Raises:
        LaunchError: If SLURM does not answer.
    """
    found: dict[str, list[str]] = {}
    answers: Answers = {}
    for task in tasks:
        if not (Path(task.directory) / MANIFEST).exists():
            for problem in _refused(task, cluster, said, answers):
                found.setdefault(problem, []).append(task.name)
    lines = [f"{problem} ({', '.join(names)})" for problem, names in found.items()]
    setup = {line: None for task in tasks if isinstance(task.run, Slurm) for line in task.run.setup}
    return [*_unusable(root), *_broken(setup), *lines]


def _broken(setup: Iterable[str]) -> Iterator[str]:
    """Say which lines of `run.setup` are no shell: each is read for itself."""
    if (bash := shutil.which("bash")) is None:
        return
    for line in setup:
        read = subprocess.run([bash, "-n", "-c", line], capture_output=True, text=True)
        if read.returncode:
            said = read.stderr.splitlines()[0].rpartition(": ")[2]
            yield f"run.setup: '{line}' is no whole command of bash ({said}); each line stands alone, an if with its fi"


def _contradictions(task: FrozenTask, said: Slurm | None) -> Iterator[str]:
    """Say which flags of a task are the pipeline's own, also where they are cut short as sbatch allows."""
    assert isinstance(task.run, Slurm)
    for flag in task.run.flags:
        if flag.startswith("--"):
            start = flag[2:].partition("=")[0].strip()
            names = [start] if start in OWN_FLAGS else [name for name in OWN_FLAGS if name.startswith(start)]
        else:
            names = [SHORT_FLAGS[letter] for letter in _letters(flag) if letter in SHORT_FLAGS]
        if names:
            yield f"{_place('flags', task, said)}: '{flag}' cannot be asked for here: {OWN_FLAGS[names[0]]}"


def _letters(flag: str) -> str:
    """Return the short flags of a word; after the first that takes a value comes that value."""
    letters = flag[1:] if flag.startswith("-") else ""
    return next((letters[: i + 1] for i, letter in enumerate(letters) if letter not in WITHOUT_VALUE), letters)


def unseen(run: Slurm) -> Iterator[str]:
    """Say what this machine does not have, though the nodes may."""
    if run.python is not None and "/" in run.python and not Path(run.python).exists():
        yield f"run.python: {run.python} is not on this machine; right only if the nodes have it"


def _unusable(root: Path) -> Iterator[str]:
    place = root.absolute()
    if "\\" in str(place) or not str(place).isprintable():
        yield f"root: wanted a path that sbatch can write logs to, without '\\' and line ends, found {str(place)!r}"
    while not place.exists() and not place.is_symlink():
        place = place.parent
    if not place.is_dir():
        yield f"root: wanted a directory, but {place} is a file; root=DIR chooses another place"
    elif not os.access(place, os.W_OK | os.X_OK):
        yield f"root: cannot write in {place}; root=DIR chooses another place"


def _refused(task: FrozenTask, cluster: Cluster | None, said: Slurm | None, answers: Answers) -> Iterator[str]:
    run = task.run
    assert isinstance(run, Slurm)
    problems = []
    if run.time is not None and (seconds_of(run.time) or 0) < SHORTEST_S:
        problems.append(f"{_place('time', task, said)}: wanted a minute or more, found '{run.time}'")
    problems += _contradictions(task, said)
    if cluster is not None and not problems:
        problems += _too_much(task, run, cluster, said)
    if cluster is not None and not problems and (answer := _ask(task, run, cluster, answers)) is not None:
        problems.append(_blame(task, run, said, *answer))
    yield from problems


def _blame(task: FrozenTask, run: Slurm, said: Slurm | None, setting: str, problem: str) -> str:
    """Say what SLURM complains of: words of `flags` where those ask for it, else the setting, else a variable."""
    asked = ASKED_BY.get(setting, (f"--{setting}=",))
    flags = [flag for flag in run.flags if flag.startswith(asked) or f"'{flag.partition('=')[0]}'" in problem]
    refused = f"is refused: {problem.partition(' Try ')[0]}"
    if flags or setting == "flags":
        return f"{_place('flags', task, said)}: '{' '.join(flags or run.flags)}' {refused}"
    if value := getattr(run, setting, None):
        return f"{_place(setting, task, said)}: '{value}', which this task asks for, {refused}"
    name = VARIABLES.get(setting, f"SBATCH_{setting.upper()}")
    if setting and (value := os.environ.get(name)):
        return f"{name}: '{value}', which is set here, {refused}"
    return f"run: what this task asks for {refused}"


def _ask(task: FrozenTask, run: Slurm, cluster: Cluster, answers: Answers) -> tuple[str, str] | None:
    """Return which setting of a task SLURM would refuse, and why; null if it would take the task, perhaps later."""
    words = ("sbatch", *sbatch_flags(run, task.stage, cluster.limit_s(run)), str(script()))
    if words not in answers:
        answers[words] = scheduler.refusal(words)
    answer, partitions = answers[words], cluster.partitions_of(run)
    if answer is not None and scheduler.NOT_AVAILABLE in answer[1] and partitions:
        largest = max(partitions, key=lambda one: one.memory_mb)
        if megabytes(run.memory_per_node or "0") > largest.memory_mb:
            return "memory_per_node", f"nodes of '{largest.name}' have {largest.memory_mb}M"
        if not all(one.is_whole for one in partitions):
            return None  # as far as anybody can tell
    return answer


def _too_much(task: FrozenTask, run: Slurm, cluster: Cluster, said: Slurm | None) -> Iterator[str]:
    for name in (run.partition or "").split(","):
        if name and name not in cluster.partitions:
            known = nearest(name, list(cluster.partitions))
            yield f"{_place('partition', task, said)}: no partition is called '{name}'{known}"
    fewest = run.elastic or run.nodes
    largest = max(cluster.partitions_of(run), key=lambda one: one.num_nodes, default=None)
    if largest is not None and fewest > largest.num_nodes:
        yield (
            f"{_place('elastic' if run.elastic else 'nodes', task, said)}: wanted {fewest} nodes, but partition "
            f"'{largest.name}' has {largest.num_nodes}"
        )


def _place(setting: str, task: FrozenTask, said: Slurm | None) -> str:
    """Return the dotted path of the setting that a task has this of."""
    if said is not None and setting:
        if getattr(said.tasks.get(task.name), setting, None) is not None:
            return f"run.tasks.{task.name}.{setting}"
        layer = "model" if uses_device(task.stage) else "data"
        if task.stage.ranks != "group" and getattr(getattr(said, layer), setting, None) is not None:
            return f"run.{layer}.{setting}"
    return f"run.{setting}" if setting else "run"
