"""What is made of the words of srun. (The rest: tests/slurm.)"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.env import Share, StopRequest
from pipeline.errors import ArtifactError, LaunchError, Lost, Preempted, TrainingError
from pipeline.launch import srun
from pipeline.launch.failures import leave_reason
from pipeline.launch.silence import Silence
from pipeline.launch.slurm import Slurm
from pipeline.launch.srun import TIME_IS_OVER, Step, _blamed, _cause, _reason, _status, _wait, launch, step_environment

ALL = Share(world=4, first=0, count=4)
NO_CONTROLLER = (
    "srun: error: Unable to confirm allocation for job 210: Unable to contact slurm controller (connect failure)\n"
    "srun: Check SLURM_JOB_ID environment variable. Expired or invalid job 210\n"
)
NODE_IS_GONE = (
    "srun: error: Task launch for StepId=15.0 failed on node n2: Communication connection failure\n"
    "srun: error: Application launch failed: Communication connection failure\n"
    "srun: Job step aborted: Waiting up to 7 seconds for job step to finish.\n"
)
NODE_WENT = (
    "srun: error: n1: tasks 0-1: Exited with exit code 1\n"
    "srun: error: Aborting, io error and missing step on node 1\n"
    "srun: error: Failure sending signal 12 to StepId=196.0 on node n2: Communication connection failure\n"
)


def said(text: str, status: int) -> Step:
    """A step of which srun has said this."""
    return ended(f'cat >&2 <<"END"\n{text}END\nexit {status}')


def ended(script: str) -> Step:
    step = Step(["bash", "-c", script], os.environ)
    step._process.wait()
    step.close()
    return step


def reason(directory: Path, step: Step, share: Share = ALL, nodes: int = 2) -> Exception:
    silence, run = Silence(directory, share, 600), Slurm(nodes=nodes, ranks_per_node=2)
    return _reason(directory, run, share, step, silence, StopRequest())


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "logs").mkdir()
    return tmp_path


def test_how_a_task_ended_is_an_exit_status_or_a_signal():
    assert _status("Exited with exit code 75") == 75
    assert _status("Killed") == -signal.SIGKILL
    assert _status("Bus error (core dumped)") == -signal.SIGBUS
    assert _status("Segmentation fault") == -signal.SIGSEGV
    assert _status("Illegal instruction (core dumped)") == -signal.SIGILL
    assert _status("Floating point exception") == -signal.SIGFPE


def test_of_tasks_that_failed_one_that_a_signal_ended_is_to_blame():
    step = said("srun: error: n1: task 0: Exited with exit code 1\nsrun: error: n2: tasks 2-3: Killed\n", 137)
    assert step.failed == {0: "Exited with exit code 1", 2: "Killed", 3: "Killed"}
    assert _blamed(step) == 2
    assert step.nodes[2] == "n2"
    full = said("srun: error: n1: task 0: Exited with exit code 3\nsrun: error: n2: task 1: Segmentation fault\n", 139)
    assert _blamed(full) == 0  # our own status, of a full disk
    assert _blamed(said("", 1)) is None


def test_what_dies_of_being_asked_to_stop_before_it_listens_is_not_to_blame(directory):
    script = (
        "trap 'echo srun: error: n1: task 0: User defined signal 2 >&2; exit 140' USR2\n"
        "echo srun: error: n1: task 1: Exited with exit code 1 >&2\n"
        "while true; do sleep 0.05; done"
    )
    step = Step(["bash", "-c", script], os.environ)
    _wait(directory, ALL, step, Silence(directory, ALL, 600), NeverNear(), StopRequest())
    step.close()
    assert step.failed == {1: "Exited with exit code 1", 0: "User defined signal 2"}
    error = reason(directory, step, nodes=1)
    assert type(error) is LaunchError
    assert "rank 1 on n1 exited with status 1" in str(error)


def test_what_was_asked_to_stop_when_it_had_stopped_already_has_its_reason(directory):
    leave_reason(directory, 0, Preempted("after step 5, state saved"))
    error = reason(directory, said("srun: error: n1: task 0: User defined signal 2\n", 140))
    assert str(error) == "after step 5, state saved"


def test_why_a_stop_was_asked_for_is_said():
    stop = StopRequest()
    stop.ask(signal.SIGTERM)
    assert _cause(stop) == "told to stop (SIGTERM)"
    stop = StopRequest()
    stop.ask(TIME_IS_OVER)
    stop.ask(signal.SIGTERM)
    assert _cause(stop) == "its time was nearly over"


def test_a_task_that_somebody_else_asked_to_stop_before_it_listened_is_begun_again(directory):
    error = reason(directory, said("srun: error: n1: task 0: User defined signal 2\n", 140), nodes=1)
    assert type(error) is Lost
    assert "rank 0 on n1 was ended by SIGUSR2; the same command continues" in str(error)


def test_what_dies_when_all_are_ended_is_not_to_blame():
    step = said("", 1)
    step._is_ending = True
    step._note("srun: error: n1: tasks 0-3: Killed\n")
    assert step.failed == {}


@pytest.mark.parametrize(
    ("text", "status", "kind", "message"),
    [
        (NO_CONTROLLER, 1, Lost, "srun: Unable to confirm allocation for job 210: Unable to contact slurm controller"),
        ("srun: error: Unable to confirm allocation for job 210: Invalid job id specified\n", 1, Lost, "Invalid job"),
        (NODE_IS_GONE, 233, Lost, "lost n2; the same command continues"),
        (NODE_WENT, 1, Lost, "lost n2; the same command continues"),
        ("srun: error: Node failure on n2\nsrun: error: Node failure on n2\n", 1, Lost, "lost n2; the same"),
        (
            "srun: error: Unable to create step for job 5: More processors requested than permitted\nsrun: gone\n",
            1,
            LaunchError,
            "srun exited with status 1: Unable to create step for job 5: More processors requested than permitted",
        ),
        ("srun: Job step aborted\n", 2, LaunchError, "srun exited with status 2: srun: Job step aborted"),
        ("", 2, LaunchError, "srun exited with status 2: it said nothing"),
        ("srun: error: n1: task 0: Out Of Memory\n", 1, LaunchError, "rank 0 on n1 ran out of memory: "),
        (
            "srun: error: n1: task 0: Exited with exit code 1\n",
            1,
            Lost,
            "exited with status 1; the same command",
        ),
        ("srun: error: n1: task 0: Terminated\n", 143, Preempted, "will be done again"),
        (
            "srun: error: n1: task 0: Exited with exit code 3\n",
            3,
            ArtifactError,
            "the disk is full; make room",
        ),
    ],
)
def test_why_a_step_failed(directory, text, status, kind, message):
    error = reason(directory, said(text, status))
    assert type(error) is kind
    assert message in str(error)


def test_srun_that_a_signal_ended_is_begun_again(directory):
    error = reason(directory, ended("kill -KILL $$"))
    assert type(error) is Lost
    assert "srun was ended by SIGKILL" in str(error)


def test_a_node_that_was_lost_is_named_though_slurm_has_asked_for_a_stop_by_then(directory):
    step, stop = said(NODE_WENT, 1), StopRequest()
    stop.ask(signal.SIGTERM)
    error = _reason(directory, Slurm(nodes=2), ALL, step, Silence(directory, ALL, 600), stop)
    assert str(error) == f"{directory}: lost n2; the same command continues"


def test_the_reason_that_a_rank_left_comes_first(directory):
    leave_reason(directory, 6, TrainingError("the loss is not finite"))
    step = said("srun: error: n1: task 2: Exited with exit code 5\n", 5)
    error = reason(directory, step, Share(world=8, first=4, count=4))
    assert type(error) is TrainingError


def test_news_of_srun_are_heard_though_they_cannot_be_printed():
    """As where the log of the job is on a full disk; and the exit status is still the program's."""
    program = (
        "import os, sys\n"
        "from pipeline.launch.srun import Step\n"
        "step = Step(['bash', '-c', \"echo 'srun: error: n1: task 0: Exited with exit code 3' >&2\"], os.environ)\n"
        "step._process.wait(); step.close()\n"
        "sys.exit(70 + len(step.failed))\n"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", program], stdout=full, stderr=full)
    assert done.returncode == 71


def test_a_step_that_no_controller_takes_is_begun_when_one_does(directory, monkeypatch, capfd):
    words = iter([["bash", "-c", f'cat >&2 <<"END"\n{NO_CONTROLLER}END\nexit 1'], ["true"]])
    monkeypatch.setattr(srun, "_words", lambda *_: next(words))
    monkeypatch.setattr(srun, "AGAIN_S", 0)
    monkeypatch.setattr(srun, "Deadline", lambda *_: NeverNear())
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    log = directory / "logs/rank-00002.log"
    log.write_text("cut in the middle")
    launch(directory, Slurm(nodes=2, ranks_per_node=2), ALL, (3, "attempt"), StopRequest())
    out, errors = capfd.readouterr()
    assert "Unable to contact slurm controller (connect failure); begun again in 0 s" in errors
    assert out.startswith("--- try 3, SLURM job 7 on n[1-2], 20")
    assert log.read_text() == f"cut in the middle\n{out}"
    assert (directory / "logs/rank-00000.log").read_text() == out


class NeverNear:
    def is_near(self) -> bool:
        return False


def test_what_the_user_says_of_the_ranks_environment_counts(monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    run = Slurm(nodes=2, environment={"MASTER_ADDR": "ib1", "OMP_NUM_THREADS": "7", "WORLD_SIZE": "9"})
    made = step_environment(run, Share(world=2, first=0, count=2), (1, "attempt"), 5000)
    assert (made["MASTER_ADDR"], made["OMP_NUM_THREADS"], made["WORLD_SIZE"]) == ("ib1", "7", "2")
    plain = step_environment(Slurm(nodes=2), Share(world=2, first=0, count=2), (1, "attempt"), 5000)
    assert (plain["MASTER_ADDR"], plain["GOMP_SPINCOUNT"]) == ("n1", os.environ.get("GOMP_SPINCOUNT", "1000"))
