"""A training that is longer than its partition allows: it saves in time and goes on in a chain of jobs by itself."""

import signal
import time
from datetime import datetime

from submitted import wait_until
from trainings import RANK, Training, weights

STEPS = 2500


def test_a_training_longer_than_the_limit_is_a_chain_of_jobs_with_the_same_weights(cluster, new_root, reference):
    training = Training(cluster, new_root(), STEPS, "run.partition=short", "run.notice_s=10")
    training.wait_for_step(10)
    hold_until(cluster, training, 45)
    wait_until(lambda: "SLURM begins this job again" in training.log(), 100, training.what_is_there)
    assert "the time of this job is nearly over: its state is saved" in training.log()
    assert float((training.made / "work/save_s").read_text()) > 0
    saved = training.step
    assert newest_checkpoint(training) == saved, "what was done after the last checkpoint was lost"
    training.again()
    training.wait_for_step(saved + 20, 2)
    shorten(cluster, training)
    training.kill(RANK, signal.SIGSTOP)  # SLURM wakes what it ends
    wait_until(lambda: training.log().count("SLURM begins this job again") == 2, 60, training.what_is_there)
    assert newest_checkpoint(training) == training.step > saved
    training.again()
    told = training.finish()
    assert int(told["Restarts"]) >= 2  # a slow machine needs one more
    assert weights(training.made) == weights(reference(STEPS, 1))


def newest_checkpoint(training: Training) -> int:
    return max(int(path.name.removeprefix("step-")) for path in (training.made / "checkpoints").glob("step-*[0-9]"))


def hold_until(cluster, training: Training, elapsed_s: float) -> None:
    """Halt the ranks until the job has run for so long: however fast this machine is, they have not done all then."""
    training.kill(RANK, signal.SIGSTOP)
    began = datetime.fromisoformat(cluster.job(training.job)["StartTime"]).timestamp()
    time.sleep(max(0.0, began + elapsed_s - time.time()))
    training.kill(RANK, signal.SIGCONT)


def shorten(cluster, training: Training) -> None:
    """Take time away without a word: SLURM ends the job before it has looked at its end again."""
    end = time.strftime("%FT%T", time.localtime(time.time() + 15))
    cluster.run("scontrol", "update", f"JobId={training.job}", f"EndTime={end}")
