"""A whole job through the command line, as a user runs it."""

import json
import math
import os
import re
import shutil

import pytest
from support import MODEL_TASKS, PROJECT, run_pipeline

from pipeline.artifact import open_artifact

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("tiny")]

DATA_TASKS = ("shard", "clean", "dedup", "train_tokenizer", "tokenize")
TASKS = (*DATA_TASKS, *MODEL_TASKS, "report")


@pytest.fixture
def root(tiny_root, tmp_path):
    """A copy of the finished job."""
    shutil.copytree(tiny_root, tmp_path / "artifacts", symlinks=True)
    return tmp_path / "artifacts"


def states(plan_output: str) -> dict[str, str]:
    rows = re.findall(r"^(\w+) +(done|to run)", plan_output, re.MULTILINE)
    return dict(rows)


def test_every_task_leaves_an_artifact_where_its_name_leads(tiny_root):
    for task in TASKS:
        artifact = open_artifact(tiny_root / "jobs/tiny" / task)
        for name in artifact.names:
            artifact.file(name)


def test_every_file_can_be_read_by_whom_the_umask_allows(tiny_root):
    mask = os.umask(0)
    os.umask(mask)
    for task in TASKS:
        path = tiny_root / "jobs/tiny" / task
        for name in open_artifact(path).names:
            assert (path / name).stat().st_mode & 0o777 == 0o666 & ~mask, name


def test_a_second_run_executes_nothing_and_loads_no_torch(root):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    done = run_pipeline("job=tiny", f"root={root}", PYTHONPROFILEIMPORTTIME="1")
    assert done.stdout.count("done before") == len(TASKS)
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "pydantic" in imported
    assert not imported & {"torch", "deepspeed", "pyarrow", "numpy", "transformers", "datasets", "tokenizers", "wandb"}
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()} == before


def test_one_changed_key_redoes_exactly_what_depends_on_it(root):
    plan = run_pipeline("job=tiny", f"root={root}", "tasks.pretrain.steps=21", "--plan").stdout
    redone = {"pretrain", "finetune", "evaluate", "generate", "export", "report"}
    assert {task for task, state in states(plan).items() if state == "to run"} == redone
    assert "steps 20 → 21" in plan
    plan = run_pipeline("job=tiny", f"root={root}", "tasks.generate.seed=1", "--plan").stdout
    assert {task for task, state in states(plan).items() if state == "to run"} == {"generate", "report"}
    plan = run_pipeline("job=tiny", f"root={root}", "run.ranks=2", "run.parallel.zero=2", "--plan").stdout
    assert set(states(plan).values()) == {"done"}  # how a task runs changes nothing that is made


def test_a_changed_source_is_noticed(root, tmp_path):
    shutil.copy(PROJECT / "tests/data/topics.jsonl", tmp_path / "topics.jsonl")
    data = f"tasks.finetune.data={tmp_path / 'topics.jsonl'}"
    plan = run_pipeline("job=tiny", f"root={root}", data, "--plan").stdout
    assert set(states(plan).values()) == {"done"}  # where a file lies does not matter
    with open(tmp_path / "topics.jsonl", "a") as file:
        file.write(json.dumps({"text": "x", "label": "games", "split": "train"}) + "\n")
    plan = run_pipeline("job=tiny", f"root={root}", data, "--plan").stdout
    assert {task for task, state in states(plan).items() if state == "to run"} == {"finetune", "report"}


def test_a_stage_alone_has_the_fingerprint_it_has_in_the_job(root):
    jobs = root / "jobs/tiny"
    done = run_pipeline(
        "stage=tokenize",
        f"root={root}",
        f"stage.corpus={jobs}/dedup",
        f"stage.tokenizer={jobs}/train_tokenizer",
        "stage.held_out_fraction=0.05",
    )
    assert "done before" in done.stdout


def test_another_number_of_ranks_makes_the_same_data(tiny_root, tmp_path):
    run_pipeline("job=tiny", f"root={tmp_path}", "run.ranks=3", "~tasks.report", *(f"~tasks.{t}" for t in MODEL_TASKS))
    for task in DATA_TASKS:
        one, other = (open_artifact(root / "jobs/tiny" / task).manifest for root in (tiny_root, tmp_path))
        assert one.fingerprint == other.fingerprint
        assert one.files == other.files
        assert one.stats == other.stats


def test_a_sweep_runs_every_point(root):
    done = run_pipeline("-m", "job=tiny", f"root={root}", "tasks.generate.seed=5,6", "~tasks.report")
    assert done.stdout.count("generate done in") == 2
    assert "[1] " in done.stdout
    assert "tasks.generate.seed=6" in done.stdout
    assert len(list((root / "samples").iterdir())) == 3


def test_a_run_may_have_a_name_of_its_own(root):
    run_pipeline("job=tiny", f"root={root}", "name=again", "tasks.generate.seed=1", "~tasks.report")
    record = json.loads((root / "jobs/again/job.json").read_text())
    assert (record["name"], record["command"][4]) == ("again", "name=again")
    for task in ("pretrain", "evaluate"):  # made before under the other name
        assert (root / "jobs/again" / task).resolve() == (root / "jobs/tiny" / task).resolve()
    assert (root / "jobs/again/generate").resolve() != (root / "jobs/tiny/generate").resolve()
    made = ("stage=generate", f"stage.model={root}/jobs/again/pretrain", "stage.prompt=x", f"root={root}", "name=say")
    assert "generate: " in run_pipeline(*made).stdout
    assert (root / "jobs/say/generate/samples.jsonl").is_file()


def test_generate_prints_what_it_wrote(root):
    done = run_pipeline(
        "stage=generate", f"root={root}", f"stage.model={root}/jobs/tiny/pretrain", 'stage.prompt="Mr. Darcy"'
    )
    assert "\nMr. Darcy" in done.stdout


def test_what_was_learned_is_in_the_numbers(tiny_root):
    jobs = tiny_root / "jobs/tiny"
    rows = [json.loads(line) for line in (jobs / "pretrain/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert rows[0]["loss"] == pytest.approx(math.log(512), abs=0.2)  # knows nothing yet: uniform over the vocabulary
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert {"lr", "grad_norm", "tokens_per_s", "data_wait_fraction"} <= rows[0].keys()
    stats = open_artifact(jobs / "evaluate").stats
    assert stats["perplexity"] == pytest.approx(math.exp(stats["loss"]))
    assert stats["bits_per_byte"] == pytest.approx(stats["loss"] * stats["tokens"] / stats["bytes"] / math.log(2))
    assert 4 < stats["byte_unigram_bits_per_byte"] < 5.5
    stats = open_artifact(jobs / "finetune").stats
    assert {"test_accuracy", "test_macro_f1", "baseline.test_accuracy", "majority.test_accuracy"} <= stats.keys()
    assert open_artifact(jobs / "export").stats["max_logit_difference"] < 1e-4


def test_the_export_is_loaded_by_transformers(tiny_root):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tiny_root / "jobs/tiny/export"
    model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    ids = tokenizer("a library for", return_tensors="pt")["input_ids"]
    assert model(ids).logits.shape == (1, ids.shape[1], 512)
    assert tokenizer.decode(ids[0]) == "a library for"


def test_a_frozen_trunk_keeps_the_pretrained_weights(root):
    from safetensors.numpy import load_file

    run_pipeline("job=tiny", f"root={root}", "tasks.finetune.trunk=frozen", "~tasks.report")
    before = load_file(root / "jobs/tiny/pretrain/model.safetensors")
    after = load_file(root / "jobs/tiny/finetune/model.safetensors")
    for name, weight in before.items():
        assert (after[f"trunk.{name}"] == weight).all(), name
    assert open_artifact(root / "jobs/tiny/finetune").stats["test_accuracy"] > 0


def test_nothing_is_left_of_parts_that_were_being_encoded(tiny_root):
    assert (tiny_root / "jobs/tiny/tokenize/work").is_dir()
    assert not (tiny_root / "jobs/tiny/tokenize/work/partial").exists()
