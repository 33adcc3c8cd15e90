"""Runs ranks of a task as a step of the SLURM job that this process is in: one srun, one process a rank."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pipeline.artifact import WORK
from pipeline.code import PACKAGE
from pipeline.env import ATTEMPT, ATTEMPT_NAME, FIRST_RANK, LAUNCHER, Share, StopRequest, cpus, reserved_port
from pipeline.errors import LaunchError, Lost, PipelineError, Preempted
from pipeline.launch import scheduler
from pipeline.launch.deadline import Deadline
from pipeline.launch.failures import blame, forget_ranks, guessed_reason, left_reason, short_of_memory
from pipeline.launch.local import GRACE_S
from pipeline.launch.lock import slurm_job
from pipeline.launch.output import begin_try, heading, rank_log
from pipeline.launch.silence import Silence
from pipeline.launch.slurm import Slurm
from pipeline.progress import tell
from pipeline.stage import Stage

ENDED = re.compile(r"^srun: error: (?P<node>[^:\s]+): tasks? (?P<tasks>[\d,\-]+): (?P<how>.+)$")
LOST = (
    re.compile(r"^srun: error: Node failure on (?P<node>\S+)"),
    re.compile(r"^srun: error: Task launch for \S+ failed on node (?P<node>\S+):"),
    re.compile(r"^srun: error: Failure sending signal \d+ to \S+ on node (?P<node>\S+): Communication connection"),
)
ERROR = re.compile(r"^\S+: (?:fatal|error): (?P<said>.+)$")
NOT_TAKEN = re.compile("Unable to (?:confirm allocation|create step) for")  # of a step of which nothing has begun
ALLOCATION = "PIPELINE_ALLOCATION"  # environment variable that slurm/stage.sbatch sets
OUT_OF_MEMORY = "Out Of Memory"
PAUSE_S = 0.1
MOST_KILLS = 2
MOST_ERRORS = 3  # of srun in a message: the first tell why
MOST_LOGS = 256  # of ranks, in which it is noted that a try begins: then rank 0's alone
PATIENCE_S, AGAIN_S = 300.0, 5.0  # with a controller that takes no step, as while it is restarted
ONE_REQUEST_S = 1.0  # in which signals to stop count as one
TIME_IS_OVER = signal.SIGALRM  # what a stop is asked for with then; nobody sends it
ASKED = signal.strsignal(signal.SIGUSR2)  # how a task ends that was asked to stop and does not listen


def launch(directory: Path, run: Slurm, share: Share, attempt: tuple[int, str], stop: StopRequest) -> None:
    """Run ranks of the task frozen in `directory` and return when all of them have ended well.

    Args:
        run: Of this task, on the nodes of this job.
        attempt: Number of the try, and the name of the file that counts it.

    Raises:
        PipelineError: What the first rank to fail left as its reason, of the same class.
        LaunchError: If a rank ended without a reason; with the last lines of its log.
        Preempted: If the ranks were asked to stop, or the time of the job is nearly over.
    """
    (directory / "logs").mkdir(exist_ok=True)
    forget_ranks(directory, share)
    _begin_logs(directory, share, attempt[0])
    silence, deadline = Silence(directory, share, run.stall_timeout_s), Deadline(directory, run.notice_s)
    patient = time.monotonic() + PATIENCE_S
    with reserved_port() as port:
        environment = {**os.environ, **step_environment(run, share, attempt, port)}
        while True:
            step = Step(_words(directory, run, share), environment)
            try:
                _wait(directory, share, step, silence, deadline, stop)
            finally:
                step.close()
            if stop or not step.may_be_taken_later or time.monotonic() > patient:
                break
            tell(f"{directory}: srun: {step.said}; begun again in {AGAIN_S:g} s", sys.stderr)
            time.sleep(AGAIN_S)
    if step.status == 0:
        return
    error = _reason(directory, run, share, step, silence, stop)
    raise type(error)(f"{_cause(stop)}: {error}") if stop and isinstance(error, Preempted) else error


def _begin_logs(directory: Path, share: Share, attempt: int) -> None:
    """Note in the log of this job, and in those of its ranks, that a try begins."""
    line = heading(attempt, f"SLURM job {slurm_job()} on {os.environ.get('SLURM_JOB_NODELIST')}")
    tell(line)
    for rank in range(share.first, share.first + (share.count if share.count <= MOST_LOGS else 1)):
        begin_try(rank_log(directory, rank), line)


class Step:
    """A running srun: what it says of its tasks, and how they are asked to stop or ended."""

    def __init__(self, words: list[str], environment: Mapping[str, str]) -> None:
        self.failed: dict[int, str] = {}  # how each task failed by itself, in the order of the news
        self.lost: list[str] = []  # nodes
        self.nodes: dict[int, str] = {}  # of the tasks that failed
        self.errors: list[str] = []  # the first that srun told
        self._last = ""
        self._is_ending = False
        self._process = subprocess.Popen(
            words, env=dict(environment), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        self._reader = threading.Thread(target=self._read, name="srun", daemon=True)
        self._reader.start()

    @property
    def status(self) -> int | None:
        """Exit status of srun, null while it runs."""
        return self._process.poll()

    @property
    def said(self) -> str:
        """What srun complained of, in one line."""
        return "; ".join(self.errors) or self._last

    @property
    def may_be_taken_later(self) -> bool:
        """Whether nothing has begun, for want of a controller."""
        return bool(self.status and NOT_TAKEN.search(self.said) and scheduler.FOR_THE_MOMENT.search(self.said))

    def ask(self) -> None:
        """Ask all tasks to stop."""
        if self.status is None:
            self._process.send_signal(signal.SIGUSR2)  # which srun hands on; SIGTERM would end the step

    def kill(self) -> None:
        """End all tasks at once."""
        self._is_ending = True
        job = slurm_job() or ""
        with suppress(LaunchError):
            steps = scheduler.command("squeue", "--steps", "--noheader", "--jobs", job, "--format", "%i").split()
            for step in steps:
                owner, _, number = step.rpartition(".")
                if owner == job and number.isdigit():  # not "batch"; not of another element of an array
                    scheduler.command("scancel", "--signal=KILL", step)

    def close(self) -> None:
        """Wait for srun's last words."""
        if self.status is None:
            self.kill()
            try:
                self._process.wait(GRACE_S)
            except subprocess.TimeoutExpired:  # it waits for a node that does not answer
                self._process.kill()
        self._reader.join()

    def _read(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as news:
            for line in news:
                self._note(line)
                tell(line, sys.stderr, end="")

    def _note(self, line: str) -> None:
        """Take the news from a line of srun."""
        self._last = line.strip() or self._last
        if (found := ERROR.match(line)) and len(self.errors) < MOST_ERRORS:
            self.errors.append(found["said"].strip())
        for pattern in LOST:
            if (found := pattern.match(line)) and found["node"] not in self.lost:
                self.lost.append(found["node"])
        if (found := ENDED.match(line)) and not self._is_ending:
            for task in scheduler.numbers_of(found["tasks"]):
                self.nodes[task] = found["node"]
                self.failed.setdefault(task, found["how"].strip())


def _words(directory: Path, run: Slurm, share: Share) -> list[str]:
    log = str(rank_log(directory, share.first)).replace("%", "%%")
    if share.is_all:
        log = log.replace(f"rank-{share.first:05d}", "rank-%5t")
    # a file of the node itself: what a task says while it is being ended would not come through srun
    flags = ["--open-mode=append", f"--output={log}"]
    return step_words(run, share.count, flags, "rank.py", str(directory.resolve() / WORK / "task.json"))


def step_words(run: Slurm, count: int, flags: Sequence[str], program: str, *arguments: str) -> list[str]:
    """Return the command that runs `count` processes of a file of this package on the nodes of this job."""
    cpus_per_rank = [] if run.cpus_per_rank is None else [f"--cpus-per-task={run.cpus_per_rank}"]
    return [
        "srun",
        f"--nodes={run.nodes}",
        f"--ntasks={count}",
        f"--ntasks-per-node={-(-count // run.nodes)}",
        "--kill-on-bad-exit=0",  # the others get to save first
        "--wait=0",
        "--export=ALL",
        *flags,
        *cpus_per_rank,
        *run.srun,
        *run.container,
        sys.executable if run.python is None else run.python,
        "-P",
        str(PACKAGE / program),
        *arguments,
    ]


def step_environment(run: Slurm, share: Share, attempt: tuple[int, str], port: int) -> dict[str, str]:
    """Return the variables that tell the processes of a step which ranks they are and where they meet."""
    threads = str(run.threads or run.cpus_per_rank or max(1, cpus() // run.each))
    number, name = attempt
    return {
        "MASTER_ADDR": os.environ.get("SLURMD_NODENAME", "127.0.0.1") if run.nodes > 1 else "127.0.0.1",
        "OMP_NUM_THREADS": threads,
        "RAYON_NUM_THREADS": threads,
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "1000"),
        **run.environment,
        FIRST_RANK: str(share.first),
        "WORLD_SIZE": str(share.world),
        "MASTER_PORT": str(port),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")])),
        ATTEMPT: str(number),
        ATTEMPT_NAME: name,
        LAUNCHER: "",  # slurmstepd is their parent
    }


def _wait(directory: Path, share: Share, step: Step, silence: Silence, deadline: Deadline, stop: StopRequest) -> None:
    """Wait for the step; once a task has failed, or all are silent, the others are ended."""
    end = asked = float("inf")
    kills = 0
    requests = 0  # that one signal may have brought, to this process and to the script that started it
    while step.status is None:
        now = time.monotonic()
        if (step.failed or step.lost) and end == float("inf"):
            saving = any(isinstance(left_reason(directory, share.first + task), Preempted) for task in step.failed)
            end = now + GRACE_S * (12 if saving else 1)
            step.ask()
        if now > end or silence.is_too_long():
            if kills == MOST_KILLS:
                return  # srun waits for a node that does not answer
            step.kill()
            end, kills = now + GRACE_S, kills + 1
        if not stop and deadline.is_near():
            tell(f"{directory}: the time of this job is nearly over: its state is saved")
            stop.ask(TIME_IS_OVER)
        if stop and asked == float("inf"):
            asked = now
            step.ask()
        if now < asked + ONE_REQUEST_S:
            requests = len(_urgent(stop))
        elif len(_urgent(stop)) > requests:
            tell(f"{directory}: asked to stop again: the ranks are ended at once")
            requests, end = len(_urgent(stop)), min(end, now)
        time.sleep(PAUSE_S)


def _urgent(stop: StopRequest) -> list[int]:
    """Return the requests to stop of which a second one means at once; after SIGTERM SLURM itself ends what is left."""
    return [number for number in stop.came if number != signal.SIGTERM]


def _reason(
    directory: Path, run: Slurm, share: Share, step: Step, silence: Silence, stop: StopRequest
) -> PipelineError:
    """Return why the step failed."""
    if silence.was_too_long:
        return silence.error()
    failed = _blamed(step)
    reason = None if failed is None else left_reason(directory, share.first + failed)
    how = "" if failed is None else step.failed[failed]
    if reason is not None:
        return reason
    if step.lost:
        return Lost(f"{directory}: lost {', '.join(step.lost)}; the same command continues")
    if stop or how == "Terminated":  # only SLURM, or a person, sends that
        return Preempted(f"{directory}: what was done since the last checkpoint or unit will be done again")
    if how == OUT_OF_MEMORY:
        who = f"rank {share.first + (failed or 0)} on {step.nodes.get(failed or 0, 'its node')}"
        return LaunchError(f"{directory}: {who} ran out of memory: {short_of_memory(directory)}")
    if failed is None:
        if step.status is not None and step.status < 0:
            return Lost(
                f"{directory}: srun was ended by {signal.Signals(-step.status).name}; the same command continues"
            )
        if "Unable to confirm allocation" in step.said or scheduler.FOR_THE_MOMENT.search(step.said):
            return Lost(f"{directory}: srun: {step.said}; the same command continues")
        return LaunchError(f"{directory}: srun exited with status {step.status}: {step.said or 'it said nothing'}")
    guessed = guessed_reason(directory, share.first + failed, _status(how), step.nodes.get(failed, ""))
    if run.nodes > 1 and isinstance(guessed, LaunchError):  # of a machine that went its peers hear first
        return Lost(str(guessed))
    return guessed


def _blamed(step: Step) -> int | None:
    """Return the task to blame: one that says what is wrong, else that a signal ended, not one that lost its peer.

    Last comes what died of our own request to stop, as before it listened, or after it had stopped listening.
    """
    how = step.failed
    return min(how, key=lambda task: (how[task] == ASKED, blame(_status(how[task]))), default=None)


def _cause(stop: StopRequest) -> str:
    """Return why a stop was asked for, as far as the launcher can tell."""
    first = signal.Signals(stop.came[0])
    return "its time was nearly over" if first == TIME_IS_OVER else f"told to stop ({first.name})"


def _status(how: str) -> int:
    if found := re.search(r"exit code (\d+)", how):
        return int(found[1])
    name = how.removesuffix(" (core dumped)")
    return -next((number for number in signal.Signals if signal.strsignal(number) == name), signal.SIGSEGV)


def is_in_allocation() -> bool:
    """Whether this process was started by slurm/stage.sbatch, so that ranks are run here and nothing is submitted."""
    return ALLOCATION in os.environ


def allocated(run: Slurm, stage: Stage) -> Slurm:
    """Return the settings of a task, as from `Slurm.of`, for the nodes that this job has."""
    if stage.ranks == "one":
        return run
    env = os.environ
    nodes, each = int(env["SLURM_JOB_NUM_NODES"]), run.each
    if "SLURM_NTASKS_PER_NODE" in env:
        each = int(env["SLURM_NTASKS_PER_NODE"])
    elif "SLURM_NTASKS" in env or stage.ranks == "units":  # no more than the smallest share of a node has room for
        fewest = min(int(count) for count in re.findall(r"(?:^|,)(\d+)", env.get("SLURM_TASKS_PER_NODE", "1")))
        each = fewest if "SLURM_NTASKS" in env else min(each, fewest)
    return run.model_copy(update={"nodes": nodes, "ranks_per_node": each, "ranks": nodes * each})
