from types import SimpleNamespace

import pytest
import torch
from models.model_variants import FAMILIES, make
from torch import nn

from pipeline.models.initial import first_weight
from pipeline.models.transformer import Transformer
from pipeline.models.weights import weights
from pipeline.parallel.tensor import materialize, split

ALONE = SimpleNamespace(tensor=1, tensor_rank=0)


def rank(number, tensor=2):
    return SimpleNamespace(tensor=tensor, tensor_rank=number, tensor_group=None)


def empty(config):
    with torch.device("meta"):
        return Transformer(config)


def test_alone_nothing_changes():
    model = make("grouped")
    before = list(model.named_parameters()), list(model.named_modules()), dict(model.__dict__)
    split(model, weights(model.config), ALONE, sequence=True)
    assert before == (list(model.named_parameters()), list(model.named_modules()), dict(model.__dict__))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "one_key_head"])
def test_the_parts_of_all_ranks_are_the_whole_model(name):
    whole = make(name)
    parts = [make(name), make(name)]
    for number, part in enumerate(parts):
        split(part, weights(whole.config), rank(number))
    cuts = {weight.name: weight.cut for weight in weights(whole.config)}
    names = [name for name, _ in whole.named_parameters()]
    assert [list(dict(part.named_parameters())) for part in parts] == [names, names]
    for name, parameter in whole.named_parameters():
        held = [part.get_parameter(name) for part in parts]
        if cuts[name] is None:
            assert all(torch.equal(one, parameter) for one in held)
            assert not any(hasattr(one, "tensor_model_parallel") for one in held)
        else:
            assert torch.equal(torch.cat(held, cuts[name]), parameter)
            assert all(one.tensor_model_parallel and one.model_parallel for one in held)
            assert {one.partition_dim for one in held} == {cuts[name]}
    assert list(parts[0].state_dict()) == list(whole.state_dict())  # a checkpoint has the same names


def test_gradients_are_summed_where_a_rank_has_only_its_heads_or_positions():
    def summed(name, sequence):
        model = make(name)
        split(model, weights(model.config), rank(0), sequence)
        return {name for name, parameter in model.named_parameters() if getattr(parameter, "is_summed", False)}

    assert summed("grouped", False) == set()
    heads = {f"decoder.blocks.{n}.attention.{part}_norm.weight" for n in (0, 1) for part in ("query", "key")}
    assert summed("qwen3", False) == heads
    norms = {f"decoder.blocks.{n}.{part}_norm.weight" for n in (0, 1) for part in ("attention", "mlp")}
    assert summed("qwen3", True) == heads | norms
    biases = {f"decoder.blocks.{n}.{part}.bias" for n in (0, 1) for part in ("attention.out", "mlp.down")}
    assert summed("grouped", True) == norms | biases
    assert summed("ahead", True) == norms  # the blocks that look ahead have all positions


def test_a_gradient_that_nobody_wants_is_not_summed():
    model = make("qwen3").requires_grad_(False)
    split(model, weights(model.config), rank(0), sequence=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["grouped", "deepseek", "bert", "t5"])
def test_a_model_is_made_one_weight_at_a_time(name):
    whole, asked, settled = make(name, seed=3), [], []
    made = empty(whole.config)
    shapes = {name: tensor.shape for name, tensor in made.state_dict().items()}

    def value(name):
        assert len(asked) == len(settled)
        asked.append(name)
        if name not in dict(whole.named_parameters()):
            settled.append(name)  # a buffer
        return first_weight(whole.config, name, shapes[name], 3)

    materialize(made, value, ALONE, lambda parameter: settled.append(parameter))
    assert sorted(asked) == sorted(shapes)
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in made.state_dict().items())


def test_a_part_is_made_with_what_was_known_of_it():
    whole, made = make("qwen3"), empty(make("qwen3").config)
    made.decoder.norm.requires_grad_(False)
    split(made, weights(whole.config), rank(1), sequence=True)
    materialize(made, lambda name: whole.state_dict()[name], rank(1))
    part = make("qwen3")
    split(part, weights(whole.config), rank(1), sequence=True)
    for name, parameter in part.named_parameters():
        found = made.get_parameter(name)
        assert isinstance(found, nn.Parameter)
        assert torch.equal(found, parameter)
        assert vars(found) == vars(parameter)
        assert found.requires_grad == (name != "decoder.norm.weight")
