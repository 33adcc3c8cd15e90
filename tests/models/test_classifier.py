"""A classifier on every family: padding changes nothing, and a text without tokens does no harm."""

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.models.classifier import Classifier
from pipeline.models.config import Decoder, Encoder, EncoderDecoder
from pipeline.models.initial import init_weights
from pipeline.models.parts import Experts, TokenChoice
from pipeline.models.saved import load_model, save_model
from pipeline.models.transformer import Transformer

SMALL = {"vocab_size": 50, "d_model": 16, "num_layers": 2, "num_heads": 2, "max_seq_len": 16}
EXPERTS = Experts(count=4, d_ff=16, router=TokenChoice(top_k=2), balance_bias_rate=0.01)
CONFIGS = {
    "decoder": Decoder(**SMALL),
    "experts": Decoder(**SMALL, experts=EXPERTS),
    "full": Decoder(**SMALL, experts=EXPERTS.model_copy(update={"capacity_factor": 1.0})),
    "bert": Encoder(
        **SMALL,
        norm="layernorm",
        norm_placement="post",
        positions="learned",
        mlp="gelu_exact",
        bias=True,
        token_types=2,
    ),
    "windowed": Encoder(**SMALL, sliding_window=4, global_every=2),
    "t5": EncoderDecoder(**SMALL, positions="relative", mlp="relu"),
    "original": EncoderDecoder(**SMALL, positions="sinusoidal", norm_placement="post"),
}
ROUNDING = 1e-6  # sums of some ten terms in another order, in fp32


def make(name: str) -> Classifier:
    model = Classifier(Transformer(CONFIGS[name]), 3, ["a", "b", "c"])
    init_weights(model, 0)
    return model.eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_changes_nothing(name):
    model = make(name)
    ids_BT = torch.randint(50, (3, 9), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([9, 4, 1])
    mask_BT = torch.arange(9) < lengths[:, None]
    with torch.inference_mode():
        together_BC = model(ids_BT, mask_BT)
        for row, length in enumerate(lengths.tolist()):
            ids_1T = ids_BT[row : row + 1, :length]
            alone_1C = model(ids_1T, torch.ones_like(ids_1T, dtype=torch.bool))
            assert (together_BC[row] - alone_1C[0]).abs().max() < ROUNDING


@pytest.mark.parametrize("name", CONFIGS)
def test_a_text_without_tokens_has_logits_and_gradients(name):
    model = make(name).train()
    ids_BT, mask_BT = torch.zeros(2, 3, dtype=torch.long), torch.tensor([[False] * 3, [True, True, False]])
    loss = model(ids_BT, mask_BT, torch.tensor([0, 2]))["tokens"]
    loss.backward()
    assert loss.isfinite()
    for weight, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), weight


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_is_the_sum_over_the_rows_with_a_label(name):
    model = make(name)
    ids_BT, mask_BT = torch.arange(12).reshape(3, 4), torch.ones(3, 4, dtype=torch.bool)
    logits_BC = model(ids_BT, mask_BT)
    wanted = -(logits_BC.log_softmax(-1)[0, 1] + logits_BC.log_softmax(-1)[2, 0])
    assert (model(ids_BT, mask_BT, torch.tensor([1, -100, 0]))["tokens"] - wanted).abs() < ROUNDING


@pytest.mark.parametrize("name", CONFIGS)
def test_it_comes_back_as_it_was_saved(name, tmp_path):
    model = make(name)
    save_model(tmp_path, model)
    loaded = load_model(tmp_path)
    assert isinstance(loaded, Classifier)
    assert loaded.labels == ["a", "b", "c"]
    assert loaded.trunk.config == CONFIGS[name]
    for key, weight in model.state_dict().items():
        assert loaded.state_dict()[key].equal(weight), key


def test_a_class_needs_a_name():
    with pytest.raises(ConfigError, match="labels: wanted 3 names, one for each class, found 2"):
        Classifier(Transformer(CONFIGS["decoder"]), 3, ["a", "b"])
