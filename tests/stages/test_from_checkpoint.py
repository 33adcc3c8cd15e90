"""A checkpoint of a training as an input: it becomes a model, once, and what is damaged or of no model does not."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from support import run_pipeline

from pipeline.artifact import open_artifact
from pipeline.errors import ArtifactError
from pipeline.plan import stage_of
from pipeline.stages.imported import Imported, open_input
from pipeline.stages.loading import load_language_model, model_settings
from pipeline.training.checkpoints.format import complete_checkpoints, read_index, write_index
from pipeline.training.checkpoints.read import read_weights
from pipeline.verify import verify

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("from_checkpoint")]


@pytest.fixture(scope="module")
def trained(tiny_tokens, tmp_path_factory):
    """A model of two ranks, in bf16, with its checkpoints."""
    root = tmp_path_factory.mktemp("trained")
    run_pipeline(
        "stage=pretrain",
        f"stage.tokens={tiny_tokens}",
        "stage.model={kind:decoder,d_model:32,num_layers:2,num_heads:4,max_seq_len:64}",
        "stage.precision=bf16",
        "stage.seq_len=32",
        "stage.batch_tokens=256",
        "stage.steps=6",
        "stage.validation_sequences=4",
        "run.ranks=2",
        "run.parallel.zero=3",
        "run.checkpoints.every_steps=3",
        f"root={root}",
    )
    return next((root / "model").iterdir())


@pytest.fixture
def checkpoint(trained, tmp_path):
    """A copy of its last checkpoint."""
    return shutil.copytree(complete_checkpoints(trained / "checkpoints")[0], tmp_path / "run/checkpoints/step-00000006")


def test_it_is_the_model_of_that_step(trained, checkpoint, tmp_path):
    before = sorted(path.name for path in checkpoint.iterdir())
    artifact = open_input(str(checkpoint), tmp_path / "artifacts", "model")
    assert artifact.names == ["config.json", "model.safetensors", "tokenizer.json"]
    assert artifact.path.name.startswith("run-step-00000006-")
    assert not artifact.manifest.inputs
    stage = stage_of(artifact)
    assert isinstance(stage, Imported)
    published = open_artifact(trained)
    assert model_settings(artifact) == model_settings(published) == stage.model
    for name in ("vocab_size", "end_of_text_id", "parameters"):
        assert artifact.stats[name] == published.stats[name]
    ours, theirs = load_language_model(artifact).state_dict(), load_file(published.file("model.safetensors"))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, theirs[name].bfloat16())  # the last step's, which were published in fp32
    exact = dict(read_weights(checkpoint))
    assert all(torch.equal(exact[name], weight) for name, weight in theirs.items())
    assert sorted(path.name for path in checkpoint.iterdir()) == before
    assert not list((tmp_path / "artifacts/cache").glob("*.tmp"))


def test_it_is_made_once_and_outlives_the_checkpoint(checkpoint, tmp_path, capsys):
    artifact = open_input(str(checkpoint), tmp_path / "artifacts", "model")
    stamp = (artifact.path / "model.safetensors").stat().st_mtime_ns
    again = open_input(str(checkpoint), tmp_path / "artifacts", "model")
    assert again.manifest == artifact.manifest
    assert (again.path / "model.safetensors").stat().st_mtime_ns == stamp
    shutil.rmtree(checkpoint)
    assert load_language_model(artifact).config == stage_of(artifact).model
    assert verify([str(artifact.path), f"root={tmp_path}/artifacts"]) == 0
    assert "what 'imported' looks for is right" in capsys.readouterr().out


def test_a_stage_takes_its_path(tiny_tokens, checkpoint, tmp_path):
    done = run_pipeline(
        "stage=evaluate",
        f"stage.model={checkpoint}",
        f"stage.tokens={tiny_tokens}",
        "stage.seq_len=32",
        f"root={tmp_path}/artifacts",
    )
    assert "bits per byte" in done.stdout


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "weights-00001-of-00002.safetensors"])
def test_what_is_damaged_is_refused(checkpoint, tmp_path, name):
    data = bytearray((checkpoint / name).read_bytes())
    data[-3] ^= 1
    (checkpoint / name).write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"stage.model: .*{name}: damaged: it is not as it was written"):
        open_input(str(checkpoint), tmp_path / "artifacts", "model", where="stage.model")
    assert not list((tmp_path / "artifacts/cache").glob("*/manifest.json"))


def test_a_checkpoint_without_a_tokenizer_is_no_model(checkpoint, tmp_path):
    index = read_index(checkpoint)
    files = {name: record for name, record in index.files.items() if name != "tokenizer.json"}
    write_index(checkpoint, index.model_copy(update={"files": files}))
    with pytest.raises(ArtifactError, match=r"has no tokenizer.json, so no model can be made of it; take a finished"):
        open_input(str(checkpoint), tmp_path / "artifacts", "model")
    with pytest.raises(ArtifactError, match="wanted an artifact of kind corpus"):
        open_input(str(checkpoint), tmp_path / "artifacts", "corpus")
