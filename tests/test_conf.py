"""Every YAML file of conf/ and jobs/ composes and decodes."""

import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from support import PROJECT, run_pipeline

from pipeline.compose import compose
from pipeline.launch.local import Local
from pipeline.launch.slurm import Slurm, sbatch_flags
from pipeline.plan import Command
from pipeline.settings import decode
from pipeline.stages import AnyStage
from pipeline.stages.clean import Clean
from pipeline.stages.evaluate import Evaluate
from pipeline.stages.pretrain import Pretrain

JOBS = sorted(path.stem for path in (PROJECT / "jobs").glob("*.yaml"))
KINDS = {"stage", "run", "tracker", "model"}


def test_the_groups_are_those_that_this_test_knows():
    assert {path.name for path in (PROJECT / "conf").iterdir() if path.is_dir()} == KINDS | {"job"}


@pytest.mark.parametrize("job", JOBS)
def test_every_job_composes_decodes_and_plans(job, tmp_path):
    done = run_pipeline(f"job={job}", f"root={tmp_path}", "--plan")
    assert "nothing was started" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("group", ["run", "tracker"])
def test_every_preset_composes_and_decodes(group):
    for path in (PROJECT / "conf" / group).glob("*.yaml"):
        settings = composed(f"{group}={path.stem}")[group]
        written = getattr(decode(Command, {group: settings}), group).model_dump(mode="json")
        assert holds(written, settings), path.name
        assert holds(
            settings, {key: value for key, value in yaml.safe_load(path.read_text()).items() if key != "defaults"}
        )


def test_the_presets_of_the_launchers_name_every_setting():
    for launcher in (Local, Slurm):
        kind = launcher.model_fields["kind"].default
        named = set(yaml.safe_load((PROJECT / f"conf/run/{kind}.yaml").read_text()))
        assert named | {"ranks"} == set(launcher.model_fields), kind


@pytest.mark.parametrize("cluster", ["cpu_cluster", "a100", "h100_ib"])
def test_data_tasks_of_the_example_clusters_ask_for_no_gpus_and_no_whole_nodes(cluster):
    run = decode(Command, {"run": composed(f"run={cluster}")["run"]}).run
    training = sbatch_flags(run.of("pretrain", Pretrain(tokens="t", steps=1)), Pretrain(tokens="t", steps=1), None)
    data = sbatch_flags(run.of("clean", Clean(corpus="c")), Clean(corpus="c"), None)
    assert sum("gpu:" in flag or "gpus" in flag for flag in training) == (cluster != "cpu_cluster")
    a_node = f"--mincpus={run.ranks_per_node * run.cpus_per_rank}" if run.elastic else f"--ntasks-per-node={run.each}"
    assert a_node in training
    assert not [flag for flag in data if "gpu" in flag or "exclusive" in flag]
    assert [flag for flag in data if flag.startswith("--array=0-")]
    one = sbatch_flags(run.of("evaluate", Evaluate(model="m", tokens="t")), Evaluate(model="m", tokens="t"), None)
    assert "--nodes=1" in one
    assert [flag[-2:] for flag in one if "gpu:" in flag or "gpus" in flag] == ["=1" if cluster == "a100" else ":1"] * (
        cluster != "cpu_cluster"
    )
    assert not [flag for flag in one if "exclusive" in flag or flag == "--mem=240G"]


@pytest.mark.parametrize("cluster", ["cpu_cluster", "a100", "h100_ib"])
def test_the_command_at_the_head_of_an_example_cluster_plans_the_quickstart(cluster, tmp_path):
    head = (PROJECT / f"conf/run/{cluster}.yaml").read_text().partition("defaults:")[0]
    (words,) = re.findall(r"python -m pipeline (.*)", head)
    done = run_pipeline(*words.replace("run=NAME", f"run={cluster}").split(), f"root={tmp_path}", PATH=str(tmp_path))
    assert "11 of 11 tasks would run" in done.stdout


def composed(*words: str) -> dict:
    """Return what a command line comes to."""
    found: list[dict] = []
    compose(list(words), lambda data, job: found.append(data) or 0)
    return found[0]


def points(*words: str) -> list[tuple[str | None, str | None, list[str]]]:
    """Return name, job and the words of the record of every point of a sweep."""
    found = []
    compose(["-m", *words], lambda data, job: found.append((data["name"], job, sys.argv[1:])) or 0)
    return found


def test_points_of_a_sweep_under_slurm_have_names_of_their_own_and_the_words_that_were_said(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    job, site = tmp_path / "lr.yaml", tmp_path / "site.yaml"
    shutil.copy(PROJECT / "jobs/quickstart.yaml", job)
    site.write_text("defaults: [slurm, _self_]\n")
    words = (f"root={tmp_path}", f"job={job}", f"run={site}", "tasks.pretrain.steps=1,2")
    for number, (name, called, said) in enumerate(points(*words)):
        assert (name, called) == (None, f"lr-{number}")
        assert said == [*words[:3], f"tasks.pretrain.steps={number + 1}"]
    assert [name for name, _, _ in points(*words, "name=sweep")] == ["sweep-0", "sweep-1"]
    local = points(f"root={tmp_path}", "job=quickstart", "name=sweep", "tasks.pretrain.steps=1,2")
    assert [(name, called) for name, called, _ in local] == [("sweep", "quickstart")] * 2


def holds(whole: object, part: object) -> bool:
    """Return whether every value of `part` is at its place in `whole`."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(name in whole and holds(whole[name], part[name]) for name in part)
    return whole == part


def test_every_model_decodes_and_says_its_size():
    for path in (PROJECT / "conf/model").glob("*.yaml"):
        settings = yaml.safe_load(path.read_text())
        stage = {"kind": "pretrain", "tokens": "@t", "steps": 1, "model": settings}
        model = decode(Command, {"stage": stage}).stage.model
        sized = model.model_copy(update={"vocab_size": model.vocab_size or 4096})
        first = path.read_text().splitlines()[0]
        assert f"{sized.num_params():,} parameters" in first, f"{path.name}: it has {sized.num_params():,} parameters"
        flops = f"{sized.flops_per_token(256) / 1e6:.1f} MFLOP a token"
        assert flops in first, f"{path.name}: {flops}"


def test_there_is_a_preset_of_every_stage():
    stages = {path.stem for path in (PROJECT / "conf/stage").glob("*.yaml")}
    known = {stage.model_fields["kind"].default for stage in AnyStage.__origin__.__args__}
    assert stages == known
    for path in (PROJECT / "conf/stage").glob("*.yaml"):
        assert yaml.safe_load(path.read_text())["kind"] == path.stem


def test_every_job_opens_with_cost_data_and_result():
    for path in (PROJECT / "jobs").glob("*.yaml"):
        opening = path.read_text().split("defaults:")[0]
        for word in ("cost", "data", "result"):
            assert f"#   {word} " in opening, f"{path.name} does not say its {word}"


def test_the_quickstart_never_pretrains_on_held_out_labels():
    settings = yaml.safe_load(Path(PROJECT / "jobs/quickstart.yaml").read_text())
    sources = settings["tasks"]["shard"]["sources"]
    topics = next(source for source in sources if "topics" in source["path"])
    assert topics["reader"]["where"] == {"split": "train"}


def test_a_mapping_on_the_command_line_takes_the_place_of_the_old_one(tmp_path):
    job = tmp_path / "mixed.yaml"
    job.write_text(
        "# @package _global_\ntasks:\n  p:\n    kind: pretrain\n    tokens: {a: x, b: y}\n    steps: 1\n"
        "    mixture: {kind: weights, weights: {a: 1, b: 2}}\n"
    )
    found = []
    words = [f"job={job}", "tasks.p.tokens={a: x}", "tasks.p.mixture={kind: weights, weights: {a: 1}}"]
    compose([*words, "tasks.p.mixture.weights.a=3"], lambda data, job: found.append(data) or 0)
    assert found[0]["tasks"]["p"]["tokens"] == {"a": "x"}
    assert found[0]["tasks"]["p"]["mixture"] == {"kind": "weights", "weights": {"a": 3}}
