"""What SLURM's commands say, understood. (How they behave: tests/slurm.)"""

import tempfile
import time

import pytest

from pipeline.errors import LaunchError
from pipeline.launch import scheduler
from pipeline.launch.scheduler import ANSWER, FOR_THE_MOMENT, NOT_NOW, QUEUE_IS_FULL, NoSlurm, Seen, blamed_setting

TWICE = "CET-1CEST,M3.5.0,M10.5.0/3"  # the time of Berlin, where an hour comes twice on October 25, 2026
SECOND_TIME = 1792893540  # 02:59:00 there, as on the clock an hour before


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
def test_a_full_queue_is_not_asked_again(text, program):
    assert QUEUE_IS_FULL.search(text)
    program("sbatch", f"echo '{text}' >&2; exit 1")
    with pytest.raises(LaunchError, match="sbatch: the queue is full, SLURM takes no more jobs; submit later"):
        scheduler.command("sbatch")
    assert scheduler.refusal(["sbatch"]) is None


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


def test_a_machine_that_is_short_of_something_is_no_full_queue_and_is_asked_again(program, capsys):
    program("squeue", "echo 'slurm_load_jobs error: Resource temporarily unavailable' >&2; exit 1")
    with pytest.raises(LaunchError, match=r"^squeue: slurm_load_jobs error: .* unavailable \(tried 2 times\)$"):
        scheduler.command("squeue", pauses_s=(0.0,))
    assert "; try 2 of 2" in capsys.readouterr().err


def test_what_a_person_likes_to_see_of_slurm_changes_nothing(program, monkeypatch):
    for name in ("SQUEUE_PARTITION", "SINFO_PARTITION", "SCANCEL_STATE", "SACCT_FEDERATION", "SBATCH_PARTITION"):
        monkeypatch.setenv(name, "high")
    for name in ("SLURM_CLUSTERS", "SBATCH_CLUSTERS"):
        monkeypatch.setenv(name, "andes")
    for name in ("squeue", "sinfo", "scancel", "sacct", "sbatch"):
        program(name, "env | grep -E '=(high|andes)'")
        assert scheduler.command(name) == "SBATCH_PARTITION=high\n"


@pytest.mark.parametrize("name", ["SLURM_CLUSTERS", "SBATCH_CLUSTERS"])
def test_a_submission_that_would_go_to_another_cluster_is_refused(monkeypatch, name):
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "alps")
    for other in ("andes", "alps,andes", "all"):
        monkeypatch.setenv(name, other)
        wanted = f"^{name}={other}: wanted no other cluster than .* 'alps'; submit on a login .* or unset {name}$"
        with pytest.raises(LaunchError, match=wanted):
            scheduler.refuse_other_clusters()
    monkeypatch.setenv(name, "alps")
    scheduler.refuse_other_clusters()


def test_nowhere_to_keep_what_is_printed_is_said_as_such(program, monkeypatch, tmp_path):
    program("squeue", "true")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(
        LaunchError, match=r"^squeue: cannot be run: No such file .*; TMPDIR=DIR names another"
    ) as found:
        scheduler.command("squeue")
    assert not isinstance(found.value, NoSlurm)


def test_what_the_controller_has_forgotten_the_database_knows(program):
    program("squeue", "echo '8|RUNNING|None|n1|N/A'")
    rows = (
        "9|CANCELLED by 0|None assigned",
        "10|OUT_OF_MEMORY|n1",
        "11_0|COMPLETED|n[1-2]",
        "11_[2,4-8:2%3]|CANCELLED by 0|None assigned",
        "12_[1,3,1...]|CANCELLED|None assigned",
        "13|RUNNING|n1",  # as far as it has heard
    )
    program("sacct", "\n".join(f"echo '{row}'" for row in rows))
    assert scheduler.look(["8", "9", "10", "11", "12", "13"]) == {
        "8": Seen("8", "RUNNING", "None", "n1", "N/A"),
        "9": Seen("9", "CANCELLED"),
        "10": Seen("10", "OUT_OF_MEMORY", "", "n1"),
        "11_0": Seen("11_0", "COMPLETED", "", "n[1-2]"),
        **{f"11_{number}": Seen(f"11_{number}", "CANCELLED") for number in (2, 4, 6, 8)},
        **{f"12_{number}": Seen(f"12_{number}", "CANCELLED") for number in (1, 3)},
    }
    program("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert list(scheduler.look(["8", "9"])) == ["8"]


def test_an_element_that_the_controller_has_forgotten_before_the_others_is_asked_for_by_its_id(program):
    program("squeue", "echo '7_1|RUNNING|None|n1|N/A'\necho '7_2|PENDING|None||N/A'")
    program("sacct", '[ "$*" = "${*% 7} 7" ] && printf \'7_0|FAILED|n1\\n7_1|RUNNING|n1\\n\'')
    found = scheduler.look(["7", "7_0", "7_1", "7_2"])
    assert {job: seen.state for job, seen in found.items()} == {"7_0": "FAILED", "7_1": "RUNNING", "7_2": "PENDING"}
    assert list(scheduler.look(["7_0"])) == ["7_0"]
    assert list(scheduler.look(["7"])) == ["7_1", "7_2"]


def test_numbers_are_read_as_slurm_abbreviates_them():
    assert scheduler.numbers_of("0") == [0]
    assert scheduler.numbers_of("0,3-5,9") == [0, 3, 4, 5, 9]
    assert scheduler.numbers_of("1,10-15:2,2...") == [1, 10, 12, 14]


def test_a_job_inherits_nothing_of_the_job_in_which_it_is_submitted(program, monkeypatch):
    for name in ("ARRAY_JOB_ID", "RESTART_COUNT", "NTASKS_PER_NODE", "CONF", "CLUSTERS", "JWT"):
        monkeypatch.setenv(f"SLURM_{name}", name)
    monkeypatch.setenv("SRUN_CPUS_PER_TASK", "8")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    kept = {"SLURM_CONF=CONF", "SLURM_JWT=JWT", "SLURM_TIME_FORMAT=standard"}
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
    assert scheduler.clock() == 1795377610
    program("scontrol", "exit 1")
    assert scheduler.cluster() == "alps"  # asked once
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "andes")  # in a job that is known
    assert scheduler.cluster() == "andes"
    scheduler._cluster.cache_clear()


def test_times_are_right_in_the_hour_that_comes_twice(program, monkeypatch):
    monkeypatch.setenv("TZ", TWICE)
    time.tzset()
    told = f"$(date -d @{SECOND_TIME} +%FT%T)"
    program("scontrol", f'echo "Configuration data as of {told}"; echo "JobId=7 EndTime={told}"')
    try:
        assert scheduler.clock() == SECOND_TIME
        program("scontrol", f'echo "JobId=7 EndTime={told}"')
        assert scheduler.time_of(scheduler.show("7")["EndTime"]) == SECOND_TIME
    finally:
        monkeypatch.undo()
        time.tzset()
