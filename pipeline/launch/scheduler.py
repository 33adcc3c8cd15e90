"""The only door to SLURM's commands: submit, look, cancel, requeue. What they print comes back as plain data."""

import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from tempfile import TemporaryFile
from typing import IO

from pipeline.errors import LaunchError
from pipeline.launch.slurm import seconds_of
from pipeline.progress import tell

PATIENCE_S = (1.0, 2.0, 4.0, 8.0, 16.0)  # before each further try of a command that failed for the moment
FOR_THE_MOMENT = re.compile(
    "timed out|Unable to contact slurm controller|Connection refused|Zero Bytes were transmitted"
    "|Transport endpoint|slurm_receive_msg|try again|temporarily unavailable",
    re.IGNORECASE,
)
QUEUE_IS_FULL = re.compile("temporarily unable to accept|Resource temporarily unavailable", re.IGNORECASE)  # of sbatch
NOT_NOW = re.compile(
    "the queue is full|Required node not available|nodes .*(busy|drained|down)|submit limit|Job violates", re.IGNORECASE
)
OF_A_JOB = ("SLURM_", "SRUN_")  # how variables begin that SLURM sets in a job, and sbatch and srun read as options
TO_REACH_SLURM = ("SLURM_CONF", "SLURM_JWT")
CLUSTERS = ("SBATCH_CLUSTERS", "SLURM_CLUSTERS")  # which sbatch, squeue, scontrol and scancel follow, but not sacct
OF_A_PERSON = ("SQUEUE_", "SINFO_", "SCANCEL_", "SACCT_")  # how variables begin that change what those print or do
IN_UTC = {"TZ": "UTC0"}  # local time has an hour twice in a year
ANSWER = re.compile(r"(\d+)(;\S+)?")  # of sbatch: "12;cluster" where there are several
BLAMED = {  # what sbatch says of a setting that it does not like
    "partition": "partition specified|partition name|partition not available|group not permitted to use this partition",
    "account": "Invalid account",
    "qos": "Invalid qos",
    "constraint": "Invalid feature|--constraint",
    "gpus_per_node": "generic resource|gres|Invalid Trackable RESource",
    "time": "time limit|--time specification|Invalid time",
    "memory_per_node": "memory specification|--mem",
    "nodes": "Node count|--nodes",
    "cpus_per_rank": "More processors requested|cpu count|--cpus-per-task",
    "array": "job array specification",
    "flags": "unrecognized option|invalid option|reservation|ambiguous|requires an argument|Invalid --",
}
NOT_AVAILABLE = "Requested node configuration is not available"  # for ever, or while nodes are down
UP = ("idle", "mixed", "allocated", "completing")
OVER = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",
)


class NoSlurm(LaunchError):
    """This machine has none of SLURM's commands."""


@dataclass(frozen=True)
class Seen:
    """What SLURM says of a job, or of an element of an array.

    Attributes:
        id: As "12", or "12_3".
        state: As SLURM writes it: PENDING, RUNNING, COMPLETED, …
        reason: Why it waits, or why it ended.
        nodes: Where it runs or ran, as SLURM abbreviates them.
        begins: When it began or is to begin, as "2026-01-31T19:39:00"; "N/A" where SLURM does not know.
    """

    id: str
    state: str
    reason: str = ""
    nodes: str = ""
    begins: str = ""

    @property
    def is_over(self) -> bool:
        """Whether it will not run any more."""
        return self.state in OVER


@dataclass(frozen=True)
class Partition:
    """A partition of a cluster.

    Attributes:
        limit_s: The longest job that it takes, in seconds; null where it takes any.
        is_whole: Whether none of its nodes is down or kept back.
        memory_mb: What the node with the most memory has.
    """

    name: str
    is_default: bool
    num_nodes: int
    limit_s: int | None
    is_whole: bool = True
    memory_mb: int = 0


def command(
    *words: str,
    environment: Mapping[str, str] | None = None,
    before_retry: Callable[[], str | None] = lambda: None,
    pauses_s: Sequence[float] = PATIENCE_S,
    locks: Sequence[int] = (),
) -> str:
    """Run one of SLURM's commands and return what it prints; one that fails for the moment is run again, and says so.

    Args:
        before_retry: Called before each further try; what it returns, unless null, is the result.
        pauses_s: Before each further try.
        locks: Descriptors of locks that are held until the command has ended, whatever becomes of this process.

    Raises:
        LaunchError: If there is no such command, or it fails, with what it says.
    """
    for number, pause_s in enumerate((*pauses_s, None), 1):
        status, printed, problem = _run(words, environment, locks)
        if status == 0:
            return printed
        if words[0] == "sbatch" and QUEUE_IS_FULL.search(problem):  # it has waited for that itself, two minutes long
            raise LaunchError(f"{words[0]}: the queue is full, SLURM takes no more jobs; submit later ({problem})")
        if pause_s is None or not FOR_THE_MOMENT.search(problem):
            tried = f" (tried {number} times)" if number > 1 else ""
            raise LaunchError(f"{words[0]}: {problem or f'exit status {status}'}{tried}")
        tell(f"{words[0]}: {problem}; try {number + 1} of {len(pauses_s) + 1} in {pause_s:g} s", sys.stderr)
        time.sleep(pause_s)
        if (found := before_retry()) is not None:
            return found
    raise AssertionError("the last try returns or raises")


def _run(words: Sequence[str], environment: Mapping[str, str] | None, locks: Sequence[int]) -> tuple[int, str, str]:
    """Run a command; return its exit status, what it prints, and in one line what it complains of.

    That it waits for the queue, which sbatch does for minutes, is said at once. Ctrl-C does not reach it: the answer of
    an sbatch that was cut off would be lost.
    """
    said = []
    try:
        with (
            _scratch_file(words[0]) as printed,
            subprocess.Popen(
                words,
                env={**_surroundings(words[0]), **(environment or {}), "SLURM_TIME_FORMAT": "standard"},
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.PIPE,
                start_new_session=True,
                pass_fds=locks,
                text=True,
                errors="replace",
            ) as process,
        ):
            assert process.stderr is not None
            for line in filter(None, map(str.strip, process.stderr)):
                said.append(line)
                if line.endswith("sleeping and retrying"):
                    tell(line, sys.stderr)
            status = process.wait()
            printed.seek(0)
            text = printed.read()
    except FileNotFoundError:
        raise NoSlurm(
            f"{words[0]}: there is no such command on this machine's PATH; run this on a login node of the "
            "cluster (or load its SLURM module), or say run=local"
        ) from None
    problem = re.sub(rf"{words[0]}: (error: )?", "", " ".join(said or text.split("\n")).strip())
    if "configuration source" in problem:
        problem = "SLURM has no configuration here; set SLURM_CONF, or run this on a login node of the cluster"
    return status, text, problem


def _scratch_file(program: str) -> IO[str]:
    try:
        return TemporaryFile("w+", errors="replace")
    except OSError as error:
        raise LaunchError(f"{program}: cannot be run: {error.strerror}; TMPDIR=DIR names another directory") from None


def _surroundings(program: str) -> dict[str, str]:
    """Return this process's variables without those that lead to another cluster or change what is printed.

    For sbatch also without those of the job that it is in: the new one has its own.
    """
    left_out = OF_A_PERSON + (OF_A_JOB if program == "sbatch" and "SLURM_JOB_ID" in os.environ else ())
    return {
        name: value
        for name, value in os.environ.items()
        if name in TO_REACH_SLURM or not (name in CLUSTERS or name.startswith(left_out))
    }


def new_token() -> str:
    """Return a comment for a job that no other job has."""
    return f"pipeline {uuid.uuid4().hex}"


def submit(
    words: Sequence[str],
    environment: Mapping[str, str],
    token: str,
    locks: Sequence[int],
    check: Callable[[], None],
) -> str:
    """Submit a job and return its id.

    Args:
        words: The command, of sbatch.
        token: The job's comment, that no other job has: a try whose answer was lost is not made twice.
        locks: As of `command`.
        check: Called before each further try; raises where there is to be none.

    Raises:
        LaunchError: If SLURM does not take it, or it cannot be told which job it is; then, as after what `check`
            raises, none is left.
    """

    def before_retry() -> str | None:
        check()
        return find(token)

    try:
        printed = command(*words, environment=environment, before_retry=before_retry, locks=locks)
        if (answer := ANSWER.fullmatch((printed.strip().splitlines() or [""])[-1].strip())) is None:
            raise LaunchError(f"{words[0]}: wanted the id of a job, and it printed '{' '.join(printed.split())}'")
    except BaseException:
        with suppress(LaunchError):  # else whoever asks for the token later finds it
            cancel([job for job in [find(token, ())] if job])
        raise
    return answer[1]


def find(token: str, pauses_s: Sequence[float] = PATIENCE_S) -> str | None:
    """Return the id of this user's job that has this comment, if SLURM has not forgotten it; null if there is none."""
    rows = (line.partition("|") for line in _squeue("%F|%k", pauses_s=pauses_s))
    return next((job for job, _, comment in rows if comment == token), None)


def refusal(words: Sequence[str]) -> tuple[str, str] | None:
    """Ask whether SLURM would take a job, without leaving one.

    Args:
        words: The command, of sbatch, with all that it asks for.

    Returns:
        Null if it would; else the setting that it does not like, as far as that is known ("partition"), and what it
        says. What is only so for the moment - nodes that are down, a full queue - is no refusal.

    Raises:
        LaunchError: If SLURM cannot be asked.
    """
    try:
        command(words[0], "--test-only", *words[1:])
    except NoSlurm:
        raise
    except LaunchError as error:
        problem = str(error)
        if NOT_NOW.search(problem):
            return None
        if FOR_THE_MOMENT.search(problem):
            raise
        return blamed_setting(problem), problem
    return None


def blamed_setting(problem: str) -> str:
    """Return the setting of `run` that sbatch complains of; empty if none can be told."""
    return next((setting for setting, words in BLAMED.items() if re.search(words, problem, re.IGNORECASE)), "")


def look(ids: Iterable[str], pauses_s: Sequence[float] = PATIENCE_S) -> dict[str, Seen]:
    """Return what SLURM knows of jobs, of an array's elements each for itself; what it has forgotten is left out.

    Args:
        ids: As "12", which for an array is every element; and "12_3", which is asked of the accounting database where
            the controller knows only of other elements.
        pauses_s: Before each further try, where SLURM does not answer.

    Raises:
        LaunchError: If SLURM does not answer.
    """
    wanted = set(ids)
    if not wanted:
        return {}
    found: dict[str, Seen] = {}
    jobs = sorted(set(map(array_of, wanted)))
    one_more = jobs[0]  # of a single job that is forgotten squeue says that there is no such job, and fails
    for line in _squeue("%i|%T|%r|%N|%S", "--jobs", ",".join([*jobs, one_more]), pauses_s=pauses_s):
        job, state, reason, nodes, begins = line.split("|")
        found[job] = Seen(job, state, reason, nodes, begins)
    if forgotten := wanted - set(map(array_of, found)) - set(found):
        found = _look_back(set(map(array_of, forgotten)), pauses_s) | found
    return {job: seen for job, seen in found.items() if {job, array_of(job)} & wanted}


def array_of(job: str) -> str:
    """Return the id of the whole array that an element is of; of any other job its own."""
    return job.partition("_")[0]


def _squeue(columns: str, *which: str, pauses_s: Sequence[float] = PATIENCE_S) -> list[str]:
    """Return a line for each job: of this user, if the flags `which` say nothing else."""
    which = which or ("--user", str(os.getuid()))
    words = ("--noheader", "--array", "--states=all", *which, "--format", columns)
    return command("squeue", *words, pauses_s=pauses_s).splitlines()


def _look_back(ids: Iterable[str], pauses_s: Sequence[float]) -> dict[str, Seen]:
    """Return how the accounting database says that jobs ended which the controller has forgotten; nothing without one.

    Of a job of which it has not heard the end it still says that it waits or runs.
    """
    words = ("--noheader", "--parsable2", "--allocations", "--format", "JobID,State,NodeList", "--jobs")
    try:
        printed = command("sacct", *words, ",".join(sorted(ids)), pauses_s=pauses_s)
    except LaunchError:
        return {}
    found = {}
    for job, state, nodes in (line.split("|") for line in printed.splitlines()):
        for one in _each(job):
            found[one] = Seen(one, state.split(" ")[0], "", nodes.replace("None assigned", ""))
    return {job: seen for job, seen in found.items() if seen.is_over}


def _each(job: str) -> list[str]:
    """Return the ids that sacct abbreviates: of the elements of an array that have never begun, as "12_[0,3-5%2]"."""
    array, _, elements = job.rstrip("]").partition("_[")
    return [f"{array}_{number}" for number in numbers_of(elements.partition("%")[0])] if elements else [job]


def numbers_of(text: str) -> list[int]:
    """Return the numbers of "0,3-5,10-20:2"; "..." at its end, where SLURM cuts it off, leaves out what it cuts."""
    spans = re.findall(r"(\d+)(?:-(\d+)(?::(\d+))?)?(?=,|$)", text)
    return [n for first, last, step in spans for n in range(int(first), int(last or first) + 1, int(step or 1))]


def cancel(ids: Sequence[str]) -> None:
    """Cancel jobs; those that are over already are left as they are."""
    if ids:
        command("scancel", *ids)


def requeue(job: str) -> None:
    """Let a job begin anew, with the same id, whatever it was submitted with.

    Raises:
        LaunchError: If the cluster does not allow that.
    """
    with suppress(LaunchError):  # of a site that makes another choice for all jobs; an owner may take it back
        command("scontrol", "update", f"JobId={job}", "Requeue=1", pauses_s=())
    command("scontrol", "requeue", job)


def show(job: str) -> dict[str, str]:
    """Return what the controller says of one job, by its names; times are in UTC.

    Raises:
        LaunchError: If it has forgotten it.
    """
    printed = command("scontrol", "--oneliner", "show", "job", job, environment=IN_UTC)
    return dict(re.findall(r"(\S+?)=(\S*)", printed.splitlines()[0]))


def partitions() -> dict[str, Partition]:
    """Return the partitions of the cluster by name, hidden ones too."""
    found: dict[str, Partition] = {}
    for line in command("sinfo", "--all", "--noheader", "--format", "%P|%D|%l|%T|%m").splitlines():
        name, nodes, limit, state, memory = line.split("|")
        plain = name.rstrip("*")
        one = Partition(plain, name.endswith("*"), int(nodes), seconds_of(limit), state in UP, int(memory.rstrip("+")))
        if known := found.get(plain):
            one = replace(
                one,
                num_nodes=known.num_nodes + one.num_nodes,
                is_whole=known.is_whole and one.is_whole,
                memory_mb=max(known.memory_mb, one.memory_mb),
            )
        found[plain] = one
    return found


def max_array() -> int:
    """Return how many elements an array of jobs may have."""
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", _configuration())
    return max(int(found[1]), 1) if found else 1000


def cluster(pauses_s: Sequence[float] = PATIENCE_S) -> str:
    """Return the name of the cluster that is asked here. Raises LaunchError if it does not answer."""
    return os.environ.get("SLURM_CLUSTER_NAME") or _cluster(tuple(pauses_s))


def refuse_other_clusters() -> None:
    """Refuse to submit where the environment leads sbatch to another cluster than the one that is asked here.

    Raises:
        LaunchError: If it does, or SLURM does not answer.
    """
    for name in CLUSTERS:
        if (wanted := os.environ.get(name)) and wanted != cluster():
            raise LaunchError(
                f"{name}={wanted}: wanted no other cluster than that of this machine, '{cluster()}'; submit on a login "
                f"node of the other, or unset {name}"
            )


@cache  # it keeps its name
def _cluster(pauses_s: Sequence[float]) -> str:
    found = re.search(r"ClusterName\s*=\s*(\S+)", _configuration(pauses_s))
    return found[1] if found else ""


def clock() -> float:
    """Return what time it is by the controller's clock, in seconds since the epoch."""
    found = re.search(r"as of (\S+)", _configuration())
    return time_of(found[1] if found else "") or time.time()


def time_of(text: str) -> float | None:
    """Return seconds since the epoch of a time in UTC; null for "Unknown", as of the end without a limit."""
    try:
        return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()
    except ValueError:
        return None


def _configuration(pauses_s: Sequence[float] = PATIENCE_S) -> str:
    return command("scontrol", "show", "config", environment=IN_UTC, pauses_s=pauses_s)


def nodes_of(nodelist: str) -> list[str]:
    """Return the names of nodes that SLURM abbreviates."""
    return command("scontrol", "show", "hostnames", nodelist).split()
