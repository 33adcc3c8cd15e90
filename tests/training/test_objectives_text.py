"""Objectives of decoders: causal, prefix and fill in the middle."""

import numpy as np
import pytest
from objective_cases import END, ids_for, make_ids, make_row, objective_of, random_documents

from pipeline.errors import ConfigError

PRE, SUF, MID = 1, 2, 3


def test_causal_examples_are_the_rows():
    objective, row = objective_of("causal"), make_row([5, 6, END], [7, 8])
    example = objective.make(row, 1, 5, make_ids([], 10))
    assert example["ids"].tolist() == [END, 5, 6, END, 7]
    assert example["labels"].tolist() == [5, 6, END, 7, 8]
    assert example["documents"].tolist() == [0, 0, 0, 1, 1]
    assert objective.row_tokens(5) == 5


# Prefixes


def test_a_prefix_is_seen_as_a_whole_and_only_what_follows_it_has_a_loss():
    objective, ids = objective_of("prefix"), make_ids([], 100)
    row = make_row([10, 11, 12, 13, 14, 15, 16, END], [20, 21, END], [30], length=14)
    sizes = set()
    for seed in range(300):
        example = objective.make(row, seed, 14, ids)
        assert example["ids"].tolist() == row.inputs.tolist()
        assert example["documents"].tolist() == [0] * 8 + [1] * 3 + [2] + [-1] * 2
        for begin, end in ((0, 8), (8, 11), (11, 12)):
            prefix, labels = example["prefix"][begin:end], example["labels"][begin:end]
            size = int(prefix.sum())
            assert size >= 1
            assert prefix[:size].all()
            assert (labels[: size - 1] == -100).all()  # these tokens are seen
            assert (labels[size - 1 :] == row.tokens[begin:end][size - 1 :]).all()  # and none of these is
            if begin == 0:
                sizes.add(size)
        assert not example["prefix"][12:].any()
    assert sizes == set(range(1, 9))


def test_prefixes_are_equally_long_or_short():
    objective, row = objective_of("prefix"), make_row(range(1, 101))
    sizes = [int(objective.make(row, seed, 100, make_ids([], 100))["prefix"].sum()) for seed in range(4000)]
    # uniform on 1 … 100: mean 50.5, deviation 28.9, so four deviations of the mean are 1.8
    assert np.mean(sizes) == pytest.approx(50.5, abs=1.8)
    assert np.std(sizes) == pytest.approx(28.9, abs=1.2)


# Fill in the middle


def unpermute(tokens):
    """Read a rearranged document back: the text, and which of the two orders it has."""
    tokens = list(tokens)
    assert tokens.pop() == END
    assert tokens[0] == PRE
    if tokens[1] == SUF:
        middle = tokens.index(MID)
        return tokens[middle + 1 :] + tokens[2:middle], "spm"
    suffix, middle = tokens.index(SUF), tokens.index(MID)
    return tokens[1:suffix] + tokens[middle + 1 :] + tokens[suffix + 1 : middle], "psm"


def test_the_two_orders_are_the_papers():
    """Bavarian et al. 2022, sections 3 and 3.1: <PRE> prefix <SUF> suffix <MID> middle <EOT>, and SPM's second form."""
    ids, row = make_ids(["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"], 10), make_row([5, 6, 7, END])
    found = {}
    for share in (0.0, 1.0):
        objective = objective_of("fill_in_middle", rate=1.0, spm_share=share, documents_per_row=1)
        assert objective.row_tokens(8) == 4
        for seed in range(100):
            example = objective.make(row, seed, 8, ids)
            found.setdefault(share, set()).add(tuple(example["labels"].tolist()))
            filled = int((example["labels"] != -100).sum())
            assert example["ids"].tolist() == [END, *example["labels"][: filled - 1].tolist(), *[END] * (8 - filled)]
            assert example["documents"].tolist() == [0] * filled + [-1] * (8 - filled)
    middle_6 = {0.0: (PRE, 5, SUF, 7, MID, 6, END, -100), 1.0: (PRE, SUF, 7, MID, 5, 6, END, -100)}
    nothing_before = {0.0: (PRE, SUF, 7, MID, 5, 6, END, -100), 1.0: (PRE, SUF, 7, MID, 5, 6, END, -100)}
    for share, orders in found.items():
        assert middle_6[share] in orders
        assert nothing_before[share] in orders
        assert len(orders) == 10 if share == 0 else 6  # of 4 places each two, in SPM only the suffix shows


def test_nothing_of_a_row_is_lost_and_what_is_not_rearranged_is_as_it_was():
    rng = np.random.default_rng(1)
    objective = objective_of("fill_in_middle", rate=0.8, documents_per_row=3)
    ids = ids_for(objective, 5000)
    for seed in range(300):
        documents = random_documents(rng, 10, int(rng.integers(1, 9)), 30)
        documents[-1] = documents[-1][:-1]  # cut by the end of the row
        length = sum(map(len, documents))
        row = make_row(*documents, length=length + int(rng.integers(0, 5)), before=4)
        seq_len = len(row.tokens) + 12
        assert objective.row_tokens(seq_len) == len(row.tokens)
        example = objective.make(row, seed, seq_len, ids)
        assert {len(array) for array in example.values()} == {seq_len}
        rearranged = 0
        for number, document in enumerate(documents):
            mine = example["documents"] == number
            labels, inputs = example["labels"][mine].tolist(), example["ids"][mine].tolist()
            assert inputs == [END if number else 4, *labels[:-1]]
            if labels[0] == PRE:
                rearranged += 1
                assert unpermute(labels)[0] == [token for token in document if token != END]
            else:
                assert labels == document
        assert rearranged <= 3


def test_rates_are_what_was_asked_for():
    objective = objective_of("fill_in_middle", rate=0.5, spm_share=0.25, documents_per_row=4)
    ids, kinds, places = ids_for(objective), [], []
    row = make_row(*([*range(10 + 20 * n, 30 + 20 * n), END] for n in range(4)))
    for seed in range(1000):
        example = objective.make(row, seed, 100, ids)
        for number in range(4):
            labels = example["labels"][example["documents"] == number].tolist()
            kinds.append(unpermute(labels)[1] if labels[0] == PRE else "plain")
            if kinds[-1] == "psm":
                places.append(labels.index(SUF) - 1)
    # The prefix is empty if one of two cuts at 0 … 20 is 0, and then PSM looks like SPM; else it has 7.2 tokens, the
    # mean of the smaller cut. Four deviations of 4000 draws of a half are 0.03, and of half as many 0.04.
    empty = 41 / 441
    assert np.mean([kind != "plain" for kind in kinds]) == pytest.approx(0.5, abs=0.03)
    assert np.mean([kind == "spm" for kind in kinds if kind != "plain"]) == pytest.approx(0.25 + 0.75 * empty, abs=0.04)
    assert np.mean(places) == pytest.approx(2870 / 441 / (1 - empty), abs=0.5)


def test_more_documents_than_there_is_room_for_are_left_as_they_are():
    objective = objective_of("fill_in_middle", rate=1.0, documents_per_row=2)
    row = make_row(*([10 * n, 10 * n + 1, 10 * n + 2, END] for n in range(1, 7)), [90, END])
    chosen = set()
    for seed in range(100):
        example = objective.make(row, seed, len(row.tokens) + 8, ids_for(objective))
        begun = example["documents"][example["labels"] == PRE].tolist()
        assert len(begun) == 2
        chosen |= set(begun)
    assert chosen == set(range(6))  # but never the last, which has one token
    objective = objective_of("fill_in_middle", rate=0.0)
    example = objective.make(row, 3, len(row.tokens) + 16, ids_for(objective))
    assert example["labels"][: len(row.tokens)].tolist() == row.tokens.tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": 1.5}, "objective.rate: wanted"),
        ({"documents_per_row": 0}, "objective.documents_per_row: wanted"),
        ({"prefix_token": "a", "suffix_token": "a"}, "objective: wanted three different tokens, found a, a, <|fim_"),
        ({"spm_rate": 0.5}, "objective.spm_rate: no such setting; did you mean 'spm_share'"),
    ],
)
def test_settings_of_fill_in_the_middle_are_checked(settings, message):
    with pytest.raises(ConfigError) as error:
        objective_of("fill_in_middle", **settings)
    assert message in str(error.value)
