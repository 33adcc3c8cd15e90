"""Next-sentence and sentence-order prediction: pairs of real text, and their classes."""

import numpy as np
import pytest
from objective_cases import END, ids_for, make_row, objective_of

from pipeline.errors import ConfigError
from pipeline.models.config import Decoder, Encoder

MASK, CLS, SEP = 1, 2, 3
A, B = range(100, 200), range(300, 400)  # documents of two alphabets


def pair(objective, seed, row, partner=None, seq_len=64):
    example = objective.make(row, seed, seq_len, ids_for(objective), partner)
    assert {name: array.shape for name, array in example.items()} == {
        **dict.fromkeys(("ids", "labels", "documents", "token_types"), (seq_len,)),
        "sentence": (),
    }
    values = np.where(example["labels"] != -100, example["labels"], example["ids"])  # before they were masked
    used = example["documents"] == 0
    assert (values[~used] == END).all()
    assert (example["documents"][~used] == -1).all()
    assert not example["token_types"][~used].any()
    values, types = values[used].tolist(), example["token_types"][used].tolist()
    first = values[1 : values.index(SEP)]
    assert values[0] == CLS
    second = values[len(first) + 2 : -1] if sum(types) else None
    assert values == [CLS, *first, SEP, *([] if second is None else [*second, SEP])]
    assert types == [0] * (len(first) + 2) + [1] * (0 if second is None else len(second) + 1)
    return first, second, int(example["sentence"])


def test_berts_pair():
    """Devlin et al. 2019, section 3.1: [CLS] A [SEP] B [SEP], half of the time with a B from elsewhere."""
    objective = objective_of("next_sentence")
    row, partner = make_row([*A[:60], END]), make_row([*B[:60], END])
    assert (objective.row_tokens(64), objective.partner, objective.needs_documents) == (61, True, True)
    classes, places, starts = [], [], []
    for seed in range(2000):
        first, second, sentence = pair(objective, seed, row, partner)
        classes.append(sentence)
        places.append(len(first))
        assert first == list(A[: len(first)])
        assert len(second) == 60 - len(first)
        if sentence == 0:
            assert second == list(A[len(first) : 60])
        else:
            assert second == list(range(second[0], second[0] + len(second)))
            starts.append(second[0] - B[0])
    assert np.mean(classes) == pytest.approx(0.5, abs=0.045)  # four deviations of 2000 draws
    assert set(places) == set(range(15, 46))
    assert min(starts) == 0
    assert max(starts) > 30


def test_no_length_tells_the_class():
    """The partner is shorter than what follows, so both kinds of B have its length."""
    objective = objective_of("next_sentence")
    row, partner = make_row([*A[:60], END]), make_row([*B[:5], END])
    found = [pair(objective, seed, row, partner)[1:] for seed in range(100)]
    assert {len(second) for second, _ in found} == {5}
    assert {sentence for _, sentence in found} == {0, 1}


def test_albert_s_swapped_pair():
    """Lan et al. 2020, section 3.1: two neighbouring segments, in their order or not."""
    objective, classes = objective_of("sentence_order"), []
    assert not objective.partner
    for seed in range(2000):
        first, second, sentence = pair(objective, seed, make_row([*A[:60], END]))
        assert (second + first if sentence else first + second) == list(A[:60])
        classes.append(sentence)
    assert np.mean(classes) == pytest.approx(0.5, abs=0.045)


@pytest.mark.parametrize("kind", ["next_sentence", "sentence_order"])
def test_segments_are_of_the_longest_document_of_a_row(kind):
    row = make_row([500, 501, END], [*A[:30], END], [600, 601, 602])
    partner = make_row([700], [*B[:30], END], [800, END], length=61)
    for seed in range(50):
        first, second, _ = pair(objective_of(kind), seed, row, partner)
        assert set(first + second) <= {*A[:30], *B[:30]}
        assert len(first) + len(second) == 30


@pytest.mark.parametrize(
    ("row", "first"), [(make_row([100, END]), [100]), (make_row([END]), []), (make_row(length=61), [])]
)
@pytest.mark.parametrize("kind", ["next_sentence", "sentence_order"])
def test_a_document_that_cannot_be_cut_has_no_class(kind, row, first):
    assert pair(objective_of(kind), 1, row, make_row([*B[:60], END])) == (first, None, -100)


def test_a_pair_without_a_partner_has_no_class_but_stays_whole():
    first, second, sentence = pair(objective_of("next_sentence"), 1, make_row([*A[:60], END]), make_row([END]))
    assert (first + second, sentence) == (list(A[:60]), -100)


def test_words_are_masked_in_pairs_too():
    objective = objective_of("next_sentence", unit="whole_word", rate=0.3)
    ids = ids_for(objective, continues=range(101, 200, 2))
    for seed in range(50):
        example = objective.make(make_row([*A[:60], END]), seed, 64, ids, make_row([*A[:60], END]))
        hidden = np.flatnonzero(example["labels"] != -100)
        assert len(hidden) == 18
        assert set(example["ids"][hidden].tolist()) & {MASK}
        values = example["labels"][hidden]
        assert (values % 2 == 0).sum() <= (values % 2 == 1).sum() + 2  # 100 101 | 102 103 …, but for a cut word


def test_models_without_what_pairs_need_are_refused():
    objective = objective_of("next_sentence")
    assert list(objective.check(Encoder(token_types=2, pooler=True), 64)) == []
    assert [name for name, _ in objective.check(Encoder(), 64)] == ["model.token_types", "model.pooler"]
    assert list(objective.check(Encoder(token_types=2, pooler=True), 3)) == [
        ("seq_len", "3 positions leave no room for text with the objective 'next_sentence'")
    ]
    ((name, problem),) = objective.check(Decoder(), 64)
    assert (name, problem) == (
        "objective.kind",
        "'next_sentence' trains a model of kind 'encoder', found 'decoder'",
    )
    with pytest.raises(ConfigError, match="objective.separator"):
        objective_of("next_sentence", separator="")
