"""A real SLURM for the tests of this folder: `slurm/devcluster`, brought up once a session and taken down at its end.

A test may leave jobs, and nodes that are down: both are mended before the next test begins.
"""

import functools
import itertools
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
DEVCLUSTER = HERE.parents[1] / "slurm" / "devcluster"
COMMANDS = ("slurmctld", "slurmd", "sbatch", "munged")
PORTS_EACH = 100  # that one devcluster may use
NOT_TESTED = "NOT TESTED against a real SLURM"  # tests/conftest.py repeats such skips at the end of the run


def clean_environment() -> dict[str, str]:
    """This process's variables without those that sbatch, srun and squeue would read as options."""
    read_by_slurm = ("SLURM_", "SBATCH_", "SQUEUE_", "SINFO_", "SCANCEL_", "SACCT_", "PIPELINE_DEVCLUSTER")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(read_by_slurm)}
    environment["PATH"] += ":/usr/sbin:/sbin"
    return environment


def is_installed() -> bool:
    path = clean_environment()["PATH"]
    return all(shutil.which(command, path=path) for command in COMMANDS)


def free_ports() -> int:
    """The first of as many ports as a devcluster may use, all free, below those that the kernel gives out."""
    blocks = [16000 + PORTS_EACH * (os.getpid() + block) % 16000 for block in range(16000 // PORTS_EACH)]
    for first in blocks:
        try:
            for port in range(first, first + PORTS_EACH):
                with socket.socket() as probe:
                    probe.bind(("", port))
        except OSError:
            continue
        return first
    raise RuntimeError("no 100 ports in a row are free between 16000 and 32000")


class Cluster:
    """A SLURM cluster of `slurm/devcluster`, of four nodes if `options` say nothing else.

    `directory` has its logs, `env` is the environment in which sbatch finds it, `nodes` are its nodes' names.
    """

    numbers = itertools.count()

    def __init__(self, *options: str):
        number = next(Cluster.numbers)
        # not of pytest's making: those lie too deep for the sockets in it, and other users cannot enter them
        self.directory = Path(tempfile.mkdtemp(prefix="devcluster-"))
        self.directory.chmod(0o755)
        self.env = clean_environment() | {"SLURM_CONF": str(self.directory / "etc/slurm.conf")}
        # nodes of clusters side by side must differ in name: 'a1234-1', 'b1234-1', ...
        prefix = f"{chr(ord('a') + number % 26)}{os.getpid()}-"
        try:
            self.devcluster("up", "--port", str(free_ports()), "--prefix", prefix, *options)
            self.nodes = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N").stdout.split()
        except BaseException:
            self.down()
            raise

    def devcluster(self, *words: str, check: bool = True) -> subprocess.CompletedProcess:
        return self.run(str(DEVCLUSTER), *words, "--directory", str(self.directory), check=check)

    def run(self, *words: str, check: bool = True, timeout_s: float = 600) -> subprocess.CompletedProcess:
        """Runs a command as a user of this cluster; with `check`, a failure is an AssertionError with its output."""
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=timeout_s)
        assert not check or done.returncode == 0, f"{words} exited {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def submit(self, *words: str) -> str:
        """The id of a job; `words` are sbatch's."""
        return self.run("sbatch", "--parsable", *words).stdout.strip()

    def job(self, job_id: str | int) -> dict[str, str]:
        """What `scontrol show job` says; of an array, its task that has this very id, else the first."""
        lines = self.run("scontrol", "-o", "show", "job", str(job_id)).stdout.splitlines()
        jobs = [dict(re.findall(r"(?:^| )([A-Za-z:/_]+)=(.*?)(?= [A-Za-z:/_]+=|$)", line)) for line in lines]
        return next((job for job in jobs if job["JobId"] == str(job_id)), jobs[0])

    def wait_for(self, job_id: str | int, *states: str, timeout_s: float = 60) -> dict[str, str]:
        """The job, once it is in one of these states ("RUNNING"); AssertionError if it is not within `timeout_s`."""
        job: dict[str, str] = {}

        def reached() -> bool:
            job.update(self.job(job_id))
            return job["JobState"] in states

        if not _poll(reached, timeout_s):
            log = (self.directory / "log/slurmctld.log").read_text(errors="replace").splitlines()
            mine = [line for line in log if f"JobId={job['JobId']}" in line]
            wanted = " or ".join(states)
            raise AssertionError(f"job {job_id} is not {wanted} after {timeout_s} s: {job}\n" + "\n".join(mine[-15:]))
        return job

    def start_now(self, job_id: str | int, timeout_s: float = 60) -> None:
        """Waits until the job is queued again, then skips the two minutes for which SLURM holds it back."""

        def is_queued() -> bool:
            job = self.job(job_id)
            return int(job["Restarts"]) > 0 and job["JobState"] not in ("RUNNING", "COMPLETING")

        def started() -> bool:
            # again until it has shown: a job that is just being queued gets its start time last
            self.run("scontrol", "update", f"JobId={self.job(job_id)['JobId']}", "StartTime=now", check=False)
            return self.job(job_id)["Reason"] != "BeginTime"

        assert _poll(is_queued, timeout_s), f"job {job_id} was not queued within {timeout_s} s: {self.job(job_id)}"
        time.sleep(2)  # slurmd launches no job in the second in which it ended it, for which the two minutes are
        assert _poll(started, timeout_s), f"job {job_id} was not queued again within {timeout_s} s: {self.job(job_id)}"

    def node_state(self, node: str) -> str:
        """Such as "idle", "mixed", "down"; with SLURM's mark at its end ("down*": does not answer) left out."""
        # all nodes, for of a single one (sinfo -n) slurmctld may tell a state of minutes ago
        lines = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T").stdout.splitlines()
        return dict(line.split() for line in lines)[node].rstrip("*")

    def wait_for_node(self, node: str, *states: str, timeout_s: float = 90) -> None:
        """Returns once the node is in one of these states. A node that is cut off or dead is "down" after 30 s."""
        assert _poll(lambda: self.node_state(node) in states, timeout_s), f"{node} is {self.node_state(node)}"

    def crash(self, *nodes: str) -> None:
        self.devcluster("crash", *nodes)

    def start(self, *nodes: str) -> None:
        self.devcluster("start", *nodes)

    def cut(self, *nodes: str) -> None:
        self.devcluster("cut", *nodes)

    def heal(self, *nodes: str) -> None:
        self.devcluster("heal", *nodes)

    def restart_controller(self) -> None:
        self.devcluster("restart-controller")

    def scancel(self, *words: str | int) -> None:
        self.run("scancel", *map(str, words))

    def tidy(self) -> None:
        """Cancels all jobs, mends all nodes, and waits until they are idle."""
        for state in ("PENDING", "RUNNING", "SUSPENDED"):
            self.scancel("--quiet", f"--state={state}")
        self.start(*self.nodes)
        if "isolated=1" in (self.directory / "settings").read_text():
            self.heal(*self.nodes)
        for node in self.nodes:
            self.wait_for_node(node, "idle")

    def down(self) -> None:
        self.devcluster("down", "--purge", check=False)
        shutil.rmtree(self.directory, ignore_errors=True)


def _poll(is_so: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _absent(why: str) -> None:
    """Fails where SLURM must be there, as in CI; else skips."""
    message = f"{NOT_TESTED}: {why}. As root on Debian: apt-get install slurmctld slurmd slurm-client munge"
    if os.environ.get("CI") or os.environ.get("PIPELINE_REQUIRE_SLURM") == "1":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def new_cluster() -> Iterator[Callable[..., Cluster]]:
    """Makes a cluster; its arguments are options of `devcluster up`. All are taken down at the end of the session."""
    made: list[Cluster] = []

    def make(*options: str) -> Cluster:
        if os.getuid() != 0:
            _absent("its nodes need root")
        if subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True).returncode != 0:
            _absent("its nodes need the right to make namespaces")
        try:
            made.append(Cluster(*options))
        except AssertionError as problem:
            if is_installed():
                raise
            _absent(f"it could not be installed: {problem}")
        return made[-1]

    yield make
    for each in made:
        each.down()


@pytest.fixture(scope="session")
def session_cluster(new_cluster) -> Cluster:
    return new_cluster()


@pytest.fixture(scope="session")
def session_isolated_cluster(new_cluster) -> Cluster:
    return new_cluster("--isolated")


@pytest.fixture
def cluster(session_cluster) -> Iterator[Cluster]:
    """Four idle nodes. It is the session's, tidied after each test."""
    yield session_cluster
    session_cluster.tidy()


@pytest.fixture
def isolated_cluster(session_isolated_cluster) -> Iterator[Cluster]:
    """The same with a network for each node, for `cut` and `heal`."""
    yield session_isolated_cluster
    session_isolated_cluster.tidy()


@pytest.fixture(scope="session")
def new_root(tiny_tokens, tmp_path_factory) -> Callable[[], Path]:
    """Makes a root with the data of the tiny job, up to its tokens."""

    def make() -> Path:
        root = tmp_path_factory.mktemp("root") / "artifacts"
        shutil.copytree(tiny_tokens.parents[1], root, symlinks=True)
        return root

    return make


@pytest.fixture(scope="session")
def reference(new_root) -> Callable[[int, int], Path]:
    """The directory of the tiny job's pretraining of so many steps and ranks, undisturbed and without SLURM."""
    from trainings import undisturbed

    return functools.cache(functools.partial(undisturbed, new_root))


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker runs this folder, for it has the cluster; whatever needs a cluster is slow."""
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker(pytest.mark.xdist_group("slurm"))
        if "new_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
