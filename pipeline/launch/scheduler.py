"""The only door to SLURM's commands: submit, look, cancel, requeue. What they print comes back as plain data."""

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import LaunchError
from pipeline.launch.slurm import seconds_of

PATIENCE_S = (1.0, 2.0, 4.0, 8.0, 16.0)  # before each further try of a command that failed for the moment
FOR_THE_MOMENT = re.compile(
    "timed out|Unable to contact slurm controller|Connection refused|temporarily unable|Zero Bytes were transmitted"
    "|Transport endpoint|slurm_receive_msg|Resource temporarily unavailable|try again",
    re.IGNORECASE,
)
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


@dataclass(frozen=True)
class Seen:
    """What SLURM says of a job, or of an element of an array.

    Attributes:
        id: As "12", or "12_3".
        state: As SLURM writes it: PENDING, RUNNING, COMPLETED, …
        reason: Why it waits, or why it ended.
        nodes: Where it runs or ran, as SLURM abbreviates them.
    """

    id: str
    state: str
    reason: str = ""
    nodes: str = ""
    elapsed: str = ""

    @property
    def is_over(self) -> bool:
        """Whether it will not run any more."""
        return self.state in OVER


@dataclass(frozen=True)
class Partition:
    """A partition: its nodes that are not gone for good, and the longest job that it takes, in seconds."""

    name: str
    is_default: bool
    num_nodes: int
    limit_s: int | None


def command(
    *words: str, environment: Mapping[str, str] | None = None, before_retry: Callable[[], str | None] = lambda: None
) -> str:
    """Run one of SLURM's commands and return what it prints; one that fails for the moment is run again.

    Args:
        before_retry: Called before each further try; what it returns, unless null, is the result.

    Raises:
        LaunchError: If there is no such command, or it fails, with what it says.
    """
    for pause_s in (*PATIENCE_S, None):
        try:
            done = subprocess.run(
                words, env={**os.environ, **(environment or {})}, capture_output=True, text=True, errors="replace"
            )
        except FileNotFoundError:
            raise LaunchError(
                f"{words[0]}: there is no such command on this machine's PATH; run this on a login node of the "
                "cluster (or load its SLURM module), or say run=local"
            ) from None
        if done.returncode == 0:
            return done.stdout
        problem = " ".join(line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip())
        if pause_s is None or not FOR_THE_MOMENT.search(problem):
            raise LaunchError(f"{words[0]}: {problem or f'exit status {done.returncode}'}")
        time.sleep(pause_s)
        if (found := before_retry()) is not None:
            return found
    raise AssertionError("the last try returns or raises")


def submit(words: Sequence[str], environment: Mapping[str, str], token: str) -> str:
    """Submit a job and return its id.

    Args:
        words: The command, of sbatch.
        token: The job's comment, that no other job has: a try whose answer was lost is not made twice.

    Raises:
        LaunchError: If SLURM does not take it.
    """

    def find() -> str | None:
        ids = {line.partition("|")[0] for line in _squeue("%A|%k") if line.partition("|")[2] == token}
        return ids.pop() if ids else None

    printed = command(*words, environment=environment, before_retry=find)
    return printed.strip().partition(";")[0]  # "12;cluster" where there are several


def look(ids: Iterable[str]) -> dict[str, Seen]:
    """Return what SLURM knows of jobs, of an array's elements each for itself; what it has forgotten is left out.

    Raises:
        LaunchError: If SLURM does not answer.
    """
    wanted = set(ids)
    if not wanted:
        return {}
    found: dict[str, Seen] = {}
    for line in _squeue("%i|%T|%r|%N|%M"):
        job, state, reason, nodes, elapsed = line.split("|")
        if {job, job.partition("_")[0]} & wanted:
            found[job] = Seen(job, state, reason, nodes, elapsed)
    if forgotten := wanted - {job.partition("_")[0] for job in found} - set(found):
        found |= _look_back(forgotten)
    return found


def _squeue(columns: str) -> list[str]:
    mine = ("--user", str(os.getuid()))
    return command("squeue", "--noheader", "--array", "--states=all", *mine, "--format", columns).splitlines()


def _look_back(ids: Iterable[str]) -> dict[str, Seen]:
    """Return what the accounting database knows of jobs that the controller has forgotten; nothing without one."""
    words = ("--noheader", "--parsable2", "--allocations", "--format", "JobID,State,NodeList,Elapsed", "--jobs")
    try:
        printed = command("sacct", *words, ",".join(sorted(ids)))
    except LaunchError:
        return {}
    rows = (line.split("|") for line in printed.splitlines())
    return {job: Seen(job, state.split(" ")[0], "", nodes, elapsed) for job, state, nodes, elapsed in rows}


def cancel(ids: Sequence[str]) -> None:
    """Cancel jobs; those that are over already are left as they are."""
    if ids:
        command("scancel", *ids)


def requeue(job: str) -> None:
    """Let a job begin anew, with the same id. Raises LaunchError if the cluster does not allow that."""
    command("scontrol", "requeue", job)


def show(job: str) -> dict[str, str]:
    """Return what the controller says of one job, by its names. Raises LaunchError if it has forgotten it."""
    printed = command("scontrol", "--oneliner", "show", "job", job)
    return dict(re.findall(r"(\S+?)=(\S*)", printed.splitlines()[0]))


def partitions() -> dict[str, Partition]:
    """Return the partitions of the cluster by name."""
    found: dict[str, Partition] = {}
    for line in command("sinfo", "--noheader", "--format", "%P|%D|%l").splitlines():
        name, nodes, limit = line.split("|")
        plain = name.rstrip("*")
        known = found.get(plain)
        total = int(nodes) + (known.num_nodes if known else 0)
        found[plain] = Partition(plain, name.endswith("*"), total, seconds_of(limit))
    return found


def max_array() -> int:
    """Return how many elements an array of jobs may have."""
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", command("scontrol", "show", "config"))
    return max(int(found[1]) - 1, 1) if found else 1000


def nodes_of(nodelist: str) -> list[str]:
    """Return the names of nodes that SLURM abbreviates."""
    return command("scontrol", "show", "hostnames", nodelist).split()
