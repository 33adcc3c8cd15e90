"""Masked language modelling: what is chosen, what stands in its place, and how often."""

import numpy as np
import pytest
from objective_cases import END, ids_for, make_row, objective_of

from pipeline.errors import ConfigError
from pipeline.training.objectives.draws import Draws
from pipeline.training.objectives.masks import UNMASKED, choose, find_words, span_lengths

MASK, FIRST = 1, 2
ORDINARY = 1000
BASE = 3  # of the ordinary ids, behind the end of text and two special ones


def masked(**settings):
    objective = objective_of("masked", first_token="[CLS]", **settings)
    return objective, ids_for(objective, ORDINARY)


def plain_row(size):
    return make_row([BASE + n for n in range(size)])


def test_berts_figure():
    """Devlin et al. 2019, appendix A.1: "my dog is hairy", with one of its words hidden."""
    my, dog, is_, hairy = range(BASE, BASE + 4)
    objective, ids = masked()
    seen = set()
    for seed in range(500):
        example = objective.make(make_row([my, dog, is_, hairy, END]), seed, 6, ids)
        assert example["documents"].tolist() == [0] * 6
        (place,) = np.flatnonzero(example["labels"] != -100)  # 15 % of four words, at least one
        original = [FIRST, my, dog, is_, hairy, END]
        assert example["labels"][place] == original[place]
        assert np.delete(example["ids"], place).tolist() == original[:place] + original[place + 1 :]
        seen.add((int(place), int(example["ids"][place])))
    assert {place for place, _ in seen} == {1, 2, 3, 4}  # never [CLS], never the end of text
    assert {(4, MASK), (4, hairy)} <= seen  # my dog is [MASK]; my dog is hairy
    assert any(token not in (MASK, hairy) for place, token in seen if place == 4)  # my dog is apple


@pytest.mark.parametrize("unit", ["token", "whole_word", "span"])
def test_fifteen_percent_of_which_eighty_ten_and_ten(unit):
    objective, ids = masked(unit=unit)
    chosen = kept = hidden = other = 0
    for seed in range(400):
        row = plain_row(200)
        example = objective.make(row, seed, 201, ids)
        places = np.flatnonzero(example["labels"] != -100)
        assert len(places) == 30  # every word is one token here, so the share is exact
        assert (example["labels"][places] == row.tokens[places - 1]).all()
        unchosen = np.setdiff1d(np.arange(1, 201), places)
        assert (example["ids"][unchosen] == row.tokens[unchosen - 1]).all()
        found = example["ids"][places]
        chosen += len(places)
        hidden += np.count_nonzero(found == MASK)
        kept += np.count_nonzero(found == row.tokens[places - 1])
        other += np.count_nonzero((found != MASK) & (found != row.tokens[places - 1]))
        assert not ids.special[found[found != MASK]].any()
    # 12,000 draws: four deviations of a share of 0.1 are 0.011; spans draw once for 3.8 words, so twice as much
    tolerance = 0.011 if unit != "span" else 0.025
    assert hidden / chosen == pytest.approx(0.8, abs=1.5 * tolerance)
    assert kept / chosen == pytest.approx(0.1 + 0.1 / ORDINARY, abs=tolerance)
    assert other / chosen == pytest.approx(0.1 - 0.1 / ORDINARY, abs=tolerance)


def test_every_token_is_as_likely_as_any_other():
    objective, ids = masked()
    counts = np.zeros(50)
    for seed in range(4000):
        counts += objective.make(plain_row(50), seed, 51, ids)["labels"][1:] != -100
    # round(7.5) is 8 of 50; four deviations of 4000 draws at 0.16 are 0.023
    assert counts / 4000 == pytest.approx(np.full(50, 0.16), abs=0.025)


def test_random_tokens_come_from_the_whole_ordinary_vocabulary():
    objective, _ = masked(mask_share=0.0, random_share=1.0, rate=0.9)
    ids = ids_for(objective, 7)
    found = np.concatenate([objective.make(plain_row(7), seed, 8, ids)["ids"][1:] for seed in range(200)])
    counts = np.bincount(found, minlength=10)
    assert counts[:BASE].tolist() == [0, 0, 0]
    assert counts[BASE:].min() > 0.8 * counts[BASE:].mean()


# Words: of the ids from BASE on, the odd ones go on with a word.

WORDS = [BASE, BASE + 1, BASE + 3, BASE + 2, BASE + 4, BASE + 5, BASE + 7, BASE + 9]  # a ##b ##c | d | e ##f ##g ##h


def word_ids(objective):
    return ids_for(objective, 40, continues=[BASE + 1 + 2 * n for n in range(20)])


def test_words_are_found():
    objective, _ = masked()
    ids = word_ids(objective)
    values, documents = np.array([FIRST, *WORDS, END, *WORDS[1:3]]), np.array([0] * 10 + [1] * 2)
    candidates = ~ids.special[values]
    starts, lengths, fences = find_words(values, documents, candidates, ids)
    assert (starts, lengths, fences) == ([1, 4, 5, 10], [3, 1, 4, 2], [True, False, False, True])
    documents[2:] += 1  # another document begins within a word
    assert find_words(values, documents, candidates, ids)[0] == [1, 2, 4, 5, 10]
    spaced = ids_for(objective, 40, continues=range(50), breaks=[BASE + 3])
    assert find_words(np.array(WORDS), np.zeros(8), np.ones(8, bool), spaced)[:2] == ([0, 3], [3, 5])


def test_a_word_is_masked_as_a_whole_but_its_tokens_one_by_one():
    objective = objective_of("masked", unit="whole_word", rate=0.5)
    ids, apart = word_ids(objective), 0
    for seed in range(300):
        example = objective.make(make_row(WORDS), seed, 8, ids)
        hidden = example["labels"] != -100
        assert len({*hidden[:3].tolist()}) == len({*hidden[4:].tolist()}) == 1
        assert hidden.sum() in (4, 3)  # a budget of 4: e, or a and d, or, if e would go over it, less
        apart += len({*(example["ids"][4:] == MASK).tolist()}) == 2
    assert apart > 20


def test_a_word_that_is_longer_than_the_share_is_passed_over():
    objective = objective_of("masked", unit="whole_word")
    for seed in range(50):
        labels = objective.make(make_row(WORDS), seed, 8, word_ids(objective))["labels"]
        assert np.flatnonzero(labels != -100).tolist() == [3]


def test_spans_are_as_long_as_span_berts():
    """Joshi et al. 2020, section 3.1: geometric with p = 0.2 up to 10 words, on average 3.8."""
    objective, _ = masked(unit="span")
    lengths = span_lengths(objective, Draws(5), 200_000)
    assert lengths.mean() == pytest.approx(3.8, abs=0.02)
    assert (lengths.min(), lengths.max()) == (1, 10)
    shares = np.bincount(lengths)[1:] / len(lengths)
    assert shares[1:] / shares[:-1] == pytest.approx(np.full(9, 0.8), abs=0.05)


def test_spans_are_whole_words_that_share_their_fate_and_stay_in_one_document():
    objective = objective_of("masked", unit="span", rate=0.4, mask_share=0.5, random_share=0.5)
    ids = word_ids(objective)
    values = np.array([*WORDS, *WORDS])
    documents, candidates = np.repeat([0, 1], 8), np.ones(16, bool)
    cut = 0
    for seed in range(300):
        groups = choose(values, documents, candidates, objective, ids, Draws(seed))
        assert np.count_nonzero(groups != UNMASKED) == 6
        assert not set(groups[:8]) & set(groups[8:]) - {UNMASKED}
        for start, stop in ((0, 3), (4, 8), (8, 11), (12, 16)):
            cut += len(set(groups[start:stop].tolist())) > 1
        example = objective.make(make_row(WORDS, WORDS), seed, 16, ids)
        for group in set(choose(values, documents, candidates, objective, ids, Draws(seed)).tolist()) - {UNMASKED}:
            assert len(set((example["ids"][groups == group] == MASK).tolist())) == 1
    assert cut <= 300  # only the last span of a row may be cut within a word


# The rest


def test_gaps_are_padding_and_an_empty_row_has_no_label():
    objective, ids = masked()
    example = objective.make(make_row([BASE, BASE + 1, END], length=6), 1, 7, ids)
    assert example["documents"].tolist() == [0, 0, 0, 0, -1, -1, -1]
    assert example["ids"][4:].tolist() == [END] * 3
    assert (example["labels"][3:] == -100).all()
    empty = objective.make(make_row(length=6), 1, 7, ids)
    assert (empty["labels"] == -100).all()
    assert empty["documents"].tolist() == [-1] * 7


def test_without_a_first_token_the_row_fills_all_positions():
    objective = objective_of("masked")
    assert (objective.row_tokens(8), objective.special_tokens()) == (8, ["[MASK]"])
    assert objective_of("masked", first_token="[CLS]").row_tokens(8) == 7
    assert len(objective.make(plain_row(8), 1, 8, ids_for(objective))["ids"]) == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_share": 0.9, "random_share": 0.2}, "objective: mask_share and random_share: wanted at most 1 together"),
        ({"rate": 0.0}, "objective.rate: wanted greater than 0"),
        ({"rate": 1.0}, "objective.rate: wanted less than 1"),
        ({"unit": "words"}, "objective.unit: wanted 'token', 'whole_word' or 'span', found 'words'"),
        ({"mask_token": ""}, "objective.mask_token: "),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ConfigError) as error:
        objective_of("masked", **settings)
    assert message in str(error.value)
