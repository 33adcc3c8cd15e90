"""Span corruption and UL2's denoisers: T5's example and lengths, and that nothing of a text is lost."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from objective_cases import END, ids_for, make_ids, make_row, objective_of, random_documents

from pipeline.errors import ConfigError
from pipeline.models.config import Decoder, EncoderDecoder
from pipeline.training.objectives.denoisers import UL2
from pipeline.training.objectives.draws import Draws
from pipeline.training.objectives.spans import count_spans, draw_spans, encode_decode, keep_inside, take_out

SENTINELS = range(1, 101)


def unite(inputs, targets, sentinels=SENTINELS):
    """Put what was taken out of a text back in the place of its sentinels."""
    spans, text = {}, []
    for token in targets:
        if token in sentinels:
            spans[token] = []
        else:
            spans[list(spans)[-1]].append(token)
    for token in inputs:
        text += spans.pop(token) if token in sentinels else [token]
    assert not spans
    return text


def used(example, name, documents):
    return example[name][example[documents] >= 0].tolist()


# T5


def test_t5s_figure():
    """Raffel et al. 2020, figure 2."""
    words = ["Thank", "you", "for", "inviting", "me", "to", "your", "party", "last", "week"]
    text, x, y = np.arange(10, 20), 1, 2
    inputs, inputs_of, targets, targets_of = take_out(text, np.zeros(10, np.int32), [(2, 4), (8, 9)], [x, y])
    names = {x: "<X>", y: "<Y>", **dict(zip(range(10, 20), words, strict=True))}
    assert " ".join(names[token] for token in inputs) == "Thank you <X> me to your party <Y> week"
    assert " ".join(names[token] for token in targets) == "<X> for inviting <Y> last"
    example = encode_decode(inputs, inputs_of, targets, targets_of, (10, 6), make_ids(["x", "y"], 30))
    assert example["decoder_ids"].tolist() == [END, *targets[:-1].tolist(), END]
    assert example["labels"].tolist() == [*targets.tolist(), -100]
    assert example["documents"].tolist() == [0] * 9 + [-1]
    assert example["decoder_documents"].tolist() == [0] * 5 + [-1]


def test_t5s_lengths():
    """Those of the published T5: 568 tokens make 512 inputs and 114 targets."""
    objective = objective_of("span_corruption")
    assert (objective.row_tokens(512), objective.target_len(512)) == (568, 114)
    assert objective.special_tokens()[:2] == ["<extra_id_0>", "<extra_id_1>"]
    assert count_spans(568, 0.15, 3.0) == (85, 28)
    assert count_spans(1, 0.15, 3.0) == (0, 0)
    assert count_spans(2, 0.15, 3.0) == (1, 1)


@pytest.mark.parametrize("density", [0.15, 0.3, 0.5])
@pytest.mark.parametrize("mean_span", [2.0, 3.0, 8.0])
def test_inputs_fill_the_encoder_and_targets_the_decoder(density, mean_span):
    objective = objective_of("span_corruption", noise_density=density, mean_span=mean_span, num_sentinels=200)
    for seq_len in (8, 31, 64, 100):
        row = make_row(range(300, 300 + objective.row_tokens(seq_len)))
        example = objective.make(row, seq_len, seq_len, ids_for(objective))
        assert example["ids"].shape == example["documents"].shape == (seq_len,)
        assert example["ids"][-1] == END
        assert (example["documents"] == 0).all()
        assert (example["labels"] != -100).all()
        assert len(example["labels"]) == len(example["decoder_ids"]) == objective.target_len(seq_len)
        assert example["decoder_ids"].tolist() == [END, *example["labels"][:-1].tolist()]


def test_spans_are_the_share_and_the_length_that_were_asked_for():
    sizes, firsts = [], []
    for seed in range(300):
        spans = draw_spans(568, 0.15, 3.0, Draws(seed))
        sizes += [stop - start for start, stop in spans]
        firsts.append(spans[0][0])
        assert len(spans) == 28
        assert sum(stop - start for start, stop in spans) == 85
        assert all(a[1] < b[0] for a, b in pairwise(spans))
        assert spans[-1][1] == 568  # as in T5 a text begins with what stays and ends with what does not
    assert np.mean(sizes) == pytest.approx(85 / 28)
    assert np.mean(np.array(sizes) == 1) == pytest.approx(27 / 84, abs=0.02)  # of 84 places 27 are cuts
    assert np.mean(firsts) == pytest.approx(483 / 28, abs=4)


def test_no_token_is_lost_and_no_span_leaves_its_document():
    rng = np.random.default_rng(2)
    objective = objective_of("span_corruption")
    ids, merged, total = ids_for(objective, 5000), 0, 0
    for seed in range(300):
        documents = random_documents(rng, 200, int(rng.integers(1, 9)), 60)
        tokens = [token for document in documents for token in document]
        length = objective.row_tokens(64)
        row = make_row(*documents) if len(tokens) >= length else make_row(*documents, length=length)
        row = type(row)(*(array[:length] for array in (row.tokens, row.inputs, row.documents)))
        tokens = tokens[:length]
        example = objective.make(row, seed, 64, ids)
        inputs, targets = used(example, "ids", "documents"), used(example, "labels", "decoder_documents")
        assert inputs[-1] == END
        if not targets:
            assert inputs[:-1] == tokens
            continue
        assert targets[-1] == END
        assert unite(inputs[:-1], targets[:-1]) == tokens
        # a sentinel is of the same document on both sides, and the decoder reads no other document's tokens
        left = dict(zip(inputs, used(example, "documents", "documents"), strict=True))
        numbers = used(example, "decoder_documents", "decoder_documents")
        for place, (token, number) in enumerate(zip(targets, numbers, strict=True)):
            if token in SENTINELS:
                assert left[token] == number
            begins = place == 0 or number != numbers[place - 1]
            assert example["decoder_ids"][place] == (END if begins else targets[place - 1])
        merged += len(set(row.documents[: len(tokens)].tolist())) - len(set(left.values()))
        total += len(set(row.documents[: len(tokens)].tolist()))
    assert merged < 0.1 * total


def test_a_span_over_the_end_of_a_document_is_moved_aside():
    documents = np.array([0] * 6 + [1] * 6)
    assert keep_inside([(4, 7)], documents)[0] == [(3, 6)]  # by one to the left
    assert keep_inside([(5, 8)], documents)[0] == [(6, 9)]  # by one to the right
    assert keep_inside([(1, 3), (5, 8)], documents)[0] == [(1, 3), (6, 9)]
    assert keep_inside([(2, 4), (5, 7)], documents)[0] == [(2, 4), (6, 8)]
    spans, joined = keep_inside([(1, 4), (5, 8), (9, 12)], documents)  # no room on either side
    assert spans == [(1, 4), (5, 8), (9, 12)]
    assert joined.tolist() == [0] * 12
    many = np.array([0] * 4 + [1] + [2] * 4)
    assert keep_inside([(3, 6)], many)[0] == [(1, 4)]


@pytest.mark.parametrize("length", [0, 1, 2, 3])
def test_rows_with_little_text(length):
    objective = objective_of("span_corruption")
    row = make_row(range(200, 200 + length), length=objective.row_tokens(16))
    example = objective.make(row, 1, 16, ids_for(objective))
    inputs, targets = used(example, "ids", "documents"), used(example, "labels", "decoder_documents")
    if length < 2:
        assert (inputs, targets) == ([*range(200, 200 + length), END], [])
    else:
        assert unite(inputs[:-1], targets[:-1]) == list(range(200, 200 + length))


def test_models_and_settings_that_do_not_fit_are_refused():
    objective, model = objective_of("span_corruption", num_sentinels=27), EncoderDecoder(max_seq_len=512)
    assert list(objective.check(model, 256)) == []
    assert list(objective.check(model, 512)) == [
        ("objective.num_sentinels", "a row of 512 inputs has 28 spans, found 27")
    ]
    heavy = objective_of("span_corruption", noise_density=0.8, mean_span=20.0)
    assert list(heavy.check(model, 512)) == [
        (
            "objective.noise_density",
            f"rows of 512 inputs have {heavy.target_len(512)} targets, more than the model's max_seq_len of 512",
        )
    ]
    assert [name for name, _ in objective.check(Decoder(), 256)] == ["objective.kind"]
    for settings, message in (
        ({"noise_density": 1.0}, "objective.noise_density: wanted less than or equal to 0.95"),
        ({"mean_span": 0.5}, "objective.mean_span: wanted greater than or equal to 1"),
        ({"sentinel": "<extra_id>"}, "objective.sentinel: "),
    ):
        with pytest.raises(ConfigError) as error:
            objective_of("span_corruption", **settings)
        assert message in str(error.value)


# UL2

MODES = {1: "[NLU]", 2: "[S2S]", 3: "[NLG]"}
AFTER_MODES = range(4, 4 + 256)


def test_each_denoiser_of_ul2_has_its_share_and_its_mode():
    objective = objective_of("denoisers")
    ids, length = ids_for(objective, 5000), objective.row_tokens(256)
    row, found = make_row(range(1000, 1000 + length)), []
    for seed in range(1400):
        example = objective.make(row, seed, 256, ids)
        assert len(example["ids"]) == 256
        inputs, targets = used(example, "ids", "documents"), used(example, "labels", "decoder_documents")
        assert inputs[-1] == targets[-1] == END
        mode, kept, taken = MODES[inputs[0]], inputs[1:-1], targets[:-1]
        if mode == "[S2S]":
            text, spans = kept + taken, 1
            assert not set(text) & set(AFTER_MODES)
        else:
            text, spans = unite(kept, taken, AFTER_MODES), len(set(kept) & set(AFTER_MODES))
        assert text == row.tokens.tolist()
        noise = length - (len(kept) - (0 if mode == "[S2S]" else spans))
        found.append((mode, noise, spans))
    wanted = [(each.mode, *count_spans(length, each.noise_density, each.mean_span)) for each in UL2]
    assert len(set(wanted)) == 7
    # four deviations of 1400 draws of a seventh are 52
    assert [found.count(each) for each in wanted] == pytest.approx([200] * 7, abs=52)


def test_the_gentlest_denoiser_fills_the_encoder_and_the_strongest_the_decoder():
    objective = objective_of("denoisers")
    length = objective.row_tokens(512)
    counts = [each.count(length) for each in UL2]
    assert max(inputs for inputs, _ in counts) == 512
    assert max(targets for _, targets in counts) == objective.target_len(512)
    assert list(objective.check(EncoderDecoder(max_seq_len=512), 512)) == []
    assert list(objective.check(EncoderDecoder(max_seq_len=300), 300)) == []
    assert [name for name, _ in objective.check(Decoder(), 512)] == ["objective.kind"]


def test_a_decoder_reads_the_inputs_as_a_prefix_and_predicts_the_targets():
    objective = objective_of("denoisers", decoder_only=True)
    assert objective.families == {"decoder"}
    ids, length = ids_for(objective, 5000), objective.row_tokens(256)
    both = objective_of("denoisers")
    for seed in range(100):
        row = make_row(range(1000, 1000 + length), length=length)
        example = objective.make(row, seed, 256, ids)
        assert {array.shape for array in example.values()} == {(256,)}
        pair = both.make(row, seed, 256, ids)
        inputs, targets = used(pair, "ids", "documents"), used(pair, "labels", "decoder_documents")
        filled = len(inputs) + len(targets)
        assert filled <= 256
        assert example["ids"][:filled].tolist() == [END, *inputs, *targets[:-1]]
        assert example["labels"].tolist() == [-100] * len(inputs) + targets + [-100] * (256 - filled)
        assert example["prefix"].tolist() == [True] * (len(inputs) + 1) + [False] * (255 - len(inputs))
        assert example["documents"].tolist() == [0] * filled + [-1] * (256 - filled)
    counts = [sum(each.count(length)) for each in UL2]
    assert max(counts) in range(254, 257)  # one more token may make two more sentinels


def test_denoisers_of_ones_own():
    objective = objective_of(
        "denoisers",
        denoisers=[{"noise_density": 0.5, "weight": 1.0}, {"noise_density": 0.2, "mean_span": 2.0, "weight": 3.0}],
        num_sentinels=9,
    )
    assert objective.special_tokens() == [f"<extra_id_{number}>" for number in range(9)]
    row = make_row(range(300, 300 + objective.row_tokens(64)))
    found = [len(used(objective.make(row, seed, 64, ids_for(objective)), "ids", "documents")) for seed in range(400)]
    assert np.mean(np.array(found) == 64) == pytest.approx(0.75, abs=0.09)
    assert [name for name, _ in objective.check(EncoderDecoder(), 500)] == ["objective.num_sentinels"]
    short = make_row([300], length=objective.row_tokens(64))
    example = objective.make(short, 1, 64, ids_for(objective))
    assert (used(example, "ids", "documents"), used(example, "labels", "decoder_documents")) == ([300, END], [])
    with pytest.raises(ConfigError, match="objective.denoisers: "):
        objective_of("denoisers", denoisers=[])
    with pytest.raises(ConfigError, match=r"objective.denoisers.0.noise_density: missing"):
        objective_of("denoisers", denoisers=[{}])


def test_the_decoder_of_a_model_of_others_starts_as_it_did():
    objective = objective_of("span_corruption")
    ids, row = ids_for(objective), make_row([500 + n for n in range(objective.row_tokens(32))])
    ours = objective.make(row, 1, 32, ids)
    theirs = objective.make(row, 1, 32, replace(ids, decoder_start=7))
    assert (ours["decoder_ids"][0], theirs["decoder_ids"][0]) == (END, 7)
    assert (ours["decoder_ids"][1:] == theirs["decoder_ids"][1:]).all()
    assert (ours["labels"] == theirs["labels"]).all()
