"""What would be refused of a job, by the setting that is at fault; what SLURM itself says is in tests/slurm."""

import pytest

from pipeline.jobs.refusals import Cluster, refusals, unseen
from pipeline.jobs.submit import frozen_job
from pipeline.launch import scheduler
from pipeline.launch.scheduler import NOT_AVAILABLE, Partition
from pipeline.launch.slurm import Slurm
from pipeline.plan import Command, plan
from pipeline.settings import decode

MAIN = Partition("main", True, 4, None, True, 64000)
UNKNOWN = "sbatch: unrecognized option '--foo' Try \"sbatch --help\" for more information"


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """What is refused of one data task, on a cluster whose sbatch gives this answer."""

    def refused(answer: str | None = None, *partitions: Partition, **run: object) -> list[str]:
        asked = (scheduler.blamed_setting(answer), answer) if answer else None
        monkeypatch.setattr(scheduler, "refusal", lambda words: asked)
        stage = {"kind": "shard", "sources": [{"path": "tests/data/mini.jsonl"}]}
        command = decode(Command, {"root": str(tmp_path), "stage": stage, "run": {"kind": "slurm", **run}})
        _, tasks = frozen_job(plan(command, None), command, None)
        assert isinstance(command.run, Slurm)
        return refusals(tmp_path, tasks, Cluster({one.name: one for one in partitions or [MAIN]}, 1001), command.run)

    return refused


@pytest.mark.parametrize(
    ("run", "answer", "line"),
    [
        (
            {"flags": ["--exclusive", "--gpus=4"]},
            "sbatch: Invalid generic resource (gres) specification",
            "run.flags: '--gpus=4' is refused: sbatch: Invalid generic resource (gres) specification (shard)",
        ),
        (
            {"flags": ["--exclusive", "--mem=3G", "--foo=1"]},
            UNKNOWN,
            "run.flags: '--foo=1' is refused: sbatch: unrecognized option '--foo' (shard)",
        ),
        ({"flags": ["-z"]}, "sbatch: invalid option -- 'z'", "run.flags: '-z' is refused: sbatch: invalid option -- "),
        ({}, "sbatch: Invalid account or account/partition combination", "run: what this task asks for is refused: "),
        (
            {"account": "me", "data": {"qos": "low"}},
            "sbatch: Invalid qos specification",
            "run.data.qos: 'low', which this task asks for, is refused: sbatch: Invalid qos specification (shard)",
        ),
        (
            {"data": {"memory_per_node": "640G"}},
            f"sbatch: {NOT_AVAILABLE}",
            "run.data.memory_per_node: '640G', which this task asks for, is refused: nodes of 'main' have 64000M (",
        ),
        ({"data": {"memory_per_node": "1G"}}, f"sbatch: {NOT_AVAILABLE}", "run: what this task asks for is refused: "),
        ({"setup": ["module load x", "if true"]}, None, "run.setup: 'if true' is no whole command of bash ("),
    ],
)
def test_the_setting_that_is_at_fault_is_named(refused, run, answer, line):
    (said,) = refused(answer, **run)
    assert said.startswith(line)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("SBATCH_ACCOUNT", "sbatch: Invalid account or account/partition combination"),
        ("SBATCH_TIMELIMIT", "allocation failure: Requested time limit is invalid"),
        ("SBATCH_GRES", "sbatch: error: Invalid generic resource (gres) specification"),
    ],
)
def test_a_variable_that_is_at_fault_is_named(refused, monkeypatch, name, answer):
    monkeypatch.setenv(name, "x")
    assert refused(answer) == [f"{name}: 'x', which is set here, is refused: {answer} (shard)"]


@pytest.mark.parametrize(
    ("flag", "instead"),
    [
        ("--clusters=b", "submit on a login node of that cluster"),
        ("--cluster=b", "submit on a login node of that cluster"),
        ("-HMb", "submit on a login node of that cluster"),
        ("--partition=main", "run.partition says it"),
        ("-pmain", "run.partition says it"),
        ("--time=5", "run.time says it"),
        ("-t5", "run.time says it"),
    ],
)
def test_a_flag_that_would_hide_where_and_how_long_a_job_runs_is_refused(refused, flag, instead):
    (said,) = refused(None, data={"flags": [flag]})
    assert said == f"run.data.flags: '{flag}' cannot be asked for here: {instead} (shard)"
    assert refused(None, data={"flags": ["--time-min=5", "--cluster-constraint=x"]}) == []


def test_more_memory_than_any_node_has_is_refused_while_nodes_are_down_too(refused):
    down = Partition("main", True, 4, None, False, 64000)
    assert refused(NOT_AVAILABLE, down, data={"memory_per_node": "640G"})
    assert not refused(NOT_AVAILABLE, down, data={"memory_per_node": "60G"})


def test_a_cluster_may_choose_the_partition_itself(refused, monkeypatch):
    plain = Partition("main", False, 4, 3600, True, 64000)
    assert refused(None, plain) == []
    assert (
        "run.partition: no partition is called 'mian'; did you mean 'main'?"
        in refused(None, plain, partition="mian")[0]
    )
    monkeypatch.setenv("SBATCH_PARTITION", "main")
    assert Cluster({"main": plain}, 1001).limit_s(Slurm()) == 3600


def test_of_several_partitions_each_has_to_be_known_and_the_largest_counts(refused):
    few = Partition("few", False, 1, 3600, True, 16000)
    assert Cluster({"main": MAIN, "few": few}, 1001).limit_s(Slurm(partition="main,few")) == 3600
    assert refused(None, MAIN, few, partition="few,main", data={"nodes": 4}) == []
    assert refused(None, MAIN, few, partition="few,mian") == [
        "run.partition: no partition is called 'mian'; did you mean 'main'? (shard)"
    ]
    (said,) = refused(NOT_AVAILABLE, MAIN, few, partition="few,main", data={"memory_per_node": "640G"})
    asked = "run.data.memory_per_node: '640G', which this task asks for, is refused"
    assert said == f"{asked}: nodes of 'main' have 64000M (shard)"


def test_an_interpreter_that_only_the_nodes_have_is_said():
    (line,) = unseen(Slurm(python="/shared/venv/bin/python"))
    assert line == "run.python: /shared/venv/bin/python is not on this machine; right only if the nodes have it"
    assert not list(unseen(Slurm(python="/bin/sh"))) + list(unseen(Slurm(python="python3.11")))
