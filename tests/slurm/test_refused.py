"""What a cluster would refuse is said at submission, all of it together, with the setting; memory that ran out too."""

import json
import re

import pytest
from support import run_pipeline

HUGE = "10000G"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run.partition=mian"], r"run\.partition: no partition is called 'mian'; did you mean 'main'\? \(shard, .*\)"),
        (["run.data.partition=lwo"], r"run\.data\.partition: .* 'lwo'; did you mean 'low'\? \(shard, clean, dedup, "),
        (
            ["run.tasks={tokenize: {partition: x}}"],
            r"run\.tasks\.tokenize\.partition: .*'x'; there is high, low, main, short \(tokenize\)",
        ),
        (["run.nodes=8"], r"run\.nodes: wanted 8 nodes, but partition 'main' has 4 \(pretrain, finetune\)"),
        (["run.nodes=8", "run.elastic=5"], r"run\.elastic: wanted 5 nodes, but partition 'main' has 4"),
        (["run.constraint=h100"], r"run\.constraint: 'h100', which .*refused: .*Invalid feature .* \(pretrain,"),
        (["run.time=0:30"], r"run\.time: wanted a minute or more, found '0:30'"),
        (["run.gpus_per_node=2"], r"run\.gpus_per_node: '2', which this task asks for, is refused: .*generic resource"),
        (["run.cpus_per_rank=99"], r"run\.cpus_per_rank: '99', .*: .*More processors requested than permitted"),
        (
            [f"run.memory_per_node={HUGE}"],
            r"run\.memory_per_node: '10000G', .*: nodes of 'main' have 64000M \(pretrain, ",
        ),
        (
            ["run.flags=[--hold,--nonsense]"],
            r"run\.flags: '--nonsense' .*: sbatch: unrecognized option '--nonsense' \(",
        ),
        (
            ["run.tasks={tokenise: {nodes: 1}}"],
            r"run\.tasks\.tokenise: the job has no such task; did you mean 'tokenize'",
        ),
        (["run.flags=['--array=0-3']"], r"run\.flags: '--array=0-3' cannot be asked for here: run\.array .* \(shard,"),
        (["run.flags=['-d singleton']"], r"run\.flags: '-d singleton' cannot .*: a task waits for those whose output"),
        (["run.data.flags=['--sig=USR1@60']"], r"run\.data\.flags: '--sig=USR1@60' cannot .*: run\.notice_s"),
        (["run.flags=[-HW]"], r"run\.flags: '-HW' cannot .*: a submission needs what sbatch prints"),
        (["root='/tmp/a\\b'"], r"root: wanted a path that sbatch can write logs to, .* found '/tmp/a"),
        (["root=/proc/version/here"], r"root: wanted a directory, but /proc/version is a file"),
    ],
)
def test_what_slurm_would_refuse_is_said_before_anything_is_submitted(cluster, tmp_path, words, message):
    root = [] if any(word.startswith("root=") for word in words) else [f"root={tmp_path / 'root'}"]
    done = run_pipeline("job=tiny", "run=slurm", *root, *words, status=2, SLURM_CONF=cluster.env["SLURM_CONF"])
    assert re.search(message, done.stderr), done.stderr
    assert not (tmp_path / "root").exists()
    assert not cluster.run("squeue", "--noheader").stdout


def test_flags_that_are_the_pipelines_own_are_refused_together_and_the_others_are_not(cluster, tmp_path):
    own = ["--output=x", "-ex", "--comment=x", "--export=NONE", "--parsable", "--wait", "--test-only", "-Q", "-V", "-h"]
    own += ["--usage", "--wrap=true", "-J", "--chdir=/", "-N2", "--ntasks-per-node=2", "-n3", "--open-mode=truncate"]
    own += ["--kill-on-invalid-dep=no", "--signal=TERM@9", "--dependency=singleton", "--error=x", "--help", "--version"]
    own += ["--no-requeue", "--clusters=x", "-Mx", "--partition=low", "-plow", "--time=5", "-t5"]
    allowed = ["--hold", "--exclusive", "--mail-type=END", "--nice=3", "-C", "''"]
    words = ["job=tiny", "run=slurm", f"root={tmp_path / 'root'}", "~tasks.report", "--plan"]
    conf = {"SLURM_CONF": cluster.env["SLURM_CONF"]}
    said = run_pipeline(*words, f"run.flags={own + allowed}", status=2, **conf).stderr
    refused = re.findall(r"run\.flags: '(.*?)' cannot be asked for here: \w+", said)
    assert sorted(refused) == sorted(own)
    run_pipeline(*words, f"run.flags={allowed[:-2]}", **conf)


def test_several_mistakes_are_reported_together(cluster, tmp_path):
    words = ("run.nodes=8", "run.data.partition=x", "run.tasks={evaluate: {time: '0:01'}}")
    done = run_pipeline(
        "job=tiny", "run=slurm", *words, f"root={tmp_path}", status=2, SLURM_CONF=cluster.env["SLURM_CONF"]
    )
    assert [line.split(": ")[1] for line in done.stderr.splitlines()] == [
        "run.data.partition",
        "run.nodes",
        "run.tasks.evaluate.time",
    ]
    assert not list(tmp_path.iterdir())


def test_nodes_that_are_down_now_are_waited_for(cluster, tmp_path):
    cluster.run("scontrol", "update", f"nodename={cluster.nodes[-1]}", "state=drain", "reason=test")
    words = ("job=tiny", "run=slurm", "run.nodes=4", f"root={tmp_path}", "--plan")
    assert "--nodes=4" in run_pipeline(*words, SLURM_CONF=cluster.env["SLURM_CONF"]).stdout
    cluster.run("scontrol", "update", f"nodename={cluster.nodes[-1]}", "state=resume")


def test_an_array_is_bounded_by_what_the_cluster_allows_and_that_is_said(cluster, tmp_path):
    words = ("job=tiny", "run=slurm", "run.array=5000", f"root={tmp_path}", "--plan")
    shown = run_pipeline(*words, SLURM_CONF=cluster.env["SLURM_CONF"]).stdout
    assert "shard: an array of 1001 instead of run.array=5000: this cluster's MaxArraySize allows no longer" in shown
    flag = next(word for word in shown.split() if word.startswith("--array="))
    assert flag == "--array=0-1000"
    longer = cluster.run("sbatch", "--test-only", "--array=0-1001", "--wrap=true", check=False)
    assert "Invalid job array specification" in longer.stderr
    cluster.run("sbatch", "--test-only", flag, "--wrap=true")


def test_memory_that_has_run_out_is_said_as_such_with_the_estimate_beside_it(new_cluster, tiny_tokens, tmp_path):
    cluster = new_cluster("--nodes", "1", "--enforce-memory")
    model = "stage.model={kind: decoder, d_model: 32, num_layers: 2, num_heads: 4, vocab_size: 512}"
    words = ("stage=pretrain", f"stage.tokens={tiny_tokens}", model, "stage.steps=2", "run=slurm")
    run_pipeline(*words, "run.memory_per_node=200M", f"root={tmp_path}", SLURM_CONF=cluster.env["SLURM_CONF"])
    task = json.loads((tmp_path / "jobs/pretrain/job.json").read_text())["tasks"][0]
    cluster.wait_for(task["slurm"], "FAILED", "OUT_OF_MEMORY")
    result = json.loads((next(tmp_path.glob("model/*/work")) / "result.json").read_text())
    assert result["status"] == 4
    assert re.search(
        rf"rank 0 on {cluster.nodes[0]} ran out of memory: the job asked for memory_per_node=200M; the model's states "
        r"alone need about 0\.\d MB a rank, activations come on top; raise run\.memory_per_node, or spread the model",
        result["problems"][0],
    )
