"""What each task of a job asks SLURM for."""

import pytest

from pipeline.errors import ConfigError
from pipeline.launch.slurm import Slurm, sbatch_flags, seconds_of
from pipeline.plan import Command
from pipeline.settings import decode, encode
from pipeline.stages.evaluate import Evaluate
from pipeline.stages.pretrain import Pretrain
from pipeline.stages.tokenize import Tokenize
from pipeline.stages.train_tokenizer import TrainTokenizer

MODEL = {"kind": "decoder", "d_model": 32, "num_layers": 2, "num_heads": 4, "max_seq_len": 64}
PRETRAIN = decode(Pretrain, {"tokens": "@t", "model": MODEL, "steps": 1, "batch_tokens": 512, "seq_len": 32})
TOKENIZE = Tokenize(corpus="@c", tokenizer="@t")
TRAIN_TOKENIZER = TrainTokenizer(corpus="@c")
EVALUATE = Evaluate(model="@m", tokens="@t")


def slurm(**settings) -> Slurm:
    run = decode(Command, {"run": {"kind": "slurm", **settings}, "stage": encode(TOKENIZE)}).run
    assert isinstance(run, Slurm)
    return run


@pytest.mark.parametrize(
    ("settings", "nodes", "ranks"),
    [
        ({}, 1, 1),
        ({"nodes": 2}, 2, 2),
        ({"nodes": 2, "gpus_per_node": 8}, 2, 16),
        ({"nodes": 2, "gpus_per_node": 8, "ranks_per_node": 4}, 2, 8),
        ({"nodes": 2, "ranks": 6}, 2, 6),
        ({"nodes": 2, "gpus_per_node": 8, "tasks": {"train": {"nodes": 4}}}, 4, 32),
        ({"gpus_per_node": 8, "tasks": {"train": {"gpus_per_node": 4}}}, 1, 4),
        ({"nodes": 2, "data": {"nodes": 5}}, 2, 2),
    ],
)
def test_a_training_has_the_ranks_of_all_its_nodes(settings, nodes, ranks):
    run = slurm(**settings).of("train", PRETRAIN)
    assert (run.nodes, run.ranks) == (nodes, ranks)
    assert decode(Command, {"run": encode(run), "stage": encode(TOKENIZE)}).run == run  # as it is frozen


def test_ranks_that_do_not_spread_over_the_nodes_are_refused():
    for settings in ({"nodes": 2, "ranks": 3}, {"nodes": 2, "ranks": 4, "ranks_per_node": 3}):
        with pytest.raises(ConfigError, match=r"ranks do not spread over 2 nodes"):
            slurm(**settings)


def test_data_tasks_ask_for_an_array_and_nothing_that_only_a_training_needs():
    run = slurm(
        nodes=4,
        gpus_per_node=8,
        memory_per_node="900G",
        constraint="a100",
        partition="gpu",
        time="2-00:00:00",
        data={"partition": "cpu", "time": "4:00:00", "memory_per_node": "16G", "array": 32, "at_once": 8},
    )
    flags = sbatch_flags(run.of("tokenize", TOKENIZE), TOKENIZE, None)
    assert "--array=0-31%8" in flags
    assert {"--partition=cpu", "--time=4:00:00", "--mem=16G", "--nodes=1"} <= set(flags)
    assert not [flag for flag in flags if "gpu" in flag or "a100" in flag]
    assert run.of("one", TRAIN_TOKENIZER).ranks == 1
    flags = sbatch_flags(run.of("train", PRETRAIN), PRETRAIN, None)
    assert {"--nodes=4", "--ntasks-per-node=8", "--gres=gpu:8", "--partition=gpu", "--constraint=a100"} <= set(flags)


def test_a_stage_that_reads_a_model_asks_for_one_gpu_of_the_training_nodes():
    run = slurm(nodes=4, gpus_per_node=8, partition="gpu", data={"partition": "cpu"}).of("evaluate", EVALUATE)
    assert (run.nodes, run.ranks, run.gpus_per_node, run.partition) == (1, 1, 1, "gpu")
    assert slurm().of("evaluate", EVALUATE).gpus_per_node == 0


@pytest.mark.parametrize(
    ("asked", "share"),
    [("240G", "61440M"), ("1000M", "250M"), ("2T", "524288M"), ("2K", "1M"), ("0", "0"), (None, None)],
)
def test_a_stage_that_reads_a_model_asks_for_the_memory_of_one_rank(asked, share):
    run = slurm(nodes=2, ranks_per_node=4, memory_per_node=asked, tasks={"mine": {"memory_per_node": "7G"}})
    assert run.of("evaluate", EVALUATE).memory_per_node == share
    assert run.of("mine", EVALUATE).memory_per_node == "7G"
    assert run.of("train", PRETRAIN).memory_per_node == asked


def test_elastic_asks_for_a_range_of_nodes():
    run = slurm(nodes=4, elastic=2).of("train", PRETRAIN)
    assert "--nodes=2-4" in sbatch_flags(run, PRETRAIN, None)
    assert run.on(3).ranks == 3
    assert "--nodes=4" in sbatch_flags(slurm(nodes=4, elastic=5).of("train", PRETRAIN), PRETRAIN, None)


def test_an_array_of_one_is_none():
    run = slurm(array=1).of("tokenize", TOKENIZE)
    assert run.ranks == 1
    assert not [flag for flag in sbatch_flags(run, TOKENIZE, None) if flag.startswith("--array")]


def test_tasks_that_compute_with_a_model_may_ask_for_something_else():
    run = slurm(partition="gpu", flags=["--exclusive"], model={"partition": "shared", "flags": []})
    assert (run.of("evaluate", EVALUATE).partition, run.of("evaluate", EVALUATE).flags) == ("shared", [])
    assert (run.of("train", PRETRAIN).partition, run.of("tokenize", TOKENIZE).partition) == ("gpu", "gpu")


def test_a_time_above_the_limit_of_the_partition_becomes_the_limit():
    run = slurm(time="3-00:00:00").of("train", PRETRAIN)
    assert "--time=1440" in sbatch_flags(run, PRETRAIN, 86400)
    assert "--time=3-00:00:00" in sbatch_flags(run, PRETRAIN, 7 * 86400)


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("30", 1800),
        ("1:30", 90),
        ("8:00:00", 28800),
        ("2-00:00:00", 172800),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("infinite", None),
    ],
)
def test_times_are_read_as_slurm_writes_them(time, seconds):
    assert seconds_of(time) == seconds


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"time": "8h"}, 'run.time: \'8h\' is no time; wanted "8:00:00" or "1-12:00:00"'),
        (
            {"time": 86400},
            'run.time: YAML makes 86400 of 24:00:00 without quotes; wanted "24:00:00", in quotes, or',
        ),
        ({"time": True}, "run.time: wanted a valid string, found True"),
        (
            {"data": {"memory_per_node": "640GB"}},
            "run.data.memory_per_node: '640GB' is no memory; wanted a number and K, M, G or T, as \"64G\"",
        ),
        (
            {"tasks": {"pretrain": {"memory_per_node": 240}}},
            'run.tasks.pretrain.memory_per_node: 240 has no unit, so SLURM would give 240 MB; wanted "240G", or "240M"',
        ),
        (
            {"environment": {"A": 0.5}},
            'run.environment.A: wanted a valid string, found 0.5; in quotes it is one: "0.5"',
        ),
        (
            {"flags": ["--exclusive", "--mail-type=END", "FAIL"]},
            "run.flags: 'FAIL' does not begin with '-'; a comma separates, so quote \"--mail-type=END,FAIL\"",
        ),
        ({"flags": "exclusive"}, "run.flags: 'exclusive' does not begin with '-'"),
        ({"flags": "--comment='x"}, "run.flags: No closing quotation"),
        ({"setup": 3}, "run.setup: wanted a valid array, found 3"),
    ],
)
def test_what_is_not_written_as_slurm_wants_it_is_refused_with_what_is(settings, message):
    with pytest.raises(ConfigError) as caught:
        slurm(**settings)
    assert str(caught.value).startswith(message)


def test_numbers_and_single_words_are_taken_as_they_were_meant():
    run = slurm(
        time=30,
        account=12345,
        memory_per_node=0,
        environment={"OMP_NUM_THREADS": 8},
        flags="--exclusive -C gpu",
        srun=["-c", 2],
        container="apptainer exec --nv 'my image.sif'",
        setup="module load x\nmodule load y",
    )
    assert (run.time, run.account, run.memory_per_node, run.environment["OMP_NUM_THREADS"]) == ("30", "12345", "0", "8")
    assert (run.flags, run.srun) == (["--exclusive", "-C", "gpu"], ["-c", "2"])
    assert run.container == ["apptainer", "exec", "--nv", "my image.sif"]
    assert run.setup == slurm(setup=["module load x", "module load y\n"]).setup == ["module load x", "module load y"]


def test_a_site_may_want_gpus_said_in_its_own_way():
    run = slurm(gpus_per_node=4, flags=["--gpus-per-node=a100:4"]).of("train", PRETRAIN)
    flags = sbatch_flags(run, PRETRAIN, None)
    assert "--gpus-per-node=a100:4" in flags
    assert not [flag for flag in flags if flag.startswith("--gres")]
