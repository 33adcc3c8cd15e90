"""What SLURM's commands say, understood. (How they behave: tests/slurm.)"""

import pytest

from pipeline.errors import LaunchError
from pipeline.launch import scheduler
from pipeline.launch.scheduler import ANSWER, FOR_THE_MOMENT, NOT_NOW, QUEUE_IS_FULL, NoSlurm, blamed_setting


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("sbatch: error: invalid partition specified: mian", "partition"),
        ("allocation failure: Invalid partition name specified", "partition"),
        ("allocation failure: User's group not permitted to use this partition", "partition"),
        ("allocation failure: Invalid account or account/partition combination specified", "account"),
        ("allocation failure: Invalid qos specification", "qos"),
        ("allocation failure: Invalid feature specification", "constraint"),
        ("sbatch: error: Invalid generic resource (gres) specification", "gpus_per_node"),
        ("allocation failure: Requested time limit is invalid (missing or exceeds some limit)", "time"),
        ("sbatch: error: Invalid --time specification", "time"),
        ("sbatch: error: Memory specification can not be satisfied", "memory_per_node"),
        ("allocation failure: Node count specification invalid", "nodes"),
        ("allocation failure: More processors requested than permitted", "cpus_per_rank"),
        ("allocation failure: Invalid job array specification", "array"),
        ("sbatch: unrecognized option '--nonsense' Try \"sbatch --help\" for more information", "flags"),
        ("allocation failure: Requested reservation is invalid", "flags"),
        ("allocation failure: Requested node configuration is not available", ""),
    ],
)
def test_the_setting_that_slurm_does_not_like_is_told_from_what_it_says(text, setting):
    assert blamed_setting(text) == setting


@pytest.mark.parametrize(
    "text",
    [
        "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
        "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
        "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
        "sbatch: error: Batch job submission failed: Zero Bytes were transmitted or received",
    ],
)
def test_what_may_go_well_the_next_time_is_known(text):
    assert FOR_THE_MOMENT.search(text)
    assert not QUEUE_IS_FULL.search(text)


@pytest.mark.parametrize(
    "text",
    [
        "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying",
        "sbatch: error: Batch job submission failed: Resource temporarily unavailable",
    ],
)
def test_a_full_queue_is_not_asked_again(text):
    assert QUEUE_IS_FULL.search(text)
    assert not FOR_THE_MOMENT.search(text)


@pytest.mark.parametrize(
    "text",
    [
        "allocation failure: Required node not available (down, drained or reserved)",
        "allocation failure: Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
        "sbatch: the queue is full, SLURM takes no more jobs; submit later",
    ],
)
def test_what_is_only_so_now_is_no_refusal(text):
    assert NOT_NOW.search(text)


@pytest.mark.parametrize(
    ("line", "id"), [("12", "12"), ("12;main", "12"), ("Submitted batch job 12", None), ("12 13", None), ("", None)]
)
def test_the_id_of_a_job_is_told_from_what_else_sbatch_may_print(line, id):
    found = ANSWER.fullmatch(line)
    assert (found and found[1]) == id


def test_a_machine_without_slurm_is_told_where_there_is_one(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoSlurm, match="there is no such command on this machine's PATH; run this on a login node"):
        scheduler.partitions()


def test_a_command_is_given_up_after_as_many_tries_as_it_says(monkeypatch, tmp_path, capsys):
    failing = tmp_path / "squeue"
    failing.write_text("#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact slurm controller' >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(LaunchError, match=r"squeue: slurm_load_jobs error: .* \(tried 3 times\)"):
        scheduler.command("squeue", pauses_s=(0.0, 0.0))
    assert capsys.readouterr().err.count("; try ") == 2
