"""Each optimizer against a plain formula written down here from its paper, on a few numbers."""

import math

import pytest
import torch
from torch import nn

from pipeline.errors import ConfigError
from pipeline.settings import Settings, decode
from pipeline.stage import Parallel, Run
from pipeline.training.optim import Adafactor, AdamW, AnyOptimizer, Lion, Muon, ScheduleFreeAdamW
from pipeline.training.optim.flat import whole_parameter
from pipeline.training.optim.muon import orthogonalize

STEPS = 5
EXACT = {"rtol": 1e-6, "atol": 1e-7}  # a few fp32 roundings


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(4, 3)
        self.block = nn.Linear(3, 5)
        self.norm = nn.LayerNorm(3)
        self.experts = nn.Parameter(torch.zeros(2, 4, 3))
        self.head = nn.Linear(3, 4, bias=False)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)


def gradients(name: str) -> list[torch.Tensor]:
    """Return a gradient of a parameter for each step."""
    shape = dict(Model().named_parameters())[name].shape
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for _ in range(STEPS)]


def rate(step: int) -> float:
    return 0.01 * step


def learn(settings, name: str, lr_scales=None, optimizer_of=None):
    """Return a parameter before and after some steps on it, and its optimizer."""
    model = Model()
    optimizer = settings.build(model, lr_scales)
    parameter = dict(model.named_parameters())[name]
    before = parameter.detach().clone()
    for step, gradient in enumerate(gradients(name), 1):
        parameter.grad = gradient.clone()
        for group in optimizer.param_groups:
            group["lr"] = rate(step) * group["lr_scale"]
        optimizer.step()
    return before, parameter.detach(), optimizer, parameter


def adamw(weight, grads, decay, beta1=0.9, beta2=0.95, eps=1e-8, scale=1.0):
    m = v = torch.zeros_like(weight)
    for t, g in enumerate(grads, 1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        step = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
        weight = weight - rate(t) * scale * (step + decay * weight)
    return weight


@pytest.mark.parametrize(("name", "decay"), [("block.weight", 0.1), ("block.bias", 0.0), ("norm.weight", 0.0)])
def test_adamw(name, decay):
    before, after, _, _ = learn(AdamW(), name)
    torch.testing.assert_close(after, adamw(before, gradients(name), decay), **EXACT)


def test_a_rate_of_its_own():
    before, after, _, _ = learn(AdamW(), "block.weight", {"block.weight": 0.25})
    torch.testing.assert_close(after, adamw(before, gradients("block.weight"), 0.1, scale=0.25), **EXACT)
    assert [group["lr_scale"] for group in AdamW().build(Model(), {"block.weight": 0.25}).param_groups] == [1, 0.25, 1]
    with pytest.raises(KeyError, match="the model has no parameter 'blck.weight'"):
        AdamW().build(Model(), {"blck.weight": 0.25})


@pytest.mark.parametrize(("name", "decay"), [("block.weight", 1.0), ("norm.bias", 0.0)])
def test_lion(name, decay):
    before, after, _, _ = learn(Lion(), name)
    weight, m = before, torch.zeros_like(before)
    for t, g in enumerate(gradients(name), 1):
        weight = weight - rate(t) * (torch.sign(0.9 * m + 0.1 * g) + decay * weight)
        m = 0.99 * m + 0.01 * g
    torch.testing.assert_close(after, weight, **EXACT)


@pytest.mark.parametrize("shape", [(4, 4), (3, 8), (8, 3), (2, 5, 7)])
def test_newton_schulz_keeps_directions_and_evens_out_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    assert (s.min() / s.max()) > 0.01  # else five iterations are not enough
    found = torch.linalg.svdvals(orthogonalize(matrix, 5))
    assert 0.65 < found.min() < found.max() < 1.25  # where the paper's coefficients lead
    inside = u.mT @ orthogonalize(matrix, 5) @ vt.mT
    torch.testing.assert_close(inside, torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1)), rtol=0, atol=1e-5)


def by_svd(matrix):
    """Return what five iterations of Jordan's quintic make of each singular value, by the decomposition itself."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ vt


def muon(weight, grads):
    buffer = torch.zeros_like(weight)
    for t, g in enumerate(grads, 1):
        buffer = 0.95 * buffer + 0.05 * g
        step = by_svd(0.95 * buffer + 0.05 * g) * 0.2 * math.sqrt(max(weight.shape))
        weight = weight - rate(t) * (step + 0.1 * weight)
    return weight


def test_muon():
    before, after, _, _ = learn(Muon(), "block.weight")
    torch.testing.assert_close(after, muon(before, gradients("block.weight")), rtol=1e-4, atol=1e-5)


def test_under_mup_a_matrix_learns_at_the_root_of_adamws_rate():
    groups = Muon().build(Model(), {"block.weight": 0.25}).param_groups
    assert {group["lr_scale"] for group in groups if group["rule"] == "muon"} == {0.5, 1.0}


def test_muon_takes_experts_one_by_one():
    before, after, _, _ = learn(Muon(), "experts")
    for expert in range(2):
        wanted = muon(before[expert], [g[expert] for g in gradients("experts")])
        torch.testing.assert_close(after[expert], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "decay"), [("embedding.weight", 0.1), ("head.weight", 0.1), ("block.bias", 0.0), ("norm.weight", 0.0)]
)
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_muon_leaves_the_rest_to_adamw(name, decay, scale):
    before, after, _, _ = learn(Muon(adamw_lr_scale=scale), name)
    wanted = adamw(before, gradients(name), decay, scale=scale)
    torch.testing.assert_close(after, wanted, **EXACT)


def test_muons_step_is_as_large_as_adamws():
    model = nn.Sequential(nn.Linear(48, 32, bias=False))
    optimizer = Muon(lr=1e-3, weight_decay=0.0).build(model)
    before = model[0].weight.detach().clone()
    model[0].weight.grad = torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    rms = (model[0].weight.detach() - before).square().mean().sqrt().item() / 1e-3
    assert 0.7 * 0.2 < rms < 1.2 * 0.2  # as far as singular values are from one


def test_what_muon_makes_orthogonal():
    names = ["embedding.weight", "position_embedding.weight", "token_type_embedding.weight", "head.weight"]
    names += ["decoder.relative.weight", "trunk.embedding.weight", "sentence_head.weight"]
    names += ["decoder.blocks.1.mlp.router.weight"]
    inner = [
        "decoder.blocks.0.attention.query.weight",
        "decoder.blocks.0.mlp.experts.up",
        "head_transform.dense.weight",
    ]
    inner += ["ahead.0.mlp.down.weight", "head_transform.dense.weight"]
    matrix, vector = torch.zeros(2, 2), torch.zeros(2)
    assert {Muon()._rule(name, matrix) for name in names} == {"adamw"}
    assert {Muon()._rule(name, matrix) for name in inner} == {"muon"}
    assert Muon()._rule("decoder.blocks.0.mlp.up.bias", vector) == "adamw"


def adafactor(weight, grads, decay, relative=True):
    """Algorithms 4 (matrices) and 5 (vectors), with the relative step of section 8 times `rate`."""
    r = c = v = 0.0
    for t, g in enumerate(grads, 1):
        beta = 1 - t**-0.8
        squares = g**2 + 1e-30
        if g.ndim == 2:
            r = beta * r + (1 - beta) * squares.sum(1)
            c = beta * c + (1 - beta) * squares.sum(0)
            v = torch.outer(r, c) / r.sum()
        else:
            v = beta * v + (1 - beta) * squares
        u = g / v.sqrt()
        u = u / max(1.0, u.square().mean().sqrt().item() / 1.0)
        alpha = rate(t) * (max(1e-3, weight.square().mean().sqrt().item()) if relative else 1.0)
        weight = weight - alpha * u - rate(t) * decay * weight
    return weight


@pytest.mark.parametrize(("name", "decay"), [("block.weight", 0.1), ("embedding.weight", 0.1), ("norm.bias", 0.0)])
@pytest.mark.parametrize("relative", [True, False])
def test_adafactor(name, decay, relative):
    before, after, optimizer, parameter = learn(Adafactor(weight_decay=0.1, relative_step=relative), name)
    torch.testing.assert_close(after, adafactor(before, gradients(name), decay, relative), rtol=1e-5, atol=1e-6)
    if before.ndim == 2:
        assert optimizer.state[parameter]["squares/"].numel() == sum(before.shape)  # sublinear memory


def test_adafactor_takes_experts_one_by_one():
    before, after, _, _ = learn(Adafactor(), "experts")
    for expert in range(2):
        wanted = adafactor(before[expert], [g[expert] for g in gradients("experts")], 0.0)
        torch.testing.assert_close(after[expert], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "decay"), [("block.weight", 0.1), ("block.bias", 0.0)])
def test_schedule_free(name, decay):
    before, after, optimizer, parameter = learn(ScheduleFreeAdamW(), name)
    x = z = before
    v, rates = torch.zeros_like(before), 0.0
    for t, g in enumerate(gradients(name), 1):
        y = 0.1 * z + 0.9 * x
        v = 0.95 * v + 0.05 * g**2
        z = z - rate(t) * (g / ((v / (1 - 0.95**t)).sqrt() + 1e-8) + decay * y)
        rates += rate(t) ** 2
        x = (1 - rate(t) ** 2 / rates) * x + rate(t) ** 2 / rates * z
    torch.testing.assert_close(after, 0.1 * z + 0.9 * x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(optimizer.evaluation_point(parameter), x, rtol=1e-5, atol=1e-6)


def test_schedule_free_evaluates_the_first_weights_before_the_first_step():
    model = Model()
    optimizer = ScheduleFreeAdamW().build(model)
    assert torch.equal(optimizer.evaluation_point(model.norm.weight), model.norm.weight)


ALL = [AdamW(), Muon(), Lion(), Adafactor(), ScheduleFreeAdamW()]


@pytest.mark.parametrize("settings", ALL, ids=lambda settings: settings.kind)
def test_norms_and_biases_never_decay(settings):
    model = Model()
    groups = settings.model_copy(update={"weight_decay": 0.5}).build(model).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in model.named_parameters()} == {
        name: 0.5 if p.ndim > 1 else 0.0 for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("settings", ALL, ids=lambda settings: settings.kind)
def test_what_does_not_learn_is_left_alone(settings):
    model = Model()
    model.embedding.weight.requires_grad_(False)
    held = {id(p) for group in settings.build(model).param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("settings", ALL, ids=lambda settings: settings.kind)
def test_as_many_numbers_as_said_are_kept(settings):
    for name in ("block.weight", "norm.weight"):
        _, after, optimizer, parameter = learn(settings, name)
        kept = sum(v.numel() for v in optimizer.state[parameter].values() if torch.is_tensor(v) and v.ndim)
        assert kept <= settings.state_copies * after.numel()


@pytest.mark.parametrize("settings", ALL, ids=lambda settings: settings.kind)
@pytest.mark.parametrize("name", ["block.weight", "block.bias", "experts", "embedding.weight"])
def test_a_state_is_laid_out_like_the_parameter_or_a_number_or_of_the_whole(settings, name):
    _, _, optimizer, parameter = learn(settings, name)
    assert optimizer.state[parameter]
    for key, value in optimizer.state[parameter].items():
        if torch.is_tensor(value) and value.ndim and value.shape != parameter.shape:
            assert whole_parameter(key) is not None
        else:
            assert whole_parameter(key) is None


OFFLOADED = {
    "offload": Parallel(offload="cpu"),
    "deepspeed.zero_optimization.offload_optimizer": Parallel(
        deepspeed={"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    ),
}


@pytest.mark.parametrize("key", OFFLOADED)
@pytest.mark.parametrize("settings", ALL, ids=lambda settings: settings.kind)
def test_whole_matrices_and_offload_do_not_go_together(settings, key):
    problems = list(settings.check(Run(kind="local", parallel=OFFLOADED[key])))
    if settings.needs_matrices:
        assert problems == [
            (
                "optimizer.kind",
                f"'{settings.kind}' works on whole matrices and cannot put them together under run.parallel.{key}; "
                "leave that out, or take adamw",
            )
        ]
    else:
        assert not problems
    assert not list(settings.check(Run(kind="local")))


def test_settings_are_picked_by_kind():
    class Holder(Settings):
        optimizer: AnyOptimizer

    assert isinstance(decode(Holder, {"optimizer": {"kind": "schedule_free_adamw"}}).optimizer, ScheduleFreeAdamW)
    with pytest.raises(ConfigError, match="optimizer.kind: no optimizer is called 'muo'; did you mean 'muon'?"):
        decode(Holder, {"optimizer": {"kind": "muo"}})
