"""A node that is cut off goes on computing while its job is begun again elsewhere: it must not damage the successor."""

import signal

from submitted import wait_until
from trainings import RANK, Training, processes, weights

STEPS = 400


def test_a_node_that_was_cut_off_cannot_damage_what_its_successor_makes(isolated_cluster, new_root, reference):
    cluster = isolated_cluster
    training = Training(cluster, new_root(), STEPS, "run.checkpoints.every_steps=50")
    training.wait_for_step(60)
    training.kill(RANK, signal.SIGSTOP)  # however fast this machine is, it is not done before its successor begins
    node = cluster.job(training.job)["NodeList"]
    old = processes(training.job, RANK)
    cluster.cut(node)
    # what SLURM finds by itself after half a minute
    cluster.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    wait_until(lambda: not training.is_running(), 30, training.what_is_there)
    assert set(processes(training.job, RANK)) == set(old), "the old rank did not outlive its job: nothing is tested"
    training.again()
    training.wait_for_try(2)
    training.kill(RANK, signal.SIGCONT)
    wait_until(lambda: not set(processes(training.job, RANK)) & set(old), 60, training.what_is_there)
    cluster.heal(node)
    told = training.finish()
    assert int(told["Restarts"]) == 1
    assert told["NodeList"] != node
    assert "try 1 was followed by another one; nothing more is written" in training.log()
    assert weights(training.made) == weights(reference(STEPS, 1))
