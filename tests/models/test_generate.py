"""Whatever the family, the batch, the padding and the cache: the same tokens."""

import itertools

import pytest
import torch
from model_variants import DECODERS, ENCODER_DECODERS, MAX_SEQ_LEN, VOCAB_SIZE, make

from pipeline.errors import ArtifactError, ConfigError
from pipeline.models.generation.sampling import Repetition, sample
from pipeline.models.generation.settings import BeamSearch, FillMask, Greedy, Sample, check_decoding
from pipeline.models.generation.text import Text
from pipeline.models.generation.writing import generate
from pipeline.settings import decode

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]
START, END = 0, 7
FREE = Sample(temperature=1.0, top_p=None)
DECODINGS = {
    "greedy": Greedy(),
    "repetition": Greedy(repetition_penalty=1.5),
    "sample": Sample(temperature=1.0, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.2),
    "beam": BeamSearch(num_beams=3, repetition_penalty=1.2),
}


def run(model, prompts=PROMPTS, decoding=None, new=8, **settings):
    return generate(model, prompts, decoding, max_new_tokens=new, start_id=START, **settings)


@torch.no_grad()
def naive(model, prompt, count):
    """The likeliest ids, without cache, batch or padding."""
    answers = model.config.kind == "encoder_decoder"
    made = [START] if answers else list(prompt)
    for _ in range(count):
        read = torch.tensor([made])
        logits = model(torch.tensor([prompt]), decoder_ids=read) if answers else model(read)
        made.append(logits[0, -1].argmax().item())
    return made[-count:]


@pytest.mark.parametrize("name", [*DECODERS, *ENCODER_DECODERS])
def test_greedy_is_the_likeliest_id_after_all_before(name):
    model = make(name)
    assert run(model) == [naive(model, prompt, 8) for prompt in PROMPTS]


@pytest.mark.parametrize("decoding", DECODINGS.values(), ids=DECODINGS)
@pytest.mark.parametrize("name", [*DECODERS, *ENCODER_DECODERS])
def test_neither_the_cache_nor_other_prompts_change_a_row(name, decoding):
    model = make(name)
    made = run(model, decoding=decoding, end_id=END)
    assert made == run(model, decoding=decoding, end_id=END, cached=False)
    alone = [run(model, [prompt], decoding, end_id=END, first_row=row)[0] for row, prompt in enumerate(PROMPTS)]
    assert made == alone


@pytest.mark.parametrize("name", ["llama", "gpt2", "window"])
def test_a_prompt_that_is_seen_whole_is_a_prefix(name):
    model = make(name)
    made = run(model, sees_prompt=True)
    assert made == run(model, sees_prompt=True, cached=False)
    assert made != run(model)
    for prompt, ids in zip(PROMPTS, made, strict=True):
        row = list(prompt)
        for new_id in ids:
            prefix = torch.arange(len(row)) < len(prompt)
            with torch.no_grad():
                assert model(torch.tensor([row]), prefix=prefix[None])[0, -1].argmax().item() == new_id
            row.append(new_id)


def test_what_is_drawn_depends_on_seed_and_row_alone():
    model = make()
    together = run(model, decoding=FREE, seed=5)
    assert together == run(model, decoding=FREE, seed=5)
    assert together[2:] == run(model, PROMPTS[2:], FREE, seed=5, first_row=2)
    assert together != run(model, decoding=FREE, seed=6)
    same_prompt = run(model, [[1], [1]], FREE, seed=5)
    assert same_prompt[0] != same_prompt[1]


@pytest.mark.parametrize("temperature", [1e-300, 1e-42, 1e-37, 1e-30, 1e-9])
@pytest.mark.parametrize("limits", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_the_lowest_temperatures_take_the_likeliest_id(temperature, limits):
    model = make()
    settings = Sample(**({"temperature": temperature, "top_p": None} | limits))
    assert run(model, decoding=settings) == run(model)


@pytest.mark.parametrize("cached", [True, False])
def test_a_row_ends_where_the_context_ends(cached):
    model = make()
    prompts = [[1] * (MAX_SEQ_LEN - 1), [2] * 3, [3] * (MAX_SEQ_LEN - 4)]
    made = run(model, prompts, new=100, cached=cached)
    assert [len(ids) for ids in made] == [1, MAX_SEQ_LEN - 3, 4]
    assert made == [naive(model, prompt, len(ids)) for prompt, ids in zip(prompts, made, strict=True)]
    answers = run(make("t5"), [[1] * MAX_SEQ_LEN, [2]], new=100, cached=cached)
    assert [len(ids) for ids in answers] == [MAX_SEQ_LEN - 1] * 2


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_row_ends_before_the_id_that_ends_a_text(name):
    model = make(name)
    free = run(model, decoding=FREE)
    for end in {ids[3] for ids in free}:
        ended = [ids[: ids.index(end)] if end in ids else ids for ids in free]
        assert run(model, decoding=FREE, end_id=end) == ended


def test_a_row_ends_with_its_stop_string_and_others_go_on():
    model = make()
    free = run(model, new=12)
    stop = f"{free[1][4]},"
    texts = [Text(lambda ids: "".join(f"{i}," for i in ids), [stop]) for _ in PROMPTS]
    made = run(model, new=12, texts=texts)
    for text, ids, all_ids in zip(texts, made, free, strict=True):
        whole = "".join(f"{i}," for i in all_ids)
        assert text.text == whole.partition(stop)[0]
        assert text.closed
        assert ids == all_ids[: len(ids)]
    assert len(made[1]) <= 5


def test_dropout_is_off_only_while_generating():
    model = make(dropout=0.5).train()
    assert run(model) == run(model)
    assert model.training
    assert run(model, []) == []


def test_samples_have_the_probabilities_of_the_logits():
    probabilities = torch.tensor([0.1, 0.5, 0.15, 0.25])
    points = (torch.arange(1000) + 0.5) / 1000
    drawn = sample(probabilities.log().expand(1000, 4), points)
    assert torch.bincount(drawn, minlength=4).tolist() == [100, 500, 150, 250]


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "possible"),
    [
        (1, None, None, {1}),
        (2, None, None, {1, 3}),
        (None, 0.49, None, {1}),
        (None, 0.52, None, {1, 3}),
        (None, 1.0, None, {0, 1, 2, 3}),
        (3, 0.9, None, {1, 2, 3}),
        (None, None, 1.0, {1}),
        (None, None, 0.49, {1, 3}),
        (None, None, 0.24, {0, 1, 2, 3}),
        (None, 0.52, 0.24, {1, 3}),
    ],
)
def test_only_the_likeliest_can_be_drawn(top_k, top_p, min_p, possible):
    logits = torch.tensor([0.125, 0.5, 0.125, 0.25]).log()
    logits[2] += 1e-3
    points = torch.cat([(torch.arange(200) + 0.5) / 200, torch.tensor([0.0, 1.0])])  # 1.0 by rounding
    assert set(sample(logits.expand(202, 4), points, top_k, top_p, min_p).tolist()) == possible


def test_the_likeliest_is_never_left_out():
    assert sample(torch.tensor([[0.0, 1.0]]), torch.tensor([0.5]), top_p=1e-46).tolist() == [1]


def test_a_model_that_says_no_numbers_is_refused():
    model = make()
    with torch.no_grad():
        model.decoder.norm.weight.fill_(float("nan"))
    with pytest.raises(ArtifactError, match="the model's logits are not numbers"):
        run(model)


def test_repetition_makes_what_is_there_less_likely_but_for_the_end():
    repetition = Repetition(2.0, [[0, 1], [4, 4]], vocab_size=5, spared=4)
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0, 2.0]] * 2)
    assert repetition.apply(logits).tolist() == [[1.0, -4.0, 2.0, -2.0, 2.0], [2.0, -2.0, 2.0, -2.0, 2.0]]
    repetition.add([2, 3])
    repetition.select([1, 0, 0])
    assert repetition.apply(logits[[0, 0, 0]]).tolist() == [
        [2.0, -2.0, 2.0, -4.0, 2.0],
        [1.0, -4.0, 1.0, -2.0, 2.0],
        [1.0, -4.0, 1.0, -2.0, 2.0],
    ]


@torch.no_grad()
def total_logp(model, prompt, ids):
    """The logarithm of the probability that `ids` follow a decoder's prompt."""
    logp = model(torch.tensor([[*prompt, *ids]])).log_softmax(-1)[0]
    return sum(logp[len(prompt) - 1 + place, new_id].item() for place, new_id in enumerate(ids))


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 3.0])
def test_a_wide_beam_finds_the_best_of_all_texts(length_penalty):
    model = make(vocab_size=4, vocab_multiple=1)
    end, room = 3, 3
    texts = [ids for size in range(room) for ids in itertools.product(range(3), repeat=size)]
    whole = [(*ids, end) for ids in texts] + list(itertools.product(range(3), repeat=room))
    best = max(whole, key=lambda ids: total_logp(model, [1, 2], ids) / len(ids) ** length_penalty)
    found = run(model, [[1, 2]], BeamSearch(num_beams=64, length_penalty=length_penalty), new=room, end_id=end)
    assert found == [[i for i in best if i != end]]


def test_a_beam_search_ends_at_stop_strings_too():
    model, settings = make("t5"), BeamSearch(num_beams=3)
    free = run(model, decoding=settings)

    def spell(ids):
        return "".join(f"{i}," for i in ids)

    stops = [f"{i}," for i in free[0]]
    texts = [Text(spell, stops) for _ in PROMPTS]
    made = run(model, decoding=settings, texts=texts)
    for text, ids in zip(texts, made, strict=True):
        assert text.closed
        assert not any(stop in text.text for stop in stops)
        assert text.text == spell(ids if len(ids) == 8 and not text.stopped else ids[:-1])


def problems(decoding, name="llama", **changes):
    return list(check_decoding(decoding, make(name, **changes).config))


def test_a_family_cannot_do_everything():
    assert not problems(Greedy())
    assert not problems(BeamSearch(), "t5")
    assert not problems(FillMask(), "bert")
    assert problems(Sample(), "bert")[0][1].startswith("'sample' continues texts, and an encoder reads whole ones")
    assert problems(FillMask(), "t5") == [
        (
            "decoding.kind",
            "'fill_mask' needs a model of kind 'encoder', found 'encoder_decoder'; wanted 'greedy', 'sample' or 'beam'",
        )
    ]
    many = VOCAB_SIZE + 1
    assert problems(FillMask(candidates=many), "bert") == [
        ("decoding.candidates", f"{many} is more than the model's vocabulary of {VOCAB_SIZE}")
    ]


def test_all_that_cannot_be_read_is_told_at_once():
    with pytest.raises(ConfigError) as error:
        run(make(), [[1], [], [1] * MAX_SEQ_LEN])
    assert error.value.problems == (
        "prompt.1: empty; begin with at least one id, such as the one that ends documents",
        f"prompt.2: {MAX_SEQ_LEN} ids leave no room in the model's {MAX_SEQ_LEN} positions; shorten it",
    )
    with pytest.raises(ConfigError, match=rf"prompt.0: {MAX_SEQ_LEN + 1} ids are more than the model's {MAX_SEQ_LEN}"):
        run(make("t5"), [[1] * (MAX_SEQ_LEN + 1)])
    with pytest.raises(ConfigError, match="an encoder reads whole ones"):
        run(make("bert"))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (Sample, {"temperature": 0.0}, "temperature: wanted greater than 0"),
        (Sample, {"temperature": float("inf")}, "temperature: wanted a finite number"),
        (Sample, {"top_k": 0}, "top_k: wanted greater than or equal to 1"),
        (Sample, {"top_p": 1.5}, "top_p: wanted less than or equal to 1"),
        (Sample, {"min_p": 0.0}, "min_p: wanted greater than 0"),
        (Sample, {"repetition_penalty": 0}, "repetition_penalty: wanted greater than or equal to 0.01"),
        (Greedy, {"top_k": 3}, "top_k: no such setting"),
        (BeamSearch, {"num_beams": 1}, "num_beams: wanted greater than or equal to 2"),
        (FillMask, {"candidates": 0}, "candidates: wanted greater than or equal to 1"),
    ],
)
def test_settings_out_of_range_are_refused(kind, settings, message):
    with pytest.raises(ConfigError, match=message):
        decode(kind, settings)
