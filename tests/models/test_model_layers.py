import math

import pytest
import torch
import torch.nn.functional as F

from pipeline.models import layers, loss
from pipeline.models.config import Decoder
from pipeline.models.layers import Attention, FeedForward
from pipeline.models.loss import Output, summed_cross_entropy
from pipeline.models.positions import make_rotary, rotate
from pipeline.models.sight import Sight

# Sums of a few dozen numbers of size one, in another order: fp32 has 24 bits, of which the last three may go.
ROUNDING = 1e-6
# The same for gradients that are summed over all tokens.
GRADIENT_ROUNDING = 1e-5


def assert_close(found, wanted, tolerance=ROUNDING):
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


def test_rotary_turns_pairs_by_the_angle_of_the_position():
    config = Decoder(d_model=8, num_heads=1, rope_theta=100.0)
    x = torch.randn(1, 5, 1, 8, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([3, 0, 7, 1, 2])
    turned = rotate(x, make_rotary(positions, config, torch.float32))
    for t, position in enumerate(positions.tolist()):
        for i in range(4):
            angle = position * 100.0 ** (-2 * i / 8)
            a, b = x[0, t, 0, i].item(), x[0, t, 0, i + 4].item()
            assert turned[0, t, 0, i].item() == pytest.approx(a * math.cos(angle) - b * math.sin(angle), abs=ROUNDING)
            assert turned[0, t, 0, i + 4].item() == pytest.approx(
                b * math.cos(angle) + a * math.sin(angle), abs=ROUNDING
            )


def naive_attention(layer, x, rotary):
    """One head and one position at a time."""
    out = torch.zeros(x.shape)
    q, k, v = (linear(x).unflatten(-1, (-1, layer.head_dim)) for linear in (layer.query, layer.key, layer.value))
    q, k = rotate(q, rotary), rotate(k, rotary)
    shared = q.shape[2] // k.shape[2]
    for row in range(x.shape[0]):
        for head in range(q.shape[2]):
            for t in range(x.shape[1]):
                scores = k[row, : t + 1, head // shared] @ q[row, t, head] / math.sqrt(layer.head_dim)
                mixed = scores.exp() / scores.exp().sum() @ v[row, : t + 1, head // shared]
                out[row, t, head * layer.head_dim : (head + 1) * layer.head_dim] = mixed
    return layer.out(out)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@torch.no_grad()
def test_attention_is_the_naive_formula(kv_heads):
    config = Decoder(d_model=16, num_heads=4, num_kv_heads=kv_heads)
    torch.manual_seed(0)
    layer, x = Attention(config), torch.randn(2, 6, 16)
    rotary = make_rotary(torch.arange(6), config, x.dtype)
    assert_close(layer(x, Sight(None, rotary, causal=True)), naive_attention(layer, x, rotary))


@torch.no_grad()
def test_grouped_queries_are_repeated_keys_and_values():
    torch.manual_seed(0)
    grouped = Attention(Decoder(d_model=16, num_heads=4, num_kv_heads=2))
    full, x = Attention(Decoder(d_model=16, num_heads=4)), torch.randn(2, 6, 16)
    for name in ("query", "out"):
        getattr(full, name).weight.copy_(getattr(grouped, name).weight)
    for name in ("key", "value"):
        heads = getattr(grouped, name).weight.unflatten(0, (2, 4))
        getattr(full, name).weight.copy_(heads.repeat_interleave(2, dim=0).flatten(0, 1))
    sight = Sight(None, None, causal=True)
    assert_close(grouped(x, sight), full(x, sight))


@torch.no_grad()
def test_swiglu_and_norms_are_their_formulas():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16)
    layer = FeedForward(Decoder(d_model=16), 64)
    gate = x @ layer.gate.weight.T
    assert_close(layer(x), (gate * gate.sigmoid() * (x @ layer.up.weight.T)) @ layer.down.weight.T)
    rms = layers.make_norm(Decoder(d_model=16, norm_eps=0.1))
    rms.weight.normal_()
    assert_close(rms(x), x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * rms.weight)


@pytest.mark.parametrize(("vocab_size", "rows"), [(64, 64), (50, 64)])
def test_the_loss_and_its_gradients_are_those_of_all_logits_at_once(monkeypatch, vocab_size, rows):
    monkeypatch.setattr(loss, "CPU_CHUNK_TOKENS", 8)  # 20 tokens: two whole chunks and a part
    torch.manual_seed(0)
    x, weight = torch.randn(20, 16, requires_grad=True), torch.randn(rows, 16, requires_grad=True)
    labels = torch.randint(vocab_size, (20,))
    labels[[0, 9, 19]] = -100
    wanted = F.cross_entropy(x @ weight[:vocab_size].T, labels, reduction="sum")
    wanted_x, wanted_weight = torch.autograd.grad(3 * wanted, (x, weight))
    found = summed_cross_entropy(x, Output(weight, None, vocab_size), labels)
    found_x, found_weight = torch.autograd.grad(3 * found, (x, weight))
    torch.testing.assert_close(found, wanted, rtol=ROUNDING, atol=0)
    assert_close(found_x, wanted_x, GRADIENT_ROUNDING)
    assert_close(found_weight, wanted_weight, GRADIENT_ROUNDING)
    assert found_weight[vocab_size:].eq(0).all()
