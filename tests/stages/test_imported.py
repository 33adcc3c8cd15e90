"""Models in Hugging Face's layout as inputs: adopted whole, refused by name, and told apart by their content."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hf_directories import FAMILIES, write_hf

from pipeline import proof
from pipeline.artifact import open_artifact, read_manifest
from pipeline.errors import ArtifactError, ConfigError
from pipeline.plan import Command, plan, stage_of
from pipeline.settings import decode
from pipeline.stages.imported import Imported, open_input
from pipeline.stages.loading import load_language_model, model_settings, planned_model
from pipeline.verify import verify

KINDS = {"bert": "encoder", "modernbert": "encoder", "t5": "encoder_decoder"}  # the others are decoders


@pytest.fixture
def llama(theirs, tmp_path) -> Path:
    """A copy of one of them."""
    return shutil.copytree(theirs / "llama", tmp_path / "llama")


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "artifacts"


def edit(path: Path, **changes) -> None:
    """Change a file of JSON; what is None goes."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in data.items() if value is not None}))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_directory_is_an_artifact(theirs, root, family):
    before = sorted(path.name for path in (theirs / family).iterdir())
    artifact = open_input(str(theirs / family), root, "model")
    assert artifact.manifest.kind == "model"
    assert artifact.path == (root / "cache" / f"{family}-{artifact.manifest.fingerprint}").resolve()
    assert artifact.names == ["config.json", "model.safetensors", "tokenizer.json"]
    ending = "[SEP]" if "bert" in family else "<|endoftext|>" if family == "gpt2" else "</s>"
    tokens = {t["content"]: t["id"] for t in json.loads(artifact.file("tokenizer.json").read_text())["added_tokens"]}
    assert artifact.stats["end_of_text_id"] == tokens[ending]
    stage = stage_of(artifact)
    assert isinstance(stage, Imported)
    assert stage.model.kind == KINDS.get(family, "decoder")
    assert planned_model(stage) == model_settings(artifact)
    model = load_language_model(artifact)
    assert model.config == stage.model
    assert artifact.stats["parameters"] == sum(weight.numel() for weight in model.parameters())
    assert artifact.stats["vocab_size"] == model.config.real_vocab_size
    assert before == sorted(path.name for path in (theirs / family).iterdir())  # nothing is written there
    assert not list((root / "cache").glob("*.tmp"))


def test_the_worker_opens_what_the_plan_adopted(llama, root):
    path = open_input(str(llama), root, "model").path
    artifact = open_artifact(path)  # all that a frozen task says
    assert load_language_model(artifact).config.num_layers == 2


def test_it_is_read_in_full_once(llama, root, monkeypatch):
    for path in llama.iterdir():
        os.utime(path, ns=(0, 10**18))
    first = open_input(str(llama), root, "model")
    monkeypatch.setattr(proof, "hash_file", lambda *_: pytest.fail("read again"))
    assert open_input(str(llama), root, "model").path == first.path
    monkeypatch.undo()
    (llama / "model.safetensors").touch()
    again = open_input(str(llama), root, "model")
    assert again.manifest == first.manifest


def test_a_copy_elsewhere_is_the_same_model(llama, root, tmp_path):
    first = open_input(str(llama), root, "model")
    os.renames(llama, tmp_path / "moved/llama")
    second = open_input(str(tmp_path / "moved/llama"), root, "model")
    assert second.manifest.fingerprint == first.manifest.fingerprint
    assert second.path == first.path
    load_language_model(second)  # whose links lead to where the files are now
    assert stage_of(second).path == str(tmp_path / "moved/llama")


def test_links_into_a_store_are_followed(llama, root, tmp_path):
    """As a cache of downloads has them."""
    shutil.move(llama / "model.safetensors", tmp_path / "blob")
    (llama / "model.safetensors").symlink_to("../blob")
    artifact = open_input(str(llama), root, "model")
    assert (artifact.path / "model.safetensors").readlink() == (tmp_path / "blob").resolve()
    load_language_model(artifact)


def test_other_files_change_nothing(llama, root):
    first = open_input(str(llama), root, "model").manifest.fingerprint
    (llama / "README.md").write_text("words")
    (llama / "pytorch_model.bin").write_bytes(b"never opened")
    assert open_input(str(llama), root, "model").manifest.fingerprint == first


def command(root: Path, **stage) -> Command:
    return decode(Command, {"root": str(root), "stage": {"kind": "generate", "prompt": ["x"], **stage}})


def test_the_fingerprint_of_a_task_follows_the_content(llama, root):
    tasks = [plan(command(root, model=str(llama)), None)[0] for _ in range(2)]
    assert tasks[0].fingerprint == tasks[1].fingerprint
    data = bytearray((llama / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (llama / "model.safetensors").write_bytes(data)
    changed = plan(command(root, model=str(llama)), None)[0]
    assert changed.fingerprint != tasks[0].fingerprint
    assert changed.inputs["model"] != tasks[0].inputs["model"]


@pytest.mark.parametrize("same_size", [True, False])
def test_what_changed_after_planning_is_refused(llama, root, same_size):
    artifact = open_input(str(llama), root, "model")
    weights = llama / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data) if same_size else bytes(data) + b"x")
    with pytest.raises(ArtifactError, match=rf"^{weights.resolve()}: changed since it was planned with: wanted .* run"):
        load_language_model(open_artifact(artifact.path))


def test_what_is_gone_after_planning_is_named(llama, root):
    artifact = open_input(str(llama), root, "model")
    (llama / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match=r"tokenizer.json: changed since .* found no such file; run it again"):
        open_artifact(artifact.path)


def test_shards_with_an_index(theirs, root, tmp_path):
    directory = write_hf(tmp_path / "sharded", "llama", max_shard_size="60KB")
    artifact = open_input(str(directory), root, "model")
    shards = [name for name in artifact.names if name.startswith("model-")]
    assert len(shards) > 1
    assert "model.safetensors.index.json" in artifact.names
    whole = load_language_model(open_input(str(theirs / "llama"), root, "model")).state_dict()
    for name, weight in load_language_model(artifact).state_dict().items():
        assert weight.equal(whole[name]), name
    (directory / shards[0]).unlink()
    with pytest.raises(ArtifactError, match=f"names {shards[0]}, which is not there; copy the model again"):
        open_input(str(directory), root, "model")


def refusal(directory: Path, root: Path) -> str:
    with pytest.raises(ArtifactError) as error:
        open_input(str(directory), root, "model", where="stage.model")
    assert str(error.value).startswith("stage.model: ")
    assert not list(root.glob("cache/*"))
    return str(error.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "tokenizer.json").unlink(), "has no tokenizer.json, without which no text can be read; save"),
        (lambda d: (d / "model.safetensors").unlink(), "no model.safetensors; wanted a model in Hugging Face's layout"),
        (
            lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
            "the weights are in pytorch_model.bin, a pickle, which can run any code",
        ),
        (lambda d: os.truncate(d / "model.safetensors", 5000), "model.safetensors: damaged: wanted"),
        (lambda d: os.truncate(d / "model.safetensors", 20), "model.safetensors: damaged, or not in safetensors'"),
        (lambda d: os.truncate(d / "config.json", 20), "config.json: not JSON"),
        (
            lambda d: edit(d / "config.json", model_type="mamba", architectures=["MambaForCausalLM"]),
            "config.json: architectures: wanted one of LlamaForCausalLM",
        ),
        (lambda d: edit(d / "config.json", hidden_act="relu6"), "config.json: hidden_act"),
        (
            lambda d: edit(d / "tokenizer.json", model=None),
            "not a tokenizer in the Hugging Face format",
        ),
        (lambda d: edit(d / "config.json", eos_token_id=400), "the id 400 ends a text, but vocab_size is 400"),
    ],
)
def test_what_cannot_be_read_is_refused_at_planning(llama, root, spoil, message):
    spoil(llama)
    assert message in refusal(llama, root)


def more_tokens(path: Path, **token) -> None:
    data = json.loads(path.read_text())
    data["added_tokens"].append(data["added_tokens"][0] | {"id": 401, "content": "<more>"} | token)
    path.write_text(json.dumps(data))


def test_a_tokenizer_that_is_larger_than_the_model(llama, root):
    more_tokens(llama / "tokenizer.json", special=True)  # no text has it
    open_input(str(llama), root, "model")
    shutil.rmtree(root)
    more_tokens(llama / "tokenizer.json", special=False)
    assert "tokenizer.json: has the id 401, but the model's vocab_size is 400; they do not" in refusal(llama, root)


def test_nobody_says_what_ends_a_text(llama, root):
    for file in ("generation_config.json", "tokenizer_config.json"):
        (llama / file).unlink()
    edit(llama / "config.json", eos_token_id=None)
    assert "nothing says which token ends a text; set eos_token_id in config.json, or eos_token" in refusal(llama, root)
    (llama / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}}')
    assert open_input(str(llama), root, "model").stats["end_of_text_id"] == 1


def test_of_several_ids_the_first_ends_a_text(llama, root):
    edit(llama / "config.json", eos_token_id=[1, 7, 8])
    assert open_input(str(llama), root, "model").stats["end_of_text_id"] == 1


def test_an_old_bert_says_it_by_its_token_alone(theirs, root, tmp_path):
    directory = shutil.copytree(theirs / "bert", tmp_path / "bert")
    (directory / "tokenizer_config.json").unlink()
    assert open_input(str(directory), root, "model").stats["end_of_text_id"] == 3


def test_a_config_of_ours_without_a_manifest_is_no_artifact(llama, root):
    (llama / "config.json").write_text('{"format": 1, "model": {"kind": "decoder"}}')
    with pytest.raises(ArtifactError, match=r"so it is not an artifact; wanted an artifact of kind model, or a config"):
        open_input(str(llama), root, "model")
    (llama / "config.json").unlink()
    with pytest.raises(ArtifactError, match="has no manifest.json"):
        open_input(str(llama), root, "model")


def test_a_model_is_no_corpus(llama, root):
    with pytest.raises(ArtifactError, match="wanted an artifact of kind corpus"):
        open_input(str(llama), root, "corpus")


def test_an_unfinished_export_is_not_read(llama, root):
    (llama / "work").mkdir()
    with pytest.raises(ArtifactError, match="so it is unfinished"):
        open_input(str(llama), root, "model")


def test_two_processes_adopt_it_at_once(llama, root):
    code = (
        "import sys; from pathlib import Path; from pipeline.stages.imported import open_input\n"
        f"print(open_input({str(llama)!r}, Path({str(root)!r}), 'model').manifest.fingerprint)"
    )
    ranks = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    found = {rank.communicate()[0].splitlines()[-1] for rank in ranks}
    assert [rank.returncode for rank in ranks] == [0, 0, 0]
    assert found == {open_input(str(llama), root, "model").manifest.fingerprint}


def test_a_manifest_of_another_version_is_made_anew(llama, root):
    path = open_input(str(llama), root, "model").path
    edit(path / "manifest.json", format=0)
    assert read_manifest(open_input(str(llama), root, "model").path).format == 1
    edit(path / "manifest.json", stage={"kind": "imported", "path": str(llama), "model": {"kind": "of old"}})
    assert stage_of(open_input(str(llama), root, "model")).model.kind == "decoder"


def test_it_can_be_verified(llama, root, capsys):
    assert verify([str(llama), f"root={root}"]) == 0
    said = capsys.readouterr().out
    assert "3 files as the manifest says" in said
    assert "what 'imported' looks for is right" in said
    edit(llama / "config.json", num_hidden_layers=3)
    assert verify([str(llama), f"root={root}"]) == 3
    assert "no weight 'model.layers.2" in capsys.readouterr().err


def test_nobody_can_run_it(llama, root):
    with pytest.raises(ConfigError, match="no stage is called 'imported'"):
        decode(Command, {"stage": {"kind": "imported", "path": "x", "model": {"kind": "decoder"}}})


def test_a_report_shows_it(llama, root, tmp_path, run_stage):
    from pipeline.stages.report import Report

    artifact = open_input(str(llama), root)
    made = run_stage(Report(tasks={"base": str(llama)}), {"tasks.base": artifact}, tmp_path / "report")
    assert json.loads(made.file("metrics.json").read_text())["base.parameters"] == artifact.stats["parameters"]
