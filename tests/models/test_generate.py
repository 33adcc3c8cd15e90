import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.models.config import Decoder
from pipeline.models.generate import generate, sample
from pipeline.models.layers import Cache
from pipeline.models.transformer import Transformer, init_weights

SMALL = {"vocab_size": 50, "d_model": 16, "num_layers": 2, "num_heads": 4, "max_seq_len": 24}
VARIANTS = [
    {"num_kv_heads": 2},
    {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "bias": True, "dropout": 0.5},
]
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]
# Logits are sums of 16 products of size one at most, added in another order.
ROUNDING = 1e-5


def make(**changes):
    model = Transformer(Decoder(**(SMALL | changes)))
    init_weights(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(20)  # first weights give nearly equal logits, and nothing to tell apart
    return model.eval()


@torch.no_grad()
def greedy(model, prompt, max_new_tokens):
    """Without cache, batch or padding."""
    ids = list(prompt)
    for _ in range(max_new_tokens):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(prompt) :]


@pytest.mark.parametrize("changes", VARIANTS)
@torch.no_grad()
def test_logits_with_cache_and_padding_are_those_without(changes):
    model = make(**changes)
    padding = torch.tensor([0, 3])
    ids = torch.randint(50, (2, 10), generator=torch.Generator().manual_seed(0))
    cache = Cache(model.config, 10, padding)
    found = torch.cat([model(part, cache=cache) for part in ids.split([5, 1, 4], dim=1)], dim=1)
    torch.testing.assert_close(found[:1], model(ids[:1]), rtol=0, atol=ROUNDING)
    torch.testing.assert_close(found[1:, 3:], model(ids[1:, 3:]), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("changes", VARIANTS)
def test_a_batch_gives_what_each_prompt_gives_alone(changes):
    model = make(**changes)
    assert generate(model, PROMPTS, 8) == [greedy(model, prompt, 8) for prompt in PROMPTS]


def test_what_is_drawn_depends_on_seed_and_row_alone():
    model = make()
    draw = {"max_new_tokens": 8, "temperature": 1.0, "seed": 5}
    together = generate(model, PROMPTS, **draw)
    assert together == generate(model, PROMPTS, **draw)
    assert together[2:] == generate(model, PROMPTS[2:], **draw, first_row=2)
    assert together != generate(model, PROMPTS, **(draw | {"seed": 6}))
    same_prompt = generate(model, [[1], [1]], **draw)
    assert same_prompt[0] != same_prompt[1]


@pytest.mark.parametrize("temperature", [1e-300, 1e-42, 1e-37, 1e-30, 1e-9])
@pytest.mark.parametrize("limits", [{}, {"top_k": 5}, {"top_p": 0.9}])
def test_the_lowest_temperatures_take_the_likeliest_id(temperature, limits):
    model = make()
    assert generate(model, PROMPTS, 8, temperature=temperature, **limits) == generate(model, PROMPTS, 8)


def test_a_row_ends_where_the_context_ends():
    model = make()
    prompts = [[1] * 23, [2] * 3, [3] * 20]
    made = generate(model, prompts, 100)
    assert [len(ids) for ids in made] == [1, 21, 4]
    assert made == [greedy(model, prompt, len(ids)) for prompt, ids in zip(prompts, made, strict=True)]


def test_a_row_ends_before_the_stop_id():
    model = make()
    free = generate(model, PROMPTS, 8)
    stop = free[0][3]
    stopped = generate(model, PROMPTS, 8, stop_id=stop)
    for row, ids in enumerate(free):
        assert stopped[row] == (ids[: ids.index(stop)] if stop in ids else ids)


def test_dropout_is_off_only_while_generating():
    model = make(dropout=0.5).train()
    assert generate(model, PROMPTS, 4) == generate(model, PROMPTS, 4)
    assert model.training
    assert generate(model, [], 4) == []


def test_samples_have_the_probabilities_of_the_logits():
    probabilities = torch.tensor([0.1, 0.5, 0.15, 0.25])
    points = (torch.arange(1000) + 0.5) / 1000
    drawn = sample(probabilities.log().expand(1000, 4), points)
    assert torch.bincount(drawn, minlength=4).tolist() == [100, 500, 150, 250]


@pytest.mark.parametrize(
    ("top_k", "top_p", "possible"),
    [
        (1, None, {1}),
        (2, None, {1, 3}),
        (None, 0.49, {1}),
        (None, 0.52, {1, 3}),
        (None, 1.0, {0, 1, 2, 3}),
        (3, 0.9, {1, 2, 3}),
    ],
)
def test_only_the_likeliest_can_be_drawn(top_k, top_p, possible):
    logits = torch.tensor([0.125, 0.5, 0.125, 0.25]).log()
    logits[2] += 1e-3
    points = torch.cat([(torch.arange(200) + 0.5) / 200, torch.tensor([0.0, 1.0])])  # 1.0 by rounding
    assert set(sample(logits.expand(202, 4), points, top_k, top_p).tolist()) == possible


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": [[1], []]}, "prompts.1: empty; begin with at least one id"),
        ({"prompts": [[1] * 24]}, "prompts.0: 24 ids leave no room in the model's 24 positions; shorten it"),
        ({"max_new_tokens": 0}, "max_new_tokens: wanted at least 1, found 0"),
        ({"temperature": 0.0}, "temperature: wanted more than 0 and finite, or null for the likeliest id, found 0.0"),
        ({"temperature": float("nan")}, "temperature: wanted more than 0 and finite, or null .*, found nan"),
        ({"temperature": float("inf")}, "temperature: wanted more than 0 and finite, or null .*, found inf"),
        (
            {"temperature": None, "top_k": 3},
            "temperature: null takes the likeliest id, so top_k and top_p must be null",
        ),
        ({"top_k": 0}, "top_k: wanted at least 1, or null for no limit, found 0"),
        ({"top_p": 1.5}, "top_p: wanted more than 0 and at most 1, or null for no limit, found 1.5"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        generate(make(), **({"prompts": PROMPTS, "max_new_tokens": 2, "temperature": 1.0} | settings))
