import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.text.stream import TokenStream
from pipeline.text.token_parts import TokenWriter
from pipeline.training.metrics import Score, accuracy, macro_f1, num_windows, score
from pipeline.training.objectives import Causal, Masked, NextSentence
from pipeline.training.objectives.batch import Examples
from pipeline.training.objectives.objective import SpecialIds

VOCAB = 11
MASK = 9
CAUSAL = Causal()


def examples(seq_len, document_mask=False, objective=CAUSAL):
    special = np.arange(VOCAB) >= 7
    ids = SpecialIds({"[MASK]": MASK, "[CLS]": 8, "[SEP]": 10}, 7, VOCAB, special, special, special)
    return Examples(objective, ids, seq_len, document_mask, seed=0)


class Bigram(torch.nn.Module):
    """Predicts a token from the one before it: its loss does not depend on how a stream is cut."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0)))

    def forward(self, ids, labels, documents=None):
        logits = self.table[ids].flatten(0, 1)
        return {"tokens": F.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum")}


@pytest.fixture
def stream(tmp_path):
    values = np.random.default_rng(0).integers(0, VOCAB, 103).astype(np.uint16)
    lengths = np.array([3, 50, 50])
    with TokenWriter(tmp_path / "held-00000.arrow", "uint16") as writer:
        writer.add(["a", "b", "c"], ["s"] * 3, values, lengths, lengths * 2, [0] * 3)
    return TokenStream([str(tmp_path / "held-00000.arrow")], [103], end_of_text=7, vocab_size=VOCAB, num_bytes=206)


def test_every_token_is_predicted_once_however_the_stream_is_cut(stream):
    model = Bigram()
    tokens = torch.tensor([7, *stream.read(0, 103).tolist()])
    nats = F.cross_entropy(model.table[tokens[:-1]], tokens[1:], reduction="sum").item()
    for seq_len, rows in ((1, 16), (8, 3), (10, 100), (103, 1), (500, 2)):
        result = score(model, stream, examples(seq_len), rows=rows)
        assert result.tokens == 103
        assert result.sums["tokens"] == pytest.approx(nats, rel=1e-5)  # fp32 sums in another order
    assert result.loss == pytest.approx(nats / 103, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nats / 103), rel=1e-4)
    assert result.bits_per_byte(stream) == pytest.approx(nats / math.log(2) / 206, rel=1e-5)


def test_ranks_that_share_the_windows_see_all_of_them(stream):
    model = Bigram()
    assert num_windows(stream, 8) == 13
    whole = score(model, stream, examples(8), rows=4)
    windows = [*range(13), None]
    shares = [score(model, stream, examples(8), windows[rank::2], rows=4) for rank in range(2)]
    assert (shares[0] + shares[1]).weights == whole.weights
    assert (shares[0] + shares[1]).sums == pytest.approx(whole.sums, rel=1e-5)


def test_a_rank_without_windows_calls_the_model_and_counts_nothing(stream):
    model, calls = Bigram(), []
    model.register_forward_pre_hook(lambda *call: calls.append(call))
    nothing = score(model, stream, examples(8), [None])
    assert len(calls) == 1
    assert nothing.sums == {"tokens": 0.0}
    assert set(nothing.weights.values()) == {0}


class OneDocument(torch.nn.Module):
    """Checks how the documents are numbered; its loss is the number of labels."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, ids, labels, documents):
        beside = (labels[:, 1:] != -100) & (labels[:, :-1] != -100)
        begins = ids[:, 1:] == 7  # a new one wherever an end of text is read
        assert (documents.diff(dim=1) == begins.long())[beside].all()
        assert (documents[labels == -100] == -1).all()
        return {"tokens": (labels != -100).sum()}


def test_documents_are_numbered_where_they_are_masked(stream):
    assert score(OneDocument(), stream, examples(8, document_mask=True), rows=4).sums["tokens"] == 103


class Recorder(torch.nn.Module):
    """Keeps what it is asked."""

    def __init__(self):
        super().__init__()
        self.weight, self.asked = torch.nn.Parameter(torch.zeros(1)), []

    def forward(self, **arguments):
        self.asked.append(arguments)
        losses = {"tokens": (arguments["labels"] != -100).sum()}
        return losses | ({"sentence": (arguments["sentence"] != -100).sum()} if "sentence" in arguments else {})


def test_the_same_is_masked_every_time_however_many_windows_are_fed_at_once(stream):
    one, other = Recorder(), Recorder()
    first = score(one, stream, examples(10, objective=Masked()), rows=2)
    assert score(other, stream, examples(10, objective=Masked()), rows=5) == first
    joined = [torch.cat([asked["ids"] for asked in model.asked]) for model in (one, other)]
    assert joined[0].equal(joined[1])
    assert (joined[0] == MASK).any()
    assert first.terms == {"tokens": 1.0}


def test_pairs_have_a_class_and_a_loss_of_their_own(stream):
    model = Recorder()
    found = score(model, stream, examples(20, objective=NextSentence()))
    assert found.terms == {"tokens": 1.0, "sentence": 1.0}
    assert found.loss == 2.0
    classes = torch.cat([asked["sentence"] for asked in model.asked])
    assert {0, 1} <= set(classes.tolist())
    assert found.weights["sentences"] == (classes != -100).sum()


def test_terms_that_only_help_to_train_are_no_part_of_the_loss():
    found = Score({"tokens": 6.0, "balance": 9.0, "ahead_1": 4.0}, {"labels": 2, "rows": 3, "sentences": 0})
    assert found.terms == {"tokens": 3.0, "balance": 3.0, "ahead_1": 2.0}
    assert found.loss == 3.0
    assert found.perplexity == pytest.approx(math.exp(3.0))


def test_a_model_is_left_in_the_mode_it_was_in(stream):
    model = Bigram().train()
    score(model, stream, examples(8), rows=4)
    assert model.training


def test_accuracy():
    assert accuracy([0, 1, 1, 2], [0, 1, 2, 2]) == 0.75


def test_macro_f1_by_hand():
    # class 0: precision 1/2, recall 1 → 2/3; class 1: 1/1, 1/2 → 2/3; class 2 never occurs → 0
    assert macro_f1([0, 0, 1], [0, 1, 1], 3) == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
