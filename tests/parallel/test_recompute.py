import copy

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models.config import Decoder, EncoderDecoder
from pipeline.models.initial import init_weights
from pipeline.models.layers import Block
from pipeline.models.parts import Experts
from pipeline.models.transformer import Transformer
from pipeline.parallel.recompute import _costly, _policy, recompute

SIZES = {"vocab_size": 64, "d_model": 16, "num_layers": 3, "num_heads": 2, "max_seq_len": 16}
MODELS = {
    "decoder": Decoder(**SIZES, num_kv_heads=1, dropout=0.2),
    "decoder without dropout": Decoder(**SIZES),
    "predicts ahead": Decoder(**SIZES, predict_ahead=1, dropout=0.2),
    "experts": Decoder(**SIZES, experts=Experts(count=4), dropout=0.1),
    "encoder-decoder": EncoderDecoder(**SIZES, positions="relative", dropout=0.2),
}


def build(config):
    model = Transformer(config)
    init_weights(model, 0)
    return model


def blocks_of(model):
    return [module for module in model.modules() if isinstance(module, Block)]


def batch(config):
    ids = torch.randint(0, 64, (4, 13), generator=torch.Generator().manual_seed(1))
    named = {"ids": ids[:, :-1], "labels": ids[:, 1:], "documents": torch.arange(12).div(5).long().expand(4, -1)}
    return named | ({"decoder_ids": ids[:, :-1]} if isinstance(config, EncoderDecoder) else {})


def gradients(model, arguments):
    model.zero_grad()
    torch.manual_seed(3)
    losses = model(**arguments)
    torch.stack(list(losses.values())).sum().backward()
    after = torch.rand(())  # later random numbers are the same too
    return [after, *losses.values(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("kind", ["full", "selective"])
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_gradients_are_the_same_bits(config, kind):
    model = build(config)
    arguments = batch(config)
    plain = gradients(model, arguments)
    recompute(blocks_of(model), kind)
    again = gradients(model, arguments)
    assert len(plain) == len(again)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
    if config.dropout:
        torch.manual_seed(4)
        assert not torch.equal(model(**arguments)["tokens"], plain[1])


def products(model, arguments) -> float:
    with FlopCounterMode(display=False) as counter:
        gradients(model, arguments)
    return counter.get_total_flops()


def test_full_computes_the_layers_again_and_selective_no_product():
    config = MODELS["decoder without dropout"]
    model, arguments = build(config), batch(config)
    plain = products(model, arguments)
    with FlopCounterMode(display=False) as counter:
        model(**arguments)
    forward = counter.get_total_flops()
    selective, full = copy.deepcopy(model), copy.deepcopy(model)
    recompute(blocks_of(selective), "selective")
    recompute(blocks_of(full), "full")
    assert products(selective, arguments) == plain
    assert plain + 0.5 * forward < products(full, arguments) <= plain + forward


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_less_is_kept(kind):
    config = MODELS["decoder without dropout"]
    model, arguments = build(config), batch(config)

    def kept() -> int:
        storages = {}

        def keep(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            losses = model(**arguments)
        del losses
        return sum(storages.values())

    plain = kept()
    recompute(blocks_of(model), kind)
    assert kept() < 0.5 * plain


def test_nothing_is_kept_apart_where_nothing_is_learned():
    config = MODELS["decoder"]
    model, arguments = build(config), batch(config)
    recompute(blocks_of(model), "full")
    model.eval()
    with torch.no_grad():
        one = model(**arguments)["tokens"]
    assert torch.equal(one, build(config).eval()(**arguments)["tokens"])


def test_null_changes_nothing():
    model = build(MODELS["decoder"])
    recompute(blocks_of(model), None)
    assert all("forward" not in block.__dict__ for block in blocks_of(model))


def test_attention_that_draws_random_numbers_is_computed_again():
    flash = torch.ops.aten._scaled_dot_product_flash_attention.default
    query = torch.zeros(1, 1, 1, 1)
    for dropout, expected in ((0.0, CheckpointPolicy.MUST_SAVE), (0.1, CheckpointPolicy.PREFER_RECOMPUTE)):
        assert _policy(_costly(), None, flash, query, query, query, dropout) == expected
        assert _policy(_costly(), None, flash, query, query, query, dropout_p=dropout) == expected
    assert _policy(_costly(), None, flash, query, query, query) == CheckpointPolicy.MUST_SAVE
    assert _policy(_costly(), None, torch.ops.aten.gelu.default, query) == CheckpointPolicy.PREFER_RECOMPUTE
