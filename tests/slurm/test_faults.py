"""Whatever ends a training on a cluster, it goes on by itself, and its weights are those of an undisturbed one."""

import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from submitted import losses, manifest, wait_until
from trainings import DRIVER, OTHERS, RANK, Training, processes, weights

STEPS = 400
LONG = 800
OFTEN = "run.checkpoints.every_steps=50"
LAYOUT = 0.05  # relative, of the last loss: another number of ranks rounds otherwise, and hundreds of steps carry it on


@pytest.fixture
def train(cluster, new_root):
    """Starts a training in a root of its own."""

    def start(steps: int, *words: str, **how) -> Training:
        return Training(cluster, new_root(), steps, *words, **how)

    return start


@pytest.mark.parametrize("grace_s", [0, 8])
def test_a_preempted_training_is_requeued_and_its_weights_are_the_same(cluster, train, reference, grace_s):
    cluster.run("scontrol", "update", "PartitionName=low", f"GraceTime={grace_s}")
    try:
        training = train(STEPS, "run.partition=low")
        training.wait_for_step(100)
        node = cluster.job(training.job)["NodeList"]
        cluster.submit("-p", "high", "-w", node, "--exclusive", "--wrap", "true", "-o", "/dev/null")
        training.again()
        assert int(training.finish()["Restarts"]) == 1
        assert "continues after step" in training.rank_log()
        assert weights(training.made) == weights(reference(STEPS, 1))
    finally:
        cluster.run("scontrol", "update", "PartitionName=low", "GraceTime=0")


def test_a_cancelled_training_saves_its_state_and_never_comes_back(cluster, train):
    training = train(STEPS)
    training.wait_for_step(100)
    cluster.scancel(training.job)
    told = cluster.wait_for(training.job, "CANCELLED")
    assert int(told["Restarts"]) == 0
    assert "this job was cancelled" in training.log()
    assert "state saved" in training.log()
    assert list((training.made / "checkpoints").glob("step-*"))


def test_a_training_whose_processes_are_killed_or_stopped_goes_on(cluster, train, reference):
    training = train(STEPS, OFTEN)
    training.wait_for_step(60)
    training.kill(RANK)
    training.again()
    training.wait_for_step(120, 2)
    training.kill(DRIVER)
    training.again()
    training.wait_for_step(180, 3)
    training.kill(RANK, signal.SIGSTOP)  # so that it cannot do what it is asked for
    cluster.scancel("--signal=USR2", "--batch", training.job)
    wait_until(lambda: is_asked(cluster, training), 60, training.what_is_there)
    training.again()
    training.wait_for_try(4)  # and at once, before it listens
    cluster.scancel("--signal=USR2", "--batch", training.job)
    training.again()
    assert int(training.finish()["Restarts"]) == 4
    assert "asked to stop again: the ranks are ended at once" in training.log()
    assert "was killed (status 137)" in training.log()
    assert weights(training.made) == weights(reference(STEPS, 1))


def test_a_training_of_which_a_rank_stands_still_is_begun_again_where_it_was(train, reference):
    undisturbed = weights(reference(STEPS, 2))
    training = train(STEPS, OFTEN, "run.ranks_per_node=2", "run.stall_timeout_s=30")
    training.wait_for_step(60)
    os.kill(processes(training.job, RANK)[0], signal.SIGSTOP)
    training.again()
    assert int(training.finish()["Restarts"]) == 1
    assert "of 2 has come to a halt" in training.log()
    assert "continues after step" in training.rank_log()
    assert weights(training.made) == undisturbed


def is_asked(cluster, training: Training) -> bool:
    """Asks a second time, and again until it is heard."""
    if "asked to stop again" in training.log():
        return True
    cluster.scancel("--signal=USR2", "--batch", training.job)
    return False


def test_a_training_whose_rank_always_dies_fails_after_its_tries_with_one_line(cluster, train):
    training = train(STEPS, "run.tries=2", "run.container=[sh,-c,'kill -KILL $$']")
    for number in (1, 2):
        training.again()
        training.wait_for_try(min(number + 1, 2))
    told = cluster.wait_for(training.job, "FAILED")
    assert told["ExitCode"] == "4:0"
    errors = [line for line in training.log().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "begun 2 times without any progress; the last time: " in errors[0]
    assert re.search(r"rank 0 on \S+ was ended by SIGKILL", errors[0])


def test_an_administrators_requeue_of_a_training_and_of_an_element_of_an_array(
    cluster, new_root, tiny_tokens, reference
):
    root = new_root()
    shutil.rmtree(root / "tokens")
    training = Training(cluster, root, STEPS, "run.array=2")
    element = f"{training.id('tokenize')}_1"
    cluster.wait_for(element, "RUNNING")
    cluster.run("scontrol", "requeue", element)
    cluster.start_now(element)
    training.wait_for_step(100)
    cluster.run("scontrol", "requeue", training.job)
    training.again()
    assert int(training.finish()["Restarts"]) == 1
    assert training.manifest("tokenize")["files"] == manifest(tiny_tokens)["files"]
    assert weights(training.made) == weights(reference(STEPS, 1))


KILLER = """
import os, signal, sys

def hook(event, arguments, flag={flag!r}):
    if event == "os.rename" and str(arguments[1]).endswith("manifest.json") and os.path.exists(flag):
        os.unlink(flag)
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
"""


def test_a_job_that_is_killed_while_it_publishes_publishes_the_same_when_it_is_begun_again(train, reference, tmp_path):
    (tmp_path / "flag").touch()
    (tmp_path / "sitecustomize.py").write_text(KILLER.format(flag=str(tmp_path / "flag")))
    setup = f"run.setup=['export PYTHONPATH={tmp_path}']"
    training = train(STEPS, setup, f"run.python={sys.executable}")
    wait_until(lambda: not (tmp_path / "flag").exists(), 120, training.what_is_there)
    assert training.step == STEPS
    assert not (training.made / "manifest.json").exists()
    training.again()
    assert int(training.finish()["Restarts"]) == 1
    assert weights(training.made) == weights(reference(STEPS, 1))


def test_a_controller_that_is_away_stops_no_step_no_end_of_a_training_and_no_new_beginning(
    cluster, train, reference, tmp_path
):
    training = train(STEPS, OFTEN, f"run.setup=['{held_by(tmp_path)}']", f"run.python={sys.executable}")
    wait_until((tmp_path / "held").exists, 60, training.what_is_there)
    end_controller(cluster, signal.SIGTERM)  # which knows then that it has started this job
    wait_until(lambda: cluster.run("scontrol", "ping", check=False).returncode != 0, 30)
    (tmp_path / "go").touch()  # and nobody takes the step
    wait_until(lambda: "begun again in 5 s" in training.log(), 60, training.what_is_there)
    cluster.restart_controller()
    training.wait_for_step(60)
    end_controller(cluster)
    training.kill(RANK)  # the job has to be begun again, and there is nobody to ask
    wait_until(lambda: "was ended by SIGKILL" in training.log(), 60)
    time.sleep(5)
    cluster.restart_controller()
    training.again()
    training.wait_for_step(120, 2)
    end_controller(cluster)
    wait_until((training.made / "manifest.json").exists, 120)
    cluster.restart_controller()
    assert int(training.finish()["Restarts"]) == 1
    assert weights(training.made) == weights(reference(STEPS, 1))


def test_a_node_that_is_lost_before_the_ranks_begin_costs_a_try_and_not_the_task(cluster, train, tmp_path):
    setup = f"run.setup=['{held_by(tmp_path)}']"
    training = train(2, "run.nodes=2", "run.preflight=false", setup, f"run.python={sys.executable}")
    wait_until((tmp_path / "held").exists, 60, training.what_is_there)
    lost = nodes(cluster, training)[1]
    cluster.crash(lost)
    (tmp_path / "go").touch()
    training.again()
    assert f"lost {lost}; the same command continues" in training.log()
    assert lost not in training.finish()["NodeList"]


def held_by(place: Path) -> str:
    """A line of setup with which a job makes the file `held`, and goes on once there is a file `go`."""
    return f"touch {place}/held; until [ -e {place}/go ]; do sleep 0.1; done"


def end_controller(cluster, number: int = signal.SIGKILL) -> None:
    os.kill(int((cluster.directory / "run/slurmctld.pid").read_text()), number)


def test_a_job_that_was_not_to_be_requeued_or_is_cancelled_for_another_one_is_begun_again(cluster, train, reference):
    others = [word for word in OTHERS if word != "~tasks.export"]
    training = train(STEPS, OFTEN, "run.partition=low", others=others)
    cluster.run("scontrol", "update", f"JobId={training.job}", "Requeue=0")
    training.wait_for_step(60)
    training.kill(RANK)
    training.again()
    training.wait_for_step(120, 2)
    cluster.run("scontrol", "update", f"JobId={training.job}", "Requeue=0")
    cluster.run("scontrol", "update", "PartitionName=low", "PreemptMode=CANCEL", "GraceTime=8")
    try:
        node = cluster.job(training.job)["NodeList"]
        cluster.submit("-p", "high", "-w", node, "--exclusive", "--wrap", "true", "-o", "/dev/null")
        training.again()
    finally:
        cluster.run("scontrol", "update", "PartitionName=low", "PreemptMode=REQUEUE", "GraceTime=0")
    assert int(training.finish()["Restarts"]) == 2
    training.wait("export")
    assert training.states("export") == ["COMPLETED"]
    assert weights(training.made) == weights(reference(STEPS, 1))


def test_a_training_goes_on_when_its_nodes_are_lost_and_on_fewer_if_it_has_to(cluster, train, reference, request):
    def update(node: str, state: str) -> None:
        cluster.run("scontrol", "update", f"NodeName={node}", f"State={state}", "Reason=test")

    two = ["run.nodes=2", "run.elastic=1", "run.preflight=false", OFTEN]
    undisturbed = losses(reference(LONG, 2))  # first: the training does not wait for it
    training = train(LONG, *two)
    training.wait_for_step(60)
    first = nodes(cluster, training)
    cluster.crash(first[1])
    wait_until(lambda: training.tries == 1 and not training.is_running(), 90, training.what_is_there)
    training.again()
    training.wait_for_step(120, 2)
    second = nodes(cluster, training)
    assert len(second) == 2
    assert first[1] not in second
    for node in set(cluster.nodes) - {*second, first[1]}:
        request.addfinalizer(lambda node=node: update(node, "RESUME"))
        update(node, "DRAIN")
    cluster.crash(second[0])  # where the process that began the ranks is: SLURM alone can help
    update(second[0], "DOWN")  # which it finds out by itself after half a minute
    wait_until(lambda: not training.is_running(), 60, training.what_is_there)
    done = losses(training.made)
    assert len(done) >= 120
    assert done == undisturbed[: len(done)]
    training.again()
    told = training.finish()
    assert nodes(cluster, training) == [second[1]]
    assert int(told["Restarts"]) == 2
    assert "on 1 node instead of 2" in training.log()
    assert losses(training.made)[-1] == pytest.approx(undisturbed[-1], rel=LAYOUT)


def nodes(cluster, training: Training) -> list[str]:
    return cluster.run("scontrol", "show", "hostnames", cluster.job(training.job)["NodeList"]).stdout.split()
