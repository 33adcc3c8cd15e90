import json

import pytest
import torch
from model_variants import FAMILIES, VOCAB_SIZE, feed, make
from safetensors.torch import load_file, save_file

from pipeline.errors import ArtifactError
from pipeline.models.classifier import Classifier
from pipeline.models.initial import init_weights
from pipeline.models.saved import load_model, open_model, save_model
from pipeline.models.transformer import Transformer


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_comes_back_as_it_was(tmp_path, name):
    model = make(name)
    assert save_model(tmp_path, model) == ["model.safetensors", "config.json"]
    loaded = load_model(tmp_path)
    assert isinstance(loaded, Transformer)
    assert loaded.config == model.config
    assert not loaded.training
    assert torch.equal(loaded(**feed(model)), model(**feed(model)))
    assert all(p.requires_grad for p in loaded.parameters())
    tied = model.config.tie_embeddings
    assert ("head.weight" in load_file(tmp_path / "model.safetensors")) is not tied


def test_weights_are_read_one_by_one(tmp_path):
    model = make("deepseek")
    save_model(tmp_path, model)
    empty, weights = open_model(tmp_path)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert dict(weights.shapes) == {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    assert set(weights) == set(model.state_dict())
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    assert "ahead.0.mlp_norm.weight" not in weights
    assert weights.get("ahead.0.mlp_norm.weight") is None


def test_training_a_loaded_model_leaves_its_file_alone(tmp_path):
    save_model(tmp_path, make())
    before = (tmp_path / "model.safetensors").read_bytes()
    loaded = load_model(tmp_path)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_classifier_comes_back_with_its_labels(tmp_path):
    model = Classifier(make(), 2, ["good", "bad"])
    init_weights(model, 1)
    save_model(tmp_path, model, {name: weight.bfloat16() for name, weight in model.state_dict().items()})
    loaded = load_model(tmp_path)
    assert isinstance(loaded, Classifier)
    assert loaded.labels == ["good", "bad"]
    assert loaded.head.weight.dtype == torch.bfloat16
    assert torch.equal(loaded.head.weight, model.head.weight.bfloat16())


def test_a_damaged_or_missing_file_is_refused(tmp_path):
    save_model(tmp_path, make())
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(ArtifactError, match=r"model\.safetensors: damaged \(.*save the model again"):
        load_model(tmp_path)
    path.unlink()
    with pytest.raises(ArtifactError, match=r"no model\.safetensors; wanted a saved model"):
        load_model(tmp_path)


def test_weights_that_are_not_those_of_the_settings_are_refused_by_name(tmp_path):
    model = make()
    save_model(tmp_path, model)
    weights = model.state_dict()
    weights["extra.weight"] = weights.pop("decoder.norm.weight")
    weights["decoder.blocks.0.mlp.up.weight"] = torch.zeros(3, 3)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError) as error:
        load_model(tmp_path)
    path = tmp_path / "model.safetensors"
    assert str(error.value).splitlines() == [
        f"{path}: no weight 'decoder.norm.weight'",
        f"{path}: unknown weight 'extra.weight'",
        f"{path}: 'decoder.blocks.0.mlp.up.weight': wanted shape (64, 16), found (3, 3)",
        f"{path}: the weights are not those of config.json",
    ]


def test_config_json_is_our_own_settings(tmp_path):
    save_model(tmp_path, make())
    data = json.loads((tmp_path / "config.json").read_text())
    assert (data["format"], data["labels"], data["model"]["kind"]) == (2, None, "decoder")
    assert data["model"]["vocab_size"] == VOCAB_SIZE
