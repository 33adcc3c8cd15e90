import math

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.models.config import Decoder
from pipeline.models.initial import init_weights
from pipeline.models.layers import Block
from pipeline.models.parts import Experts
from pipeline.models.transformer import Transformer
from pipeline.parallel.recompute import recompute
from pipeline.training.compiling import Compiled, compile_blocks

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's compiler looks at what it warns of itself

SIZES = {"vocab_size": 64, "d_model": 16, "num_layers": 2, "num_heads": 2, "max_seq_len": 16}
TOLERANCE = 1e-5  # fused kernels round otherwise, in losses of some hundred and gradients near one


def build(**changes):
    model = Transformer(Decoder(**{**SIZES, **changes}))
    init_weights(model, 0)
    return model


def microbatch():
    ids = torch.randint(0, 64, (4, 13), generator=torch.Generator().manual_seed(1))
    return {"ids": ids[:, :-1], "labels": ids[:, 1:], "documents": torch.arange(12).div(5).long().expand(4, -1)}


def learn(model):
    torch.manual_seed(3)
    model.zero_grad()
    losses = model(**microbatch())
    torch.stack(list(losses.values())).sum().backward()
    return {name: loss.item() for name, loss in losses.items()}, [p.grad.clone() for p in model.parameters()]


@pytest.fixture
def quick(monkeypatch):
    """No kernels are made: the layers are only looked through, and run as torch would without it."""
    real = torch.compile

    def compiled(function, options):
        assert options == {"fallback_random": True}
        return real(function, backend="eager")

    monkeypatch.setattr(torch, "compile", compiled)
    yield
    torch._dynamo.reset()


def assert_the_same(model, kind):
    plain, gradients = learn(model)
    recompute([module for module in model.modules() if isinstance(module, Block)], kind)
    found = compile_blocks(model, microbatch())
    losses, again = learn(model)
    assert losses == pytest.approx(plain, rel=TOLERANCE)
    assert all(
        (one - other).abs().max() < TOLERANCE * max(1, other.abs().max())
        for one, other in zip(again, gradients, strict=True)
    )
    return found


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (None, {"dropout": 0.2}),
        ("full", {}),
        ("selective", {}),
        (None, {"experts": Experts(count=4)}),
        ("full", {"experts": Experts(count=4)}),
    ],
)
def test_compiled_layers_learn_the_same(quick, kind, changes):
    found = assert_the_same(build(**changes), kind)
    assert found.seconds > 0
    assert set(found.stats) == {"compile.seconds", "compile.gain"}
    assert math.isclose(found.stats["compile.gain"], found.plain_s / found.compiled_s, abs_tol=1e-3)


def test_measuring_leaves_no_trace(quick):
    model = build(experts=Experts(count=4), dropout=0.1)
    learn(model)
    before = [tensor.clone() for tensor in (*model.state_dict().values(), *(p.grad for p in model.parameters()))]
    counts = [module.counts.clone() for module in model.modules() if hasattr(module, "counts")]
    assert counts
    state = torch.random.get_rng_state()
    compile_blocks(model, microbatch())
    after = (*model.state_dict().values(), *(p.grad for p in model.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(module.counts is None for module in model.modules() if hasattr(module, "counts"))
    assert model.training


def test_layers_that_do_not_learn_stay_as_they_are(quick):
    model = build()
    model.decoder.blocks[0].requires_grad_(False)
    compile_blocks(model, microbatch())
    assert ["forward" in block.__dict__ for block in model.decoder.blocks] == [False, True]


def test_what_torch_cannot_compile_is_said(monkeypatch):
    def broken(function, options):
        def call(*arguments, **named):
            raise RuntimeError("no\nkernel")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(
        ConfigError, match="run.compile: torch cannot compile the layers: RuntimeError: no kernel; set it"
    ):
        compile_blocks(build(), microbatch())


def test_without_a_compiler_nothing_is_begun(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"run\.compile: torch\.compile needs a C\+\+ compiler, and there is no"):
        compile_blocks(build(), microbatch())


def test_cost_and_gain_are_said():
    assert Compiled(12.34, 0.02, 0.01).words == (
        "layers compiled in 12.3 s; one takes 10.00 ms instead of 20.00 ms, 2.00 times the speed"
    )


def test_layers_that_compute_something_else_are_refused(quick):
    model = build(dropout=0.2)  # run without kernels, what is computed again draws other random numbers
    recompute([module for module in model.modules() if isinstance(module, Block)], "full")
    with pytest.raises(ConfigError, match="run.compile: the gradients of a compiled layer are .* % off"):
        compile_blocks(model, microbatch())


@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, "full", "selective"])
def test_kernels_learn_the_same(kind):
    found = assert_the_same(build(dropout=0.2), kind)
    assert found.seconds > 0
    torch._dynamo.reset()
