"""Packing: every token in one row, documents whole where they fit, no more rows than needed."""

import random
from itertools import pairwise

import numpy as np
import pytest
from pydantic import Field

from pipeline.errors import ConfigError
from pipeline.settings import Settings, decode
from pipeline.text.packing import AnyPacking, BestFit, Contiguous, Padded, WarmUp, best_fit, check_warmup, pad
from pipeline.text.stream import TokenStream
from pipeline.text.token_parts import TokenWriter


def bounds_of(lengths, first=0):
    return [first, *(first + np.cumsum(lengths)).tolist()]


def random_lengths(seed):
    rng = random.Random(seed)
    longest = rng.choice([3, 16, 40, 200])
    return [rng.randrange(1, longest + 1) for _ in range(rng.randrange(1, 300))]


def tokens_of(rows):
    return sorted(token for row in rows for start, stop in row for token in range(start, stop))


def num_pieces(rows, bounds):
    """How many pieces each document is in."""
    pieces = [sum(a < stop and start < b for row in rows for a, b in row) for start, stop in pairwise(bounds)]
    assert sum(pieces) == sum(map(len, rows))  # none spans two documents
    return pieces


@pytest.mark.parametrize("seed", range(60))
def test_best_fit_loses_nothing_and_needs_no_more_rows_than_tokens_do(seed):
    lengths, seq_len = random_lengths(seed), random.Random(seed).choice([1, 7, 16, 64])
    bounds = bounds_of(lengths, first=1000)
    rows = best_fit(bounds, seq_len)
    assert tokens_of(rows) == list(range(bounds[0], bounds[-1]))
    assert len(rows) == -(-sum(lengths) // seq_len)
    assert all(0 < sum(stop - start for start, stop in row) <= seq_len for row in rows)
    assert rows == best_fit(bounds, seq_len)


def test_best_fit_puts_each_where_the_least_room_is_left():
    # 6 and 5 open rows; 4 goes to the 6, which it fills; 3 to the 5; 2 fills that
    bounds = bounds_of([4, 6, 2, 5, 3])
    rows = best_fit(bounds, 10)
    assert rows == [[(4, 10), (0, 4)], [(12, 17), (17, 20), (10, 12)]]


def test_best_fit_cuts_only_what_fits_nowhere():
    # three of 6 in rows of 10, of which 18 tokens need two: one is cut into the two gaps of 4
    assert best_fit(bounds_of([6, 6, 6]), 10) == [[(0, 6), (16, 18)], [(6, 12), (12, 16)]]


def test_a_document_longer_than_a_row_fills_rows_and_its_rest_is_packed():
    assert best_fit(bounds_of([23, 6]), 10) == [[(0, 10)], [(10, 20)], [(23, 29), (20, 23)]]


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_cuts_fewer_documents_than_the_stream_cut_in_rows(seed):
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(4, 1, 400).astype(int), 1, 2000)
    seq_len, bounds = 256, bounds_of(lengths)
    pieces = num_pieces(best_fit(bounds, seq_len), bounds)
    needed = -(-lengths // seq_len)
    cut = int((np.array(pieces) > needed).sum())
    contiguous = sum(start // seq_len != (stop - 1) // seq_len for start, stop in pairwise(bounds))
    assert cut < contiguous / 5


@pytest.mark.parametrize("seed", range(20))
def test_padded_rows_hold_one_document_each(seed):
    lengths, seq_len = random_lengths(seed), 16
    bounds = bounds_of(lengths)
    rows = pad(bounds, seq_len)
    assert all(len(row) == 1 for row in rows)
    assert tokens_of(rows) == list(range(sum(lengths)))
    assert num_pieces(rows, bounds) == [-(-length // seq_len) for length in lengths]


@pytest.fixture
def stream(tmp_path):
    """Three parts of several batches."""
    rng, sizes, paths = np.random.default_rng(4), [], []
    for number in range(3):
        paths.append(tmp_path / f"part-{number}.arrow")
        with TokenWriter(paths[-1], "uint16") as writer:
            size = 0
            for batch in range(4):
                lengths = rng.integers(1, 50, 30)
                names = [f"{number}-{batch}-{row}" for row in range(30)]
                values = rng.integers(1, 99, lengths.sum())
                writer.add(names, names, values, lengths, lengths, lengths.astype(np.uint64))
                size += int(lengths.sum())
        sizes.append(size)
    return TokenStream([str(path) for path in paths], sizes, end_of_text=0, vocab_size=100)


@pytest.mark.parametrize("packing", [Contiguous(), BestFit(), Padded()], ids=lambda packing: packing.kind)
def test_rows_of_a_stream_are_all_its_tokens_once_and_are_found_again(stream, packing):
    seq_len = 32
    packer = packing.pack(stream, seq_len)
    rows = [packer.row(number) for number in range(packer.num_rows)]
    dropped = stream.num_tokens % seq_len if packing.kind == "contiguous" else 0
    assert tokens_of(rows) == list(range(stream.num_tokens - dropped))
    for start, stop in stream.documents():
        wanted = [n for n, row in enumerate(rows) if any(a < stop and start < b for a, b in row)]
        assert packer.rows_of(start, stop) == wanted


def test_packed_windows_are_forgotten_and_made_again(stream, monkeypatch):
    import pipeline.text.packing as packing

    expected = [BestFit().pack(stream, 32).row(number) for number in range(BestFit().pack(stream, 32).num_rows)]
    monkeypatch.setattr(packing, "MAX_WINDOWS", 2)
    packer = BestFit().pack(stream, 32)
    order = np.random.default_rng(0).permutation(packer.num_rows).tolist()
    assert [packer.row(number) for number in order] == [expected[number] for number in order]
    assert len(packer._packed) <= 2


def test_packings_are_chosen_by_kind():
    class Holder(Settings):
        packing: AnyPacking = Field(discriminator="kind")

    assert decode(Holder, {"packing": {"kind": "best_fit"}}).packing == BestFit()
    with pytest.raises(ConfigError, match=r"packing.kind: no packing is called 'bestfit'; did you mean 'best_fit'\?"):
        decode(Holder, {"packing": {"kind": "bestfit"}})


def test_a_warm_up_that_does_not_divide_or_goes_back_is_refused():
    assert not list(check_warmup([WarmUp(tokens=10, seq_len=8), WarmUp(tokens=20, seq_len=16)], 32))
    found = dict(check_warmup([WarmUp(tokens=10, seq_len=5), WarmUp(tokens=10, seq_len=16)], 32))
    assert found == {
        "seq_len_warmup.0.seq_len": "rows of 32 tokens do not divide into sequences of 5",
        "seq_len_warmup.1.tokens": "wanted more than the 10 before it, found 10",
    }
