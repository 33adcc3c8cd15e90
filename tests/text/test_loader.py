import itertools

import numpy as np
import pytest
import xxhash

from pipeline.errors import ArtifactError
from pipeline.text.arrow import write_tokens
from pipeline.text.loader import SequenceLoader, TokenStream, held_out, permute

# 99.9 % quantile of the chi-square distribution with 15 degrees of freedom
CHI_SQUARE_15 = 37.7


@pytest.fixture
def parts(tmp_path):
    """Two parts with 40 documents of 1 to 9 tokens; token values say which document they are of."""
    paths = []
    for number in range(2):
        lengths = np.array([1 + (7 * document + number) % 9 for document in range(20)])
        documents = np.arange(20) + 20 * number
        path = tmp_path / f"part-{number:05d}.arrow"
        hashes = np.array([xxhash.xxh3_64_intdigest(str(d).encode()) for d in documents], dtype=np.uint64)
        values = np.repeat(documents, lengths).astype(np.uint16)
        write_tokens(path, [str(d) for d in documents], values, lengths, lengths * 3, hashes)
        paths.append(path)
    return paths


def test_both_sides_of_the_split_are_all_documents_and_share_none(parts):
    train, held = (TokenStream(parts, 0.3, held=side) for side in (False, True))
    assert train.num_documents + held.num_documents == 40
    assert held.num_documents > 0
    seen = [set(stream.read(0, stream.num_tokens).tolist()) for stream in (train, held)]
    assert seen[0] | seen[1] == set(range(40))
    assert not seen[0] & seen[1]
    assert train.num_bytes == 3 * train.num_tokens


def test_the_split_depends_on_the_text_alone():
    hashes = np.random.default_rng(0).integers(0, 2**64, 100_000, dtype=np.uint64)
    chosen = held_out(hashes, 0.02)
    assert chosen.mean() == pytest.approx(0.02, abs=0.002)  # 4.5 standard deviations
    assert (held_out(hashes[::-1], 0.02) == chosen[::-1]).all()
    assert (chosen <= held_out(hashes, 0.05)).all()  # more held out keeps those held out before
    assert not held_out(np.array([2**64 - 1], np.uint64), 0.999).any()


def test_any_stretch_of_the_stream_is_what_its_documents_say(parts):
    stream = TokenStream(parts, 0.3, held=False)
    whole = np.concatenate([stream.document(i) for i in range(stream.num_documents)])
    assert len(whole) == stream.num_tokens
    for start in range(0, stream.num_tokens - 13):
        assert (stream.read(start, 13) == whole[start : start + 13]).all()


def test_every_epoch_feeds_every_sequence_once_in_another_order(parts):
    loader = SequenceLoader(TokenStream(parts, 0.3, held=False), seq_len=4, batch_rows=3, seed=5)
    rows = np.concatenate([loader.rows(step) for step in range(1, 1 + loader.num_sequences)])
    epochs = rows.reshape(3, loader.num_sequences)
    assert all(sorted(epoch) == list(range(loader.num_sequences)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3


def test_labels_are_the_tokens_after_their_inputs(parts):
    loader = SequenceLoader(TokenStream(parts, 0.3, held=False), seq_len=4, batch_rows=2, seed=0)
    inputs, labels = loader.read(np.array([0, loader.num_sequences - 1]))
    assert inputs.shape == labels.shape == (2, 4)
    assert (inputs[:, 1:] == labels[:, :-1]).all()
    assert labels[0, -1] == loader.stream.read(4, 1)[0]


def test_a_corpus_shorter_than_one_sequence_is_refused(parts):
    with pytest.raises(ArtifactError, match="fewer than one sequence of 100000"):
        SequenceLoader(TokenStream(parts, 0.3, held=False), seq_len=100_000, batch_rows=1, seed=0)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 65, 1000])
def test_permute_is_a_permutation(size):
    for seed, epoch in itertools.product((0, 1), (0, 1)):
        assert sorted(permute(i, size, seed, epoch) for i in range(size)) == list(range(size))


def test_permute_never_changes_between_versions():
    # a run that is continued with a newer version must see the same data
    assert [permute(i, 10, 0, 0) for i in range(10)] == [2, 4, 0, 7, 3, 5, 9, 1, 6, 8]
    assert [permute(i, 10**12, 7, 3) for i in range(3)] == [689430165984, 231694968750, 318747310980]


def test_permute_shuffles_evenly():
    size, bins = 4096, 16
    order = np.array([permute(i, size, 3, 0) for i in range(size)])
    counts = np.histogram2d(np.arange(size), order, bins=(bins, bins))[0]
    expected = size / bins**2
    for row in counts:
        assert ((row - expected) ** 2 / expected).sum() < CHI_SQUARE_15
    steps = np.corrcoef(order[:-1], order[1:])[0, 1]
    assert abs(steps) < 4 / np.sqrt(size)  # four standard deviations of a random order's serial correlation
