"""Continued pretraining and all that comes after it, from a directory in Hugging Face's layout: one setting, a path."""

import json
import shutil
import subprocess
import sys

import pytest
from hf_directories import write_hf
from support import PROJECT, run_pipeline

from pipeline.artifact import open_artifact, read_manifest
from pipeline.stages.imported import open_input
from pipeline.trace import trace
from pipeline.verify import verify

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("theirs")]

JOB = """# @package _global_
tasks:
  shard: {{kind: shard, sources: [{{path: {data}, reader: {{kind: jsonl}}}}]}}
  words: {{kind: import_tokenizer, vocabulary: {{kind: huggingface, path: {model}}}, end_of_text: </s>}}
  tokens: {{kind: tokenize, corpus: "@shard", tokenizer: "@words", held_out_fraction: 0.1}}
  more: {{kind: pretrain, tokens: "@tokens", init_from: {model}, steps: 4, seq_len: 32, batch_tokens: 256}}
  before: {{kind: evaluate, model: {model}, tokens: "@tokens", seq_len: 32}}
  after: {{kind: evaluate, model: "@more", tokens: "@tokens"}}
  sorted: {{kind: finetune, model: {model}, data: {data}, seq_len: 32, epochs: 1}}
  say: {{kind: generate, model: {model}, prompt: [a game], max_new_tokens: 4}}
  out: {{kind: export, model: "@more"}}
  report:
    kind: report
    tasks: {{base: {model}, more: "@more", before: "@before", after: "@after", sorted: "@sorted", out: "@out"}}
"""


def test_a_path_does_wherever_a_model_does(tmp_path, capsys):
    model, root = write_hf(tmp_path / "tiny-llama", "llama"), tmp_path / "artifacts"
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    (tmp_path / "theirs.yaml").write_text(JOB.format(model=model, data=PROJECT / "tests/data/topics.jsonl"))
    words = [f"job={tmp_path}/theirs.yaml", f"root={root}"]
    assert "10 of 10 tasks would run" in run_pipeline(*words, "--plan").stdout
    run_pipeline(*words, "run.ranks=2")
    jobs = root / "jobs/theirs"
    fingerprint = open_input(str(model), root, "model").manifest.fingerprint
    for task in ("more", "before", "sorted", "say"):
        records = read_manifest(jobs / task).inputs
        assert records.get("init_from", records.get("model")).fingerprint == fingerprint
    before, after = (open_artifact(jobs / task).stats["loss"] for task in ("before", "after"))
    assert after < before
    assert open_artifact(jobs / "out").stats["max_logit_difference"] < 1e-5
    numbers = json.loads((jobs / "report/metrics.json").read_text())
    assert numbers["more.parameters"] == numbers["base.parameters"]
    page = (jobs / "report/index.html").read_text()
    assert "tiny-llama" in page
    assert {path.name: path.read_bytes() for path in model.iterdir()} == files  # nothing was written there

    assert verify(["theirs.more", str(model), "theirs.out", f"root={root}"]) == 0
    assert trace(["run=theirs.more", "step=1", f"root={root}"]) == 0
    assert "nothing to run" in run_pipeline(*words).stdout
    again = ["stage=generate", f"stage.model={jobs}/out", "stage.prompt=[a]", "stage.max_new_tokens=2"]
    run_pipeline(*again, f"root={root}")  # an export is in their layout too

    shutil.rmtree(model)
    assert trace(["run=theirs.more", "step=1", f"root={root}"]) == 0
    assert capsys.readouterr().out.count("sample\ttokens of") == 2
    done = run_pipeline(*words, status=3)
    assert "tiny-llama: no such directory; wanted an artifact of kind model" in done.stderr


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_what_came_in_goes_out_again(tmp_path, family):
    from safetensors.numpy import load_file

    model = write_hf(tmp_path / family, family)
    run_pipeline("stage=export", f"stage.model={model}", f"root={tmp_path}/artifacts")
    out = next(tmp_path.glob("artifacts/export/*/model.safetensors"))
    before, after = load_file(model / "model.safetensors"), load_file(out)
    for name in before.keys() & after.keys():
        assert (before[name] == after[name]).all(), name
    assert len(before.keys() & after.keys()) > 20


CHANGE = """
import sys
from pathlib import Path
from pipeline.errors import PipelineError
from pipeline.execute import execute
from pipeline.plan import Command, plan
from pipeline.settings import decode

model, root = sys.argv[1:]
stage = {"kind": "generate", "model": model, "prompt": ["a"], "max_new_tokens": 1}
command = decode(Command, {"root": root, "stage": stage})
tasks = plan(command, None)
weights = Path(model, "model.safetensors")
data = bytearray(weights.read_bytes())
data[-1] ^= 1
weights.write_bytes(data)
for found in (tasks, plan(command, None)):
    try:
        execute(found, command, None, lambda task: print("made"))
    except PipelineError as error:
        print(error)
"""


def test_a_path_that_changes_after_planning_is_refused_and_then_planned_anew(tmp_path):
    model = write_hf(tmp_path / "llama", "llama")
    words = [sys.executable, "-c", CHANGE, str(model), str(tmp_path / "artifacts")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=PROJECT, check=True)
    assert f"{model}/model.safetensors: changed since it was planned with: wanted" in done.stdout
    assert done.stdout.splitlines()[-1] == "made"
    assert len(list(tmp_path.glob("artifacts/samples/*/manifest.json"))) == 1


@pytest.mark.parametrize("stage", ["generate", "finetune", "export"])
def test_what_is_wrong_with_it_is_said_by_the_command(tmp_path, stage):
    model = write_hf(tmp_path / "llama", "llama")
    (model / "tokenizer.json").unlink()
    more = {"generate": ["stage.prompt=[x]"], "finetune": ["stage.data=tests/data/topics.jsonl"]}.get(stage, [])
    done = run_pipeline(f"stage={stage}", f"stage.model={model}", f"root={tmp_path}/artifacts", *more, status=3)
    assert done.stderr.startswith(f"error: stage.model: {model}: has no tokenizer.json, without which no text can be")
