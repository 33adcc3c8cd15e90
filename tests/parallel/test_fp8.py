import pytest
import torch
from torch import nn

from pipeline.errors import ConfigError
from pipeline.models.config import Decoder
from pipeline.models.initial import init_weights
from pipeline.models.parts import Experts
from pipeline.models.transformer import Transformer
from pipeline.parallel.fp8 import BACKWARD, FORWARD, _Product, _shrink, multiply_in_fp8

ROUNDED = 2**-8  # of bf16, which products are given back in
SIZES = {"vocab_size": 64, "d_model": 32, "num_layers": 2, "num_heads": 2, "max_seq_len": 16}


def through(tensor, dtype):
    small, factor = _shrink(tensor, dtype)
    return small.float() * factor


def apart(one, other) -> float:
    return ((one.float() - other.float()).norm() / other.float().norm()).item()


@pytest.mark.parametrize("tokens", [32, 37])  # a multiple of 16, and none
def test_products_are_those_of_what_fp8_holds(tokens):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 32, generator=generator).bfloat16().requires_grad_()
    weight = nn.Parameter(torch.randn(48, 32, generator=generator).bfloat16() / 100)
    gradient = torch.randn(tokens, 48, generator=generator).bfloat16() * 1e-6  # too small for fp8 itself
    y = _Product.apply(x, weight)
    dx, dweight = torch.autograd.grad(y, [x, weight], gradient)
    small_x, small_weight, small_gradient = through(x, FORWARD), through(weight, FORWARD), through(gradient, BACKWARD)
    assert apart(y, small_x @ small_weight.T) < ROUNDED
    assert apart(dx, small_gradient @ small_weight) < ROUNDED
    assert apart(dweight, small_gradient.T @ small_x) < ROUNDED
    assert 2 * ROUNDED < apart(y, x.float() @ weight.float().T) < 0.1  # it is fp8


def test_nothing_overflows_and_zeros_stay():
    for dtype in (FORWARD, BACKWARD):
        for largest in (1e-20, 1.0, 447.9, 57345.0, 1e20):
            tensor = torch.tensor([largest, -largest, 0.0])
            assert torch.allclose(through(tensor, dtype), tensor, rtol=2**-2)
        assert torch.equal(through(torch.zeros(3), dtype), torch.zeros(3))


def test_what_is_not_finite_is_not_hidden():
    for bad in (float("inf"), float("nan")):
        y = _Product.apply(torch.tensor([[bad] + [1.0] * 15] * 16).bfloat16(), torch.ones(16, 16).bfloat16())
        assert not y.isfinite().all()


def test_the_factor_is_a_power_of_two():
    for largest in (3e-7, 0.3, 17.0):
        factor = _shrink(torch.tensor([largest]), FORWARD)[1]
        assert torch.frexp(factor).mantissa == 0.5


def build(**changes):
    model = Transformer(Decoder(**{**SIZES, **changes})).bfloat16()
    init_weights(model, 0)
    return model


def test_layers_multiply_in_fp8_and_the_rest_does_not():
    model = build(experts=Experts(count=4, shared=1), tie_embeddings=False)
    names = list(model.state_dict())
    multiply_in_fp8(model)
    changed = {name for name, module in model.named_modules() if "forward" in module.__dict__}
    block = {f"attention.{name}" for name in ("query", "key", "value", "out")}
    block |= {f"mlp.shared.{name}" for name in ("gate", "up", "down")}
    assert changed == {f"decoder.blocks.{number}.{name}" for number in range(2) for name in block}
    assert list(model.state_dict()) == names


def test_a_model_learns_nearly_the_same():
    ids = torch.randint(0, 64, (4, 17), generator=torch.Generator().manual_seed(0))

    def losses(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        found = []
        for _ in range(10):
            loss = model(ids[:, :-1], ids[:, 1:])["tokens"] / 64
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    plain, model = losses(build(bias=True)), build(bias=True)
    multiply_in_fp8(model)
    found = losses(model)
    assert found != plain
    assert plain[-1] < plain[0] - 1
    assert found == pytest.approx(plain, rel=0.05)


def test_sizes_that_fp8_cannot_multiply_are_refused():
    with pytest.raises(ConfigError) as error:
        multiply_in_fp8(build(d_ff=40))
    assert error.value.problems[0] == (
        "precision: a product in fp8 needs sizes that are multiples of 16, and on each rank decoder.blocks.0.mlp.gate "
        "has 40 x 32; change the model's sizes, or take bf16"
    )
    assert len(error.value.problems) == 6
