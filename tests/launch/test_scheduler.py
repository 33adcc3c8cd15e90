"""What SLURM's commands say, understood. (How they behave: tests/slurm.)"""

from datetime import datetime

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


@pytest.fixture
def program(monkeypatch, tmp_path):
    """Puts a script in the place of one of SLURM's commands."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def make(name, script):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)

    return make


def test_a_command_is_given_up_after_as_many_tries_as_it_says(program, capsys):
    program("squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(LaunchError, match=r"squeue: slurm_load_jobs error: .* \(tried 3 times\)"):
        scheduler.command("squeue", pauses_s=(0.0, 0.0))
    assert capsys.readouterr().err.count("; try ") == 2


def test_a_job_inherits_nothing_of_the_job_in_which_it_is_submitted(program, monkeypatch):
    for name in ("ARRAY_JOB_ID", "RESTART_COUNT", "NTASKS_PER_NODE", "CONF", "CLUSTERS", "JWT"):
        monkeypatch.setenv(f"SLURM_{name}", name)
    monkeypatch.setenv("SRUN_CPUS_PER_TASK", "8")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    kept = {"SLURM_CONF=CONF", "SLURM_CLUSTERS=CLUSTERS", "SLURM_JWT=JWT", "SLURM_TIME_FORMAT=standard"}
    for name in ("sbatch", "scontrol"):
        program(name, "env | grep -E '^(SLURM|SRUN|WORD)'")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    given = set(scheduler.command("sbatch", environment={"WORD": "a"}).split())
    assert given == {*kept, "WORD=a"}
    assert {*kept, "SLURM_JOB_ID=12", "SRUN_CPUS_PER_TASK=8"} < set(scheduler.command("scontrol").split())
    monkeypatch.delenv("SLURM_JOB_ID")  # then they are the user's own
    assert {*kept, "SLURM_NTASKS_PER_NODE=NTASKS_PER_NODE"} < set(scheduler.command("sbatch").split())


def test_hidden_partitions_are_listed_too(program):
    program(
        "sinfo",
        "echo 'main*|4|infinite|idle|64000'; case \"$*\" in *--all*) echo 'secret|2|1:00:00|down|64000' ;; esac",
    )
    found = scheduler.partitions()
    assert (found["secret"].num_nodes, found["secret"].limit_s, found["secret"].is_whole) == (2, 3600, False)
    assert found["main"].is_default


def test_a_cluster_tells_its_name_and_what_time_it_is_there(program, monkeypatch):
    scheduler._cluster.cache_clear()
    monkeypatch.delenv("SLURM_CLUSTER_NAME", raising=False)
    program("scontrol", "echo 'Configuration data as of 2026-11-22T20:00:10\nClusterName             = alps'")
    assert scheduler.cluster() == "alps"
    assert scheduler.clock() == datetime(2026, 11, 22, 20, 0, 10).timestamp()
    program("scontrol", "exit 1")
    assert scheduler.cluster() == "alps"  # asked once
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "andes")  # in a job that is known
    assert scheduler.cluster() == "andes"
    scheduler._cluster.cache_clear()
