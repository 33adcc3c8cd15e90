import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from pipeline.errors import ArtifactError, ConfigError
from pipeline.models.config import Decoder
from pipeline.models.transformer import Classifier, Transformer, init_weights, load_model, save_model

SMALL = {"vocab_size": 50, "d_model": 16, "num_layers": 2, "num_heads": 4, "max_seq_len": 16}
GPT2 = {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "bias": True}
VARIANTS = [
    {},
    {"num_kv_heads": 2, "tie_embeddings": False, "bias": True, "d_ff": 24},
    GPT2,
    {"norm": "layernorm", "num_kv_heads": 1},
]
# Sums of a few hundred numbers of size one, in another order: fp32 has 24 bits, of which the last three may go.
ROUNDING = 1e-6
# The same for gradients that are summed over all tokens.
GRADIENT_ROUNDING = 1e-5


def make(seed=0, **changes):
    model = Transformer(Decoder(**(SMALL | changes)))
    init_weights(model, seed)
    return model


def random_ids(rows=2, length=12, seed=0):
    return torch.randint(SMALL["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def assert_close(found, wanted, tolerance=ROUNDING):
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("changes", VARIANTS)
def test_number_of_parameters_is_exact(changes):
    model = make(**changes)
    assert model.config.num_params() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("changes", VARIANTS)
def test_a_later_token_never_moves_an_earlier_logit(changes):
    model, ids = make(**changes), random_ids()
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % SMALL["vocab_size"]
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


# --- documents packed into one row

PACKED = torch.tensor(
    [[4] * 5 + [5] * 1 + [7] * 6, [0] * 2 + [9] * 10]
)  # numbers of documents of 5, 1, 6, 2 and 10 ids


@pytest.mark.parametrize("changes", VARIANTS)
def test_changing_one_document_never_moves_anothers_logits(changes):
    model, ids = make(**changes), random_ids()
    before = model(ids, documents_BT=PACKED)
    for row, document in ((0, 4), (0, 5), (0, 7), (1, 0), (1, 9)):
        inside = torch.zeros_like(PACKED, dtype=torch.bool)
        inside[row] = PACKED[row] == document
        after = model(ids.where(~inside, (ids + 1) % SMALL["vocab_size"]), documents_BT=PACKED)
        assert torch.equal(before[~inside], after[~inside])
        assert not torch.allclose(before[inside], after[inside])
    assert not torch.allclose(before[0, 5:], model(ids)[0, 5:])  # without the mask it would leak


@pytest.mark.parametrize("changes", VARIANTS)
def test_a_packed_document_is_read_as_if_it_were_alone(changes):
    model, ids = make(**changes), random_ids()
    packed = model(ids, documents_BT=PACKED)
    for row, numbers in enumerate(PACKED):
        for document in numbers.unique():
            alone = model(ids[row : row + 1, numbers == document])
            assert_close(packed[row : row + 1, numbers == document], alone)


def test_the_loss_of_one_document_has_no_gradient_in_another():
    model, ids = make(), random_ids()
    embedded = model.embedding(ids).detach().requires_grad_()
    model.embedding.forward = lambda _: embedded
    labels = random_ids(seed=1).where(PACKED == 7, -100)
    model(ids, labels, documents_BT=PACKED).backward()
    moved = embedded.grad.abs().sum(-1) > 0
    assert torch.equal(moved, PACKED == 7)


def test_more_positions_than_the_model_has_are_refused():
    with pytest.raises(ConfigError, match="max_seq_len: the model reads 16 positions, found 17"):
        make()(random_ids(length=17))


def test_logits_hold_real_ids_only():
    model = make()
    assert model.embedding.weight.shape == (64, 16)
    assert model(random_ids()).shape == (2, 12, 50)


# --- first weights


def test_first_weights_follow_from_seed_and_name_alone():
    deep, shallow = make(seed=3, num_layers=2), make(seed=3, num_layers=1)
    torch.manual_seed(99)
    again = make(seed=3)
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, deep.state_dict()[name])
    for name in ("embedding.weight", "blocks.0.attention.query.weight", "blocks.0.mlp.gate.weight"):
        assert torch.equal(deep.state_dict()[name], shallow.state_dict()[name])
    assert not torch.equal(make(seed=4).embedding.weight, deep.embedding.weight)
    first, second = deep.blocks[0].mlp, deep.blocks[1].mlp
    assert not torch.equal(first.up.weight, second.up.weight)


def test_first_weights_have_the_deviation_of_the_settings():
    model = make(d_model=128, num_layers=2, init_std=0.02, bias=True, vocab_size=1000)
    # 16384 draws: their deviation is off by 0.6 percent (one in sqrt(2n)); four times that
    for weight, std in [
        (model.embedding.weight[:1000], 0.02),
        (model.blocks[1].attention.query.weight, 0.02),
        (model.blocks[1].attention.out.weight, 0.02 / math.sqrt(4)),
        (model.blocks[0].mlp.down.weight, 0.02 / math.sqrt(4)),
    ]:
        assert weight.std().item() == pytest.approx(std, rel=0.025)
    assert model.embedding.weight[1000:].eq(0).all()
    assert model.norm.weight.eq(1).all()
    assert model.blocks[0].attention.query.bias.eq(0).all()


# --- the loss


def test_the_loss_without_a_label_is_zero():
    model = make()
    loss = model(random_ids(), torch.full((2, 12), -100))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad.eq(0).all() for p in model.parameters())


@torch.no_grad()
def test_the_loss_is_fp32_and_needs_no_gradient():
    model = make().bfloat16()
    loss = model(random_ids(), random_ids(seed=1))
    assert loss.dtype == torch.float32
    assert not loss.requires_grad
    x, weight = model.hidden(random_ids()).flatten(0, 1), model.head_weight
    logits = (x @ weight.T)[:, :50].float()
    torch.testing.assert_close(loss, F.cross_entropy(logits, random_ids(seed=1).flatten(), reduction="sum"))


@pytest.mark.parametrize("changes", VARIANTS)
def test_gradients_of_the_model_are_those_of_its_logits(changes):
    """Above all those of an embedding that is the output layer too."""
    model, ids, labels = make(**changes), random_ids(), random_ids(seed=1)
    model(ids, labels).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), reduction="sum").backward()
    for name, p in model.named_parameters():
        assert_close(found[name], p.grad, GRADIENT_ROUNDING)


def test_the_loss_falls_in_training():
    model, ids = make(), random_ids(rows=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(40):
        loss = model(ids[:, :-1], ids[:, 1:]) / ids[:, 1:].numel()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] == pytest.approx(math.log(50), abs=0.1)
    assert losses[-1] < 1.0


# --- the classifier


def test_a_classifier_does_not_see_padding():
    model = Classifier(make(), 3)
    init_weights(model, 0)
    ids, mask = random_ids(), torch.ones(2, 12, dtype=torch.bool)
    mask[:, 8:] = False
    assert_close(model(ids, mask), model(ids[:, :8], mask[:, :8]))
    mean = model.trunk.hidden(ids[:, :8]).mean(1)
    assert_close(model(ids, mask), model.head(mean))
    labels = torch.tensor([2, -100])
    wanted = F.cross_entropy(model(ids, mask)[:1], labels[:1])
    assert_close(model(ids, mask, labels), wanted)


def test_a_classifier_needs_a_name_for_each_class():
    assert Classifier(make(), 2).labels == ["0", "1"]
    with pytest.raises(ConfigError, match="labels: wanted 2 names, one for each class, found 1"):
        Classifier(make(), 2, ["spam"])


# --- saving and loading


@pytest.mark.parametrize("changes", VARIANTS)
def test_a_model_comes_back_as_it_was(tmp_path, changes):
    model = make(**changes)
    assert save_model(tmp_path, model) == ["model.safetensors", "config.json"]
    loaded = load_model(tmp_path)
    assert isinstance(loaded, Transformer)
    assert loaded.config == model.config
    assert not loaded.training
    assert torch.equal(loaded(random_ids()), model(random_ids()))
    assert all(p.requires_grad for p in loaded.parameters())
    tied = model.config.tie_embeddings
    assert ("head.weight" in load_file(tmp_path / "model.safetensors")) is not tied


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
    weights["extra.weight"] = weights.pop("norm.weight")
    weights["blocks.0.mlp.up.weight"] = torch.zeros(3, 3)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError) as error:
        load_model(tmp_path)
    path = tmp_path / "model.safetensors"
    assert str(error.value).splitlines() == [
        f"{path}: no weight 'norm.weight'",
        f"{path}: unknown weight 'extra.weight'",
        f"{path}: 'blocks.0.mlp.up.weight': wanted shape (64, 16), found (3, 3)",
        f"{path}: the weights are not those of config.json",
    ]


def test_config_json_is_our_own_settings(tmp_path):
    save_model(tmp_path, make())
    data = json.loads((tmp_path / "config.json").read_text())
    assert (data["format"], data["labels"], data["model"]["kind"]) == (1, None, "decoder")
    assert data["model"]["vocab_size"] == 50
