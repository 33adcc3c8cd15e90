import math

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from pipeline.models import moe, routers
from pipeline.models.config import Encoder
from pipeline.models.layers import activate
from pipeline.models.moe import MixtureOfExperts, after_step
from pipeline.models.parts import ExpertChoice, Experts, Hash, TokenChoice
from pipeline.models.routers import mixed_bits
from pipeline.models.weights import weights

# The same products in another order, in fp64 and in fp32; outputs are of size one.
ROUNDING_64, ROUNDING_32 = 1e-12, 1e-6
D_MODEL, WIDTH = 8, 12
TOKEN_CHOICES = [
    TokenChoice(top_k=2),
    TokenChoice(top_k=1, renormalize=False),
    TokenChoice(top_k=3, scores="sigmoid"),
    TokenChoice(top_k=2, scores="sigmoid", renormalize=False),
    TokenChoice(top_k=2, capacity_factor=0.75),
    TokenChoice(top_k=4, capacity_factor=0.5),
]
ROUTERS = [*TOKEN_CHOICES, ExpertChoice(capacity_factor=1.5), Hash()]
ROUTER_IDS = [f"{router.kind}-{number}" for number, router in enumerate(ROUTERS)]


def make_config(router, count=4, mlp="swiglu", **experts):
    return Encoder(
        vocab_size=64,
        d_model=D_MODEL,
        num_heads=2,
        num_layers=1,
        mlp=mlp,
        init_std=0.5,
        experts=Experts(count=count, d_ff=WIDTH, router=router, **experts),
    )


def make_layer(router, dtype=torch.float64, **more):
    torch.manual_seed(0)
    return MixtureOfExperts(make_config(router, **more)).to(dtype)


def make_tokens(rows=3, length=10, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, length, D_MODEL, generator=generator, dtype=dtype)
    return x, torch.randint(64, (rows, length), generator=generator)


def make_padding():
    return torch.arange(10) < torch.tensor([[10], [7], [4]])


def assert_close(found, wanted, tolerance=ROUNDING_64):
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


def expert_output(layer, expert, x, config):
    experts = layer.experts
    return experts.down[expert] @ (activate(experts.gate[expert] @ x, config) * (experts.up[expert] @ x))


def naive_choice(layer, config, x_TD, ids_T, training):
    """Which experts the tokens of one row have, and with what weights: a list of {expert: weight}."""
    router, count = config.experts.router, config.experts.count
    if isinstance(router, Hash):
        return [{int(mixed_bits(i)) % count: 1.0} for i in ids_T]
    logits = [[float(layer.router.weight[e] @ x) for e in range(count)] for x in x_TD]
    softmax = [[math.exp(z) / sum(math.exp(y) for y in row) for z in row] for row in logits]
    if isinstance(router, ExpertChoice):
        room = math.ceil(router.capacity_factor * len(x_TD) / count)
        chosen = [{} for _ in x_TD]
        for e in range(count):
            for t in sorted(range(len(x_TD)), key=lambda t: -softmax[t][e])[:room]:
                chosen[t][e] = softmax[t][e]
        return chosen
    scores = softmax if router.scores == "softmax" else [[1 / (1 + math.exp(-z)) for z in row] for row in logits]
    room = [math.inf] * count
    if training and router.capacity_factor is not None:
        room = [math.ceil(router.capacity_factor * len(x_TD) * router.top_k / count)] * count
    chosen = []
    for row in scores:
        best = sorted(range(count), key=lambda e: -row[e])[: router.top_k]
        total = sum(row[e] for e in best) if router.renormalize else 1.0
        chosen.append({e: row[e] / total for e in best if room[e] > 0})
        for e in best:
            room[e] -= 1
    return chosen


def naive_forward(layer, config, x, ids, real, training=True):
    """One token at a time."""
    out = torch.zeros_like(x)
    for b in range(len(x)):
        at = real[b].nonzero().flatten().tolist()
        chosen = naive_choice(layer, config, x[b, at], ids[b, at], training)
        for t, experts in zip(at, chosen, strict=True):
            for expert, weight in experts.items():
                out[b, t] += weight * expert_output(layer, expert, x[b, t], config)
    return out if layer.shared is None else out + layer.shared(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("router", ROUTERS, ids=ROUTER_IDS)
def test_output_is_that_of_one_token_at_a_time(router, training):
    layer, config = make_layer(router).train(training), make_config(router)
    x, ids = make_tokens()
    everything = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        assert_close(layer(x, ids)[0], naive_forward(layer, config, x, ids, everything, training))
        assert_close(layer(x, ids, everything)[0], layer(x, ids)[0], 0)
        real = make_padding()
        found = layer(x, ids, real)[0]
        assert_close(found[real], naive_forward(layer, config, x, ids, real, training)[real])
        assert (found[~real] == 0).all()  # padding has no experts


@pytest.mark.parametrize("mlp", ["geglu", "geglu_exact"])
def test_shared_experts_and_other_activations(mlp):
    config, layer = make_config(Hash(), mlp=mlp, shared=2), make_layer(Hash(), mlp=mlp, shared=2)
    assert layer.shared.up.weight.shape == (2 * WIDTH, D_MODEL)
    x, ids = make_tokens()
    assert_close(layer(x, ids)[0], naive_forward(layer, config, x, ids, torch.ones_like(ids, dtype=torch.bool)))


@pytest.mark.parametrize("router", ROUTERS, ids=ROUTER_IDS)
def test_parameters_are_those_of_the_list(router):
    config = make_config(router, shared=1)
    listed = {weight.name: weight.shape for weight in weights(config) if ".blocks.0.mlp." in weight.name}
    made = {f"encoder.blocks.0.mlp.{n}": tuple(p.shape) for n, p in MixtureOfExperts(config).named_parameters()}
    assert made == listed


@pytest.mark.parametrize("router", [TokenChoice(top_k=2), TokenChoice(top_k=2, scores="sigmoid"), *ROUTERS[4:7]])
def test_gradients(router):
    layer = make_layer(router, count=3) if getattr(router, "top_k", 0) < 4 else make_layer(router)
    x, ids = make_tokens(rows=2, length=4)
    real = torch.tensor([[True] * 4, [True, True, True, False]])
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x, ids, real))

    values = [p.detach().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *values))


def test_every_weight_has_a_gradient_even_if_nothing_is_routed():
    layer = make_layer(TokenChoice(top_k=1))
    x, ids = make_tokens()
    out, losses = layer(x, ids, torch.zeros_like(ids, dtype=torch.bool))
    (out.sum() + losses.sum()).backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in layer.parameters())
    assert losses.tolist() == [0, 0]


def test_capacity_drops_the_later_tokens_of_each_row_only():
    layer = make_layer(TokenChoice(top_k=1, capacity_factor=1.0), count=2)
    x, ids = make_tokens(rows=2, length=6)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[0, 0], layer.router.weight[1, 0] = 1, -1
        x[..., 0] = torch.tensor([[1, 1, -1, 1, 1, 1], [-1, -1, -1, -1, 1, 1]])  # expert 0 where positive
        out = layer(x, ids)[0]
    dropped = (out == 0).all(-1)
    assert dropped.tolist() == [[False] * 4 + [True] * 2, [False] * 3 + [True] + [False] * 2]
    assert after_step(layer)["router.dropped_fraction"] == pytest.approx(3 / 12)


@pytest.mark.parametrize(("factor", "tokens", "room"), [(1.1, 100, 110), (1.25, 100, 125), (1.0, 101, 101)])
def test_capacity_is_not_raised_by_rounding(factor, tokens, room):
    assert routers._capacity(factor, torch.ones(1, tokens, dtype=torch.bool), 1).item() == room


def test_expert_choice_takes_the_best_of_each_row():
    layer = make_layer(ExpertChoice(capacity_factor=1.0), count=2)
    x, ids = make_tokens(rows=1, length=4)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[0, 0], layer.router.weight[1, 0] = 1, -1
        x[0, :, 0] = torch.tensor([3.0, 2.0, -1.0, 2.5])
        routing = layer.router(x, ids, None)
    assert routing.taken_NK.T.tolist() == [[True, False, False, True], [False, True, True, False]]
    numbers = after_step(layer)
    assert numbers["router.load_max"] == numbers["router.load_min"] == 1
    assert numbers["router.dropped_fraction"] == 0


def test_expert_choice_counts_tokens_that_nobody_takes():
    layer = make_layer(ExpertChoice(capacity_factor=1.0), count=2)
    x, ids = make_tokens(rows=1, length=4)
    with torch.no_grad():
        layer.router.weight.zero_()
        out = layer(x, ids)[0]  # all tokens are alike: both take the first two
    assert (out == 0).all(-1).tolist() == [[False, False, True, True]]
    assert after_step(layer)["router.dropped_fraction"] == 0.5


@pytest.mark.parametrize("count", [4, 8, 7])
def test_hash_is_balanced_and_fixed(count):
    experts = mixed_bits(torch.arange(50_000)) % count
    load = torch.bincount(experts, minlength=count) / (50_000 / count)
    assert 0.95 < load.min() <= load.max() < 1.05  # the deviation of a binomial is 1.2 % at most
    assert len(mixed_bits(torch.arange(50_000)).unique()) == 50_000
    # The published finalizer in unbounded integers.
    for number in (0, 1, 77, 49_999):
        bits = number
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            bits = ((bits ^ (bits >> shift)) * factor) % 2**32
        assert int(mixed_bits(torch.tensor(number))) == bits ^ (bits >> 16)


def test_evaluation_drops_nothing_so_that_rows_do_not_matter():
    layer = make_layer(TokenChoice(top_k=2, capacity_factor=0.25)).eval()
    x, ids = make_tokens()
    with torch.no_grad():
        whole = layer(x, ids)[0]
        for t in range(x.shape[1]):
            assert_close(layer(x[:, t : t + 1], ids[:, t : t + 1])[0], whole[:, t : t + 1])
    assert after_step(layer) == {}  # and counts nothing


def test_balance_loss_by_hand():
    layer = make_layer(TokenChoice(top_k=1), count=2)
    x, ids = make_tokens(rows=2, length=4)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[0, 0] = 1
        x[..., 0] = math.log(3) * torch.tensor([[1, 1, 1, -1], [1, 1, -1, -1]])  # shares 3/4 and 1/4 of the first
    balance, z = layer(x, ids)[1].tolist()
    first = 2 * (3 / 4 * (3 * 3 / 4 + 1 / 4) / 4 + 1 / 4 * (3 * 1 / 4 + 3 / 4) / 4)
    assert balance == pytest.approx(first + 1.0)  # an even row has 1
    a, b = math.log(3 + 1) ** 2, math.log(1 / 3 + 1) ** 2
    assert z == pytest.approx((3 * a + b) / 4 + (2 * a + 2 * b) / 4)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_balance_loss_of_uniform_scores_is_one_for_any_number_of_choices(scores):
    layer = make_layer(TokenChoice(top_k=3, scores=scores))
    with torch.no_grad():
        layer.router.weight.zero_()
    x, ids = make_tokens()
    assert layer(x, ids)[1][0].item() == pytest.approx(len(x))


def imbalance(layer, x, ids):
    after_step(layer)
    with torch.no_grad():
        layer(x, ids)
    return after_step(layer)["router.load_max"]


def make_biased_tokens(seed=1):
    """Tokens that have much in common, so that a random router sends most to few experts."""
    x, ids = make_tokens(rows=4, length=128, dtype=torch.float32, seed=seed)
    return x + 1.5, ids


def test_descending_the_balance_loss_evens_out_the_load():
    layer = make_layer(TokenChoice(top_k=1), torch.float32, count=8)
    x, ids = make_biased_tokens()
    before = imbalance(layer, x, ids)
    optimizer = torch.optim.SGD([layer.router.weight], lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        layer(x, ids)[1][0].backward()
        optimizer.step()
    assert before > 3
    assert imbalance(layer, x, ids) < 1.5


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_balance_bias_evens_out_the_load_and_leaves_the_weights_alone(scores):
    layer = make_layer(TokenChoice(top_k=2, scores=scores), torch.float32, count=8, balance_bias_rate=0.001)
    with torch.no_grad():
        layer.router.weight *= 0.2
        layer(*make_biased_tokens(2))
        before = after_step(layer)
        for step in range(500):
            layer(*make_biased_tokens(step + 3))
            after_step(layer)
        for step in range(20):  # tokens that it has not seen
            layer(*make_biased_tokens(step + 2000))
        after = after_step(layer)
    assert before["router.load_max"] > 2
    assert before["router.load_min"] < 0.2
    assert after["router.load_max"] < 1.2
    assert after["router.load_min"] > 0.8
    x, ids = make_biased_tokens()
    routing = layer.router(x, ids, None)
    logits = x.flatten(0, 1) @ layer.router.weight.T
    scored = logits.softmax(-1) if scores == "softmax" else logits.sigmoid()
    chosen = scored.gather(1, routing.experts_NK)
    assert_close(routing.weights_NK, chosen / chosen.sum(1, keepdim=True), ROUNDING_32)


def test_balance_bias_moves_by_its_rate_towards_an_even_load():
    layer = make_layer(TokenChoice(top_k=1), count=2, balance_bias_rate=0.125)
    x, ids = make_tokens(rows=1, length=4)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[1, 0] = 1
        x[..., 0] = torch.tensor([1.0, 1.0, 1.0, -1.0])
        layer(x, ids)
    numbers = after_step(layer)
    assert layer.router.balance_bias.tolist() == [0.125, -0.125]
    assert numbers["router.load.0.1"] == numbers["router.load_max"] == 1.5
    assert numbers["router.load.0.0"] == numbers["router.load_min"] == 0.5
    assert after_step(layer) == {}
    assert layer.router.balance_bias.tolist() == [0.125, -0.125]


def test_balance_bias_is_saved_and_stays_in_fp32():
    layer = make_layer(TokenChoice(top_k=1), torch.float32, balance_bias_rate=0.001)
    layer.router.balance_bias += 1.001
    assert set(layer.state_dict()) == {
        "router.weight",
        "router.balance_bias",
        "experts.gate",
        "experts.up",
        "experts.down",
    }
    layer.bfloat16()
    assert layer.router.weight.dtype == torch.bfloat16
    assert_close(layer.router.balance_bias, torch.full((4,), 1.001), 0)
    with torch.device("meta"):
        empty = MixtureOfExperts(make_config(TokenChoice(top_k=1), balance_bias_rate=0.001))
    empty.load_state_dict(layer.state_dict(), assign=True)
    x, ids = make_tokens(dtype=torch.bfloat16)
    assert_close(empty(x, ids)[0], layer(x, ids)[0], 0)
    assert after_step(empty) == after_step(layer)


@pytest.mark.parametrize("router", ROUTERS, ids=ROUTER_IDS)
def test_rows_may_be_fed_together_or_apart(router):
    """The same outputs, losses and statistics, with padding of any length."""
    layer, apart = make_layer(router), make_layer(router)
    x, ids = make_tokens()
    real = make_padding()
    out, losses = layer(x, ids, real)
    parts = [apart(x[b : b + 1, :n], ids[b : b + 1, :n]) for b, n in enumerate((10, 7, 4))]
    for b, n in enumerate((10, 7, 4)):
        assert_close(out[b : b + 1, :n], parts[b][0])
    assert_close(losses, sum(part[1] for part in parts))
    assert after_step(layer) == pytest.approx(after_step(apart))


def test_what_is_in_the_padding_does_not_matter():
    for router in ROUTERS:
        layer, real = make_layer(router), make_padding()
        x, ids = make_tokens()
        x_other, ids_other = x.masked_fill(~real.unsqueeze(-1), torch.nan), ids.masked_fill(~real, 0)
        (out, losses), (out_other, losses_other) = layer(x, ids, real), layer(x_other, ids_other, real)
        assert_close(out[real], out_other[real], 0)
        assert_close(losses, losses_other, 0)


def test_activation_checkpointing_changes_nothing():
    router = TokenChoice(top_k=3, capacity_factor=0.5)
    plain, saving = make_layer(router), make_layer(router)
    x, ids = make_tokens()
    plain(x, ids)[0].square().sum().backward()
    checkpoint(saving, x, ids, use_reentrant=False)[0].square().sum().backward()
    for found, wanted in zip(saving.parameters(), plain.parameters(), strict=True):
        assert_close(found.grad, wanted.grad, 0)
    assert after_step(saving) == pytest.approx(after_step(plain))


def test_statistics_of_several_layers():
    config = make_config(TokenChoice(top_k=2))
    torch.manual_seed(0)
    model = nn.ModuleList([MixtureOfExperts(config), MixtureOfExperts(config)]).double()
    x, ids = make_tokens()
    loads, entropies = [], []
    for layer in model:
        for _ in range(2):  # two microbatches
            layer(x, ids)
        routing = layer.router.eval()(x, ids, None)
        loads.append(torch.bincount(routing.experts_NK.flatten(), minlength=4) / (2 * ids.numel() / 4))
        share = (x @ layer.router.weight.T).softmax(-1)
        entropies.append(-(share * share.log()).sum(-1).mean() / math.log(4))
    numbers = after_step(model)
    assert numbers["router.load_max"] == pytest.approx(max(load.max().item() for load in loads))
    assert numbers["router.load_min"] == pytest.approx(min(load.min().item() for load in loads))
    assert numbers["router.entropy"] == pytest.approx(sum(entropies).item() / 2)
    assert numbers["router.dropped_fraction"] == 0
    for layer in range(2):
        for expert in range(4):
            assert numbers[f"router.load.{layer}.{expert}"] == pytest.approx(loads[layer][expert].item())
    assert after_step(nn.Linear(2, 2)) == {}


def test_loads_of_many_experts_are_not_listed():
    layer = make_layer(TokenChoice(top_k=2), count=65)
    layer(*make_tokens())
    assert set(after_step(layer)) == {
        "router.load_max",
        "router.load_min",
        "router.entropy",
        "router.dropped_fraction",
    }


def run_rank(rank, path, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    layer = make_layer(TokenChoice(top_k=1), balance_bias_rate=0.1)
    x, ids = make_tokens(rows=4)
    rows = slice(0, 3) if rank == 0 else slice(3, 4)
    layer(x[rows], ids[rows])
    shared = after_step(layer, torch.distributed.group.WORLD), layer.router.balance_bias.tolist()
    if rank == 0:  # the other one has nothing to route, and learns of it all the same
        layer(x, ids)
    unshared = after_step(layer, torch.distributed.group.WORLD), layer.router.balance_bias.tolist()
    results[rank] = (shared, unshared)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_agree_with_one_process(tmp_path):
    alone = make_layer(TokenChoice(top_k=1), balance_bias_rate=0.1)
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(run_rank, (tmp_path / "meet", results), nprocs=2)
        assert results[0] == results[1]
        for numbers, biases in results[0]:
            alone(*make_tokens(rows=4))
            assert numbers == pytest.approx(after_step(alone))
            assert biases == alone.router.balance_bias.tolist()


def hand_over(theirs, ours):
    with torch.no_grad():
        for weight in theirs.parameters():
            nn.init.normal_(weight, std=0.3)
        ours.router.weight.copy_(theirs.gate.weight)
        gate, up = theirs.experts.gate_up_proj.chunk(2, dim=1)
        ours.experts.gate.copy_(gate)
        ours.experts.up.copy_(up)
        ours.experts.down.copy_(theirs.experts.down_proj)


def mixtral():
    settings = MixtralConfig(
        hidden_size=D_MODEL, intermediate_size=WIDTH, num_local_experts=4, num_experts_per_tok=2, num_attention_heads=2
    )
    return MixtralSparseMoeBlock(settings), TokenChoice(top_k=2)


def qwen3(renormalize):
    settings = Qwen3MoeConfig(
        hidden_size=D_MODEL,
        moe_intermediate_size=WIDTH,
        num_experts=4,
        num_experts_per_tok=3,
        norm_topk_prob=renormalize,
        num_attention_heads=2,
    )
    return Qwen3MoeSparseMoeBlock(settings), TokenChoice(top_k=3, renormalize=renormalize)


@pytest.mark.parametrize(
    "make", [mixtral, lambda: qwen3(True), lambda: qwen3(False)], ids=["mixtral", "qwen3", "qwen3_not_renormalized"]
)
def test_parity_with_transformers(make):
    torch.manual_seed(0)
    theirs, router = make()
    ours = make_layer(router, torch.float32)
    hand_over(theirs, ours)
    x, ids = make_tokens(dtype=torch.float32)
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, wanted = ours(x_ours, ids)[0], theirs(x_theirs)
    assert_close(out, wanted, ROUNDING_32)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weight).sum().backward()
    (wanted * weight).sum().backward()
    gradients = [
        (x_ours.grad, x_theirs.grad),
        (ours.router.weight.grad, theirs.gate.weight.grad),
        (torch.cat([ours.experts.gate.grad, ours.experts.up.grad], 1), theirs.experts.gate_up_proj.grad),
        (ours.experts.down.grad, theirs.experts.down_proj.grad),
    ]
    for found, wanted in gradients:
        assert_close(found, wanted, ROUNDING_32 * max(1.0, wanted.abs().max().item()))


@pytest.mark.skipif(not hasattr(nn.functional, "grouped_mm"), reason="this torch has no grouped product")
def test_grouped_product_is_the_loop(monkeypatch):
    """What an accelerator uses; here on the CPU, where the kernel has another implementation."""
    layer = make_layer(TokenChoice(top_k=2, capacity_factor=0.75), torch.float32)
    x, ids = make_tokens(dtype=torch.float32)

    def run():
        layer.zero_grad()
        out, losses = layer(x, ids)
        (out.square().sum() + losses.sum()).backward()
        return [out, *(p.grad.clone() for p in layer.parameters())]

    loop = run()
    monkeypatch.setattr(moe, "_can_group", lambda x, weight: True)
    for found, wanted in zip(run(), loop, strict=True):
        assert_close(found, wanted, ROUNDING_32 * max(1.0, wanted.abs().max().item()))
