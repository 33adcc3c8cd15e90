import math

import numpy as np
import pytest
import torch

from pipeline.text.stream import TokenStream
from pipeline.text.token_parts import TokenWriter
from pipeline.training.metrics import accuracy, macro_f1, num_windows, score

VOCAB = 11


class Bigram(torch.nn.Module):
    """Predicts a token from the one before it: its loss does not depend on how a stream is cut."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0)))

    def forward(self, ids, labels):
        logits = self.table[ids].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum")


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
    nats = torch.nn.functional.cross_entropy(model.table[tokens[:-1]], tokens[1:], reduction="sum").item()
    for seq_len, rows in ((1, 16), (8, 3), (10, 100), (103, 1), (500, 2)):
        result = score(model, stream, seq_len, rows, first_id=7)
        assert result.tokens == 103
        assert result.nats == pytest.approx(nats, rel=1e-5)  # fp32 sums in another order
    assert result.loss == pytest.approx(nats / 103, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nats / 103), rel=1e-4)
    assert result.bits_per_byte(stream) == pytest.approx(nats / math.log(2) / 206, rel=1e-5)


def test_ranks_that_share_the_windows_see_all_of_them(stream):
    model = Bigram()
    assert num_windows(stream, 8) == 13
    whole = score(model, stream, 8, 4, first_id=7)
    windows = [*range(13), None]
    shares = [score(model, stream, 8, 4, 7, windows[rank::2]) for rank in range(2)]
    assert sum(share.tokens for share in shares) == whole.tokens
    assert sum(share.nats for share in shares) == pytest.approx(whole.nats, rel=1e-5)


class OneDocument(torch.nn.Module):
    """Checks how the documents are numbered; its loss is the number of labels."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, ids, labels, documents):
        assert (documents.diff(dim=1) == (ids[:, 1:] == 7).long()).all()  # a new one wherever an end of text is read
        return (labels != -100).sum()


def test_documents_are_numbered_where_they_are_masked(stream):
    assert score(OneDocument(), stream, 8, 4, first_id=7, document_mask=True).nats == 103


def test_a_model_is_left_in_the_mode_it_was_in(stream):
    model = Bigram().train()
    score(model, stream, 8, 4, first_id=0)
    assert model.training


def test_accuracy():
    assert accuracy([0, 1, 1, 2], [0, 1, 2, 2]) == 0.75


def test_macro_f1_by_hand():
    # class 0: precision 1/2, recall 1 → 2/3; class 1: 1/1, 1/2 → 2/3; class 2 never occurs → 0
    assert macro_f1([0, 0, 1], [0, 1, 1], 3) == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
