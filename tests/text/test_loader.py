"""The loader: the order of tokens is a function of (settings, seed, step), and nothing is lost or repeated."""

import threading
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import pipeline.text.loader as loader_module
import pipeline.text.stream as stream_module
from pipeline.errors import ArtifactError, ConfigError
from pipeline.text.loader import IGNORED, Loader, Order
from pipeline.text.mixture import Epochs, Phase, Phases, Temperature, Weights
from pipeline.text.packing import BestFit, Contiguous, Padded, WarmUp
from pipeline.text.stream import TokenStream
from pipeline.text.token_parts import TokenWriter

END, VOCABULARY, SEQ_LEN = 0, 50_000, 16
PACKINGS = [Contiguous(), BestFit(), Padded()]


def by_kind(packing):
    return packing.kind


def make_stream(
    directory, name, num_documents, *, parts=3, batches=2, seed=0, first=1, longest=40, vocabulary=VOCABULARY
):
    """A stream in which no token but the end of a text occurs twice, so that each says where it is from."""
    directory.mkdir(exist_ok=True)
    rng, sizes, paths, following = np.random.default_rng(seed), [], [], first
    dtype = "uint16" if vocabulary <= 2**16 else "uint32"
    for part in range(parts):
        path = directory / f"{name}-{part}.arrow"
        with TokenWriter(path, dtype) as writer:
            size = 0
            for batch in range(batches):
                lengths = rng.integers(1, longest, num_documents)
                values = np.arange(following, following + lengths.sum())
                following += len(values)
                values[np.cumsum(lengths) - 1] = END
                ids = [f"{name}-{part}-{batch}-{row}" for row in range(num_documents)]
                writer.add(ids, [name] * num_documents, values, lengths, lengths * 3, lengths.astype(np.uint64))
                size += len(values)
        paths.append(str(path))
        sizes.append(size)
    return TokenStream(paths, sizes, end_of_text=END, vocab_size=vocabulary)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(loader_module, "CHUNK", 256)


@pytest.fixture
def streams(tmp_path):
    return {
        "web": make_stream(tmp_path, "web", 40),
        "code": make_stream(tmp_path, "code", 11, seed=1, first=20_000),
        "books": make_stream(tmp_path, "books", 5, seed=2, first=40_000, longest=100, parts=2),
    }


def order_of(packing=None, mixture=None, **changes):
    settings = {
        "mixture": mixture or Temperature(),
        "packing": packing or Contiguous(),
        "seq_len": SEQ_LEN,
        "batch_rows": 8,
        "steps": 100,
        "seed": 3,
        **changes,
    }
    return Order(**settings)


def samples_of(loader, steps):
    """(source, epoch, row) of every sample of the first steps."""
    found = []
    for step in range(1, steps + 1):
        samples = loader.samples(step)
        found += zip(samples.source.tolist(), samples.epoch.tolist(), samples.row.tolist(), strict=True)
    return found


# What is read


@pytest.mark.parametrize("packing", PACKINGS, ids=by_kind)
def test_an_epoch_has_every_token_of_the_stream_as_a_label_once(streams, packing):
    stream = streams["web"]
    rows = packing.pack(stream, SEQ_LEN).num_rows
    loader = Loader({"web": stream}, order_of(packing, batch_rows=1, steps=3 * rows))
    whole = stream.read(0, stream.num_tokens)
    if packing.kind == "contiguous":
        whole = whole[: rows * SEQ_LEN]
    orders = []
    for epoch in range(3):
        labels = [loader.read(step).labels for step in range(1 + epoch * rows, 1 + (epoch + 1) * rows)]
        seen = np.concatenate(labels).ravel()
        assert Counter(seen[seen != IGNORED].tolist()) == Counter(whole.tolist())
        orders.append([int(label[0, 0]) for label in labels])
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize("packing", PACKINGS, ids=by_kind)
def test_an_input_is_the_token_before_its_label_and_documents_begin_with_the_end_of_another(streams, packing):
    stream = streams["web"]
    loader = Loader({"web": stream}, order_of(packing, batch_rows=packing.pack(stream, SEQ_LEN).num_rows, steps=1))
    whole = stream.read(0, stream.num_tokens)
    before = {int(token): int(whole[i - 1]) if i else END for i, token in enumerate(whole) if token != END}
    rows = loader.read(1)
    assert rows.inputs.shape == rows.labels.shape == rows.documents.shape == (loader.sizes[0], SEQ_LEN)
    used = rows.labels != IGNORED
    assert (rows.inputs[~used] == END).all()  # what follows a row's last token
    for inputs, labels, documents in zip(rows.inputs, rows.labels, rows.documents, strict=True):
        assert (np.diff(documents) >= 0).all()
        for place, (token, label) in enumerate(zip(inputs.tolist(), labels.tolist(), strict=True)):
            if label not in (IGNORED, END):
                assert token == before[label]
            if place:
                begins = documents[place] != documents[place - 1]
                assert begins or token != END  # the end of a text begins a document
                assert begins or label == IGNORED or token == labels[place - 1]  # else it goes on where it was


def test_documents_of_a_padded_row_are_one_and_then_padding(streams):
    loader = Loader({"web": streams["web"]}, order_of(Padded()))
    rows = loader.read(1)
    for labels, documents in zip(rows.labels, rows.documents, strict=True):
        used = labels != IGNORED
        assert len(set(documents[used].tolist())) == 1
        assert not set(documents[used].tolist()) & set(documents[~used].tolist())


def test_rows_that_go_over_batches_and_parts_are_read_whole(tmp_path):
    """Batches shorter than a row, so that a row lies in several batches and parts."""
    stream = make_stream(tmp_path, "tiny", 1, parts=40, batches=2, longest=9)
    loader = Loader({"tiny": stream}, order_of(batch_rows=stream.num_tokens // 64, seq_len=64, steps=1))
    whole = np.concatenate([[END], stream.read(0, stream.num_tokens)])
    rows, samples = loader.read(1), loader.samples(1)
    for inputs, labels, row in zip(rows.inputs, rows.labels, samples.row.tolist(), strict=True):
        assert (inputs == whole[row * 64 : row * 64 + 64]).all()
        assert (labels == whole[row * 64 + 1 : row * 64 + 65]).all()


def test_few_rows_and_many_are_read_alike(streams, monkeypatch):
    batches = {}
    for rows in (1, 10**6):
        monkeypatch.setattr(loader_module, "ROWS_AT_ONCE", rows)
        loader = Loader(streams, order_of(batch_rows=64))
        batches[rows] = [loader.read(step) for step in range(1, 12)]
    for one, other in zip(*batches.values(), strict=True):
        assert (one.inputs == other.inputs).all()
        assert (one.labels == other.labels).all()
        assert (one.documents == other.documents).all()


def test_rows_of_any_place_are_gathered(streams):
    stream = streams["web"]
    whole = np.concatenate([[END], stream.read(0, stream.num_tokens)])
    starts = np.arange(-1, stream.num_tokens - SEQ_LEN + 1)  # over every border of batches and parts
    ids = stream.gather(starts[::-1], SEQ_LEN)
    assert ids.dtype == np.uint16
    assert (ids[::-1] == np.lib.stride_tricks.sliding_window_view(whole, SEQ_LEN)).all()
    assert stream.gather(starts[:0], SEQ_LEN).shape == (0, SEQ_LEN)


def test_documents_need_not_be_numbered(streams):
    loader = Loader(streams, order_of())
    assert loader.read(1, documents=False).documents is None
    assert (loader.read(1, documents=False).inputs == loader.read(1).inputs).all()


def test_large_vocabularies_are_read_as_well(tmp_path):
    stream = make_stream(tmp_path, "large", 20, first=70_000, vocabulary=100_000)
    loader = Loader({"large": stream}, order_of())
    assert loader.read(1).labels.max() > 2**16


# The order


@pytest.mark.parametrize("packing", PACKINGS, ids=by_kind)
def test_a_batch_is_the_same_however_it_is_shared_out(streams, packing):
    loader = Loader(streams, order_of(packing, batch_rows=24))
    for step in (1, 2, 57):
        whole = loader.read(step)
        for size in (1, 2, 3, 8, 12):
            other = Loader(streams, order_of(packing, batch_rows=24))
            parts = [other.read(step, slice(first, first + size)) for first in range(0, 24, size)]
            for name in ("inputs", "labels", "documents"):
                assert (np.concatenate([getattr(part, name) for part in parts]) == getattr(whole, name)).all()


def test_the_order_of_samples_does_not_depend_on_the_size_of_a_batch(streams):
    one = samples_of(Loader(streams, order_of(batch_rows=1, steps=240)), 240)
    for batch_rows in (3, 8, 240):
        steps = 240 // batch_rows
        assert samples_of(Loader(streams, order_of(batch_rows=batch_rows, steps=steps)), steps) == one


def test_steps_may_be_asked_for_in_any_order(streams, monkeypatch):
    forward = Loader(streams, order_of())
    expected = {step: forward.samples(step).row.tolist() for step in range(1, 60)}
    monkeypatch.setattr(loader_module, "CHUNK", 32)  # many chunks, of which few are kept
    backward = Loader(streams, order_of())
    for step in (57, 3, 2, 1, 58, 30, 31, 3):
        assert backward.samples(step).row.tolist() == expected[step]


AHEAD_STEPS = [*range(1, 40), 7, 8, 9, 9, 57, *range(30, 61), *range(95, 101), 3]


@pytest.mark.parametrize("ahead", [1, 3 * 8 * SEQ_LEN, 10**6], ids=["none", "three", "all"])
@pytest.mark.parametrize("packing", PACKINGS, ids=by_kind)
def test_a_step_is_the_same_however_many_are_read_with_it(streams, packing, ahead, monkeypatch):
    warmup = [WarmUp(tokens=20 * 8 * SEQ_LEN, seq_len=4)]
    expected = {s: Loader(streams, order_of(packing, warmup=warmup)).read(s) for s in set(AHEAD_STEPS)}
    monkeypatch.setattr(loader_module, "AHEAD_TOKENS", ahead)
    loader = Loader(streams, order_of(packing, warmup=warmup))
    for number, step in enumerate(AHEAD_STEPS):
        documents, mine = number % 10 != 9, slice(2, 7) if 20 < number < 30 else slice(None)
        found = loader.read(step, mine, documents)
        cut = loader.order.seq_len // loader.row_length(step)
        rows = slice((mine.start or 0) * cut, None if mine.stop is None else mine.stop * cut)
        assert (found.inputs == expected[step].inputs[rows]).all()
        assert (found.labels == expected[step].labels[rows]).all()
        assert (found.documents == expected[step].documents[rows]).all() if documents else found.documents is None


def test_what_is_read_ahead_is_little_at_first_and_bounded(streams, monkeypatch):
    monkeypatch.setattr(loader_module, "AHEAD_TOKENS", 5 * 8 * SEQ_LEN)
    loader, read = Loader(streams, order_of(steps=24)), []
    read_whole = loader._read_whole

    def counted(sources, numbers, documents):
        read.append(len(numbers) // 8)
        return read_whole(sources, numbers, documents)

    monkeypatch.setattr(loader, "_read_whole", counted)
    for step in range(1, 25):
        loader.read(step)
    assert read == [1, 2, 4, 5, 5, 5, 2]  # and nothing behind the last step
    for step in (9, 20, 5):
        loader.read(step)
    assert read[7:] == [1, 1, 1]  # what does not follow is read alone


def test_every_epoch_of_every_source_has_each_row_once(streams):
    mixture = Weights(weights={"web": 0.5, "code": 0.3, "books": 0.2})
    loader = Loader(streams, order_of(mixture=mixture, steps=400))
    samples = samples_of(loader, 400)
    complete = 0
    for (source, epoch), count in Counter((source, epoch) for source, epoch, _ in samples).items():
        rows = [row for s, e, row in samples if (s, e) == (source, epoch)]
        assert len(set(rows)) == count
        if count == loader.sizes[source]:
            complete += 1
            assert sorted(rows) == list(range(count))
    assert complete > 10


def test_another_seed_or_name_is_another_order(streams):
    def rows(name, seed):
        return Loader({name: streams["web"]}, order_of(seed=seed)).samples(1).row.tolist()

    assert rows("web", 3) == rows("web", 3)
    assert len({tuple(rows("web", 3)), tuple(rows("web", 4)), tuple(rows("code", 3))}) == 3


def test_the_keys_of_the_sources_never_change_between_versions(streams):
    # a run that is continued with a newer version must see the same data
    keys = [228225829309530862, 883863377003460931, 8879019891015036199]
    assert Loader(streams, order_of(seed=3))._seeds == keys


def test_sources_named_in_another_order_are_the_same_mixture(streams):
    first = samples_of(Loader(streams, order_of()), 20)
    assert samples_of(Loader(dict(reversed(streams.items())), order_of()), 20) == first


def test_shares_are_those_asked_for_at_every_step(streams):
    weights = {"web": 0.62, "code": 0.25, "books": 0.13}
    loader = Loader(streams, order_of(mixture=Weights(weights=weights)))
    for step in range(1, 101):
        counts = loader.counts(step)
        assert sum(counts.values()) == 8 * step
        for name, weight in weights.items():
            assert abs(counts[name] - 8 * step * weight) < 1


def test_in_a_phase_on_one_source_there_is_no_other(streams):
    phases = (
        Phase(tokens=40 * SEQ_LEN, mixture=Temperature()),
        Phase(mixture=Weights(weights={"web": 0.0, "code": 0.0, "books": 1.0})),
    )
    loader = Loader(streams, order_of(mixture=Phases(phases=phases)))
    sources = [source for source, _, _ in samples_of(loader, 10)]
    assert set(sources[:40]) == {0, 1, 2}
    assert set(sources[40:]) == {loader.names.index("books")}


@pytest.mark.parametrize("packing", PACKINGS, ids=by_kind)
def test_shorter_sequences_at_first_are_the_same_tokens_in_more_rows(streams, packing):
    warmup = [WarmUp(tokens=2 * 8 * SEQ_LEN, seq_len=4), WarmUp(tokens=3 * 8 * SEQ_LEN, seq_len=8)]
    short, long = (Loader(streams, order_of(packing, warmup=part)) for part in (warmup, ()))
    for step, length in ((1, 4), (2, 4), (3, 8), (4, 16), (5, 16)):
        found, wanted = short.read(step), long.read(step)
        assert short.row_length(step) == length
        assert found.inputs.shape == (8 * SEQ_LEN // length, length)
        assert (found.labels.ravel() == wanted.labels.ravel()).all()
        mine = short.read(step, slice(2, 5))
        assert (mine.labels.ravel() == wanted.labels[2:5].ravel()).all()


def test_a_thread_may_read_ahead(streams):
    expected = Loader(streams, order_of(BestFit()))
    loader, found = Loader(streams, order_of(BestFit())), {}

    def read(steps):
        for step in steps:
            found[step] = loader.read(step).labels

    threads = [threading.Thread(target=read, args=(range(first, 60, 2),)) for first in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((found[step] == expected.read(step).labels).all() for step in range(1, 60))


# The ledger


def labels_of_spans(stream, spans):
    """Look the tokens of spans up by document id, not by place."""
    documents = {}
    for window in range(len(stream.window_starts) - 1):
        bounds = stream.bounds(window).tolist()
        for start, stop in pairwise(bounds):
            (span,) = stream.spans(start, stop)
            documents[span.id] = stream.read(start, stop - start)
    return np.concatenate([documents[span.id][span.begin : span.end] for span in spans])


@pytest.mark.parametrize("packing", PACKINGS, ids=by_kind)
def test_spans_say_which_documents_the_labels_are_of(streams, packing):
    loader = Loader(streams, order_of(packing))
    for step in (1, 40):
        labels = loader.read(step).labels
        spans = list(loader.spans(step))
        assert len(spans) == 8
        for (name, found), row in zip(spans, labels, strict=True):
            assert all(span.source == name for span in found)
            assert (labels_of_spans(streams[name], found) == row[row != IGNORED]).all()


@pytest.mark.parametrize("packing", PACKINGS, ids=by_kind)
def test_the_steps_of_a_document_are_those_whose_spans_name_it(streams, packing):
    steps = 60
    mixture = Phases(
        phases=(
            Phase(tokens=200 * SEQ_LEN, mixture=Temperature()),
            Phase(mixture=Weights(weights={"web": 1.0, "code": 0.0, "books": 2.0})),
        ),
    )
    loader = Loader(streams, order_of(packing, mixture, steps=steps))
    seen = {}
    for step in range(1, steps + 1):
        for name, spans in loader.spans(step):
            for span in spans:
                seen.setdefault((name, span.id), set()).add(step)
    checked = 0
    for number, name in enumerate(loader.names):
        for start, stop in list(streams[name].documents())[::7]:
            (span,) = streams[name].spans(start, stop)
            assert loader.steps_of(number, start, stop) == sorted(seen.get((name, span.id), ()))
            assert streams[name].find(span.id) == [(start, stop)]
            checked += 1
    assert checked > 30
    assert max(len(steps) for steps in seen.values()) > 2  # some were gone through several times


# Bad input


def test_a_source_smaller_than_one_sequence_is_refused_by_name(streams, tmp_path):
    tiny = make_stream(tmp_path, "tiny", 1, parts=1, batches=1, longest=4)
    with pytest.raises(ArtifactError, match=r"tokens 'tiny': has \d tokens, fewer than one sequence of 16; use more"):
        Loader({**streams, "tiny": tiny}, order_of())


def test_more_steps_than_the_epochs_allow_are_refused_by_name(streams):
    mixture = Weights(weights={"web": 1.0, "code": 0.0, "books": 1.0})
    rows = streams["books"].num_tokens // SEQ_LEN
    enough = rows * 4 * 2 // 8
    Loader(streams, order_of(mixture=mixture, steps=enough, max_epochs=4))
    with pytest.raises(ConfigError) as error:
        Loader(streams, order_of(mixture=mixture, steps=enough + 2, max_epochs=4))
    assert str(error.value).startswith(f"max_epochs: {enough + 2:,} steps go 4.")
    assert "times through 'books'" in str(error.value)
    assert f"at most 4 are allowed; use at most {enough:,} steps, more text or another mixture, or raise it" in str(
        error.value
    )
    Loader(streams, order_of(mixture=mixture, steps=10**6))


def test_epochs_that_were_asked_for_are_held(streams):
    mixture = Epochs(epochs={"web": 1.0, "code": 2.0, "books": 0.5})
    sizes = Loader(streams, order_of(steps=1)).sizes
    total = sum(size * epochs for size, epochs in zip(sizes, (0.5, 2.0, 1.0), strict=True))
    steps = int(total // 8)
    counts = Loader(streams, order_of(mixture=mixture, steps=steps)).counts(steps)
    for name, size in zip(("books", "code", "web"), sizes, strict=True):
        assert counts[name] == pytest.approx(size * mixture.epochs[name], abs=8)
    with pytest.raises(ConfigError, match="mixture.epochs: .* steps go .* times through"):
        Loader(streams, order_of(mixture=mixture, steps=steps + 5))


@pytest.mark.parametrize("packing", PACKINGS, ids=by_kind)
def test_an_id_outside_the_vocabulary_is_refused_with_its_part(streams, packing):
    web = streams["web"]
    narrow = TokenStream(web.names, [b - a for a, b in pairwise(web.begins)], END, 500)
    loader = Loader({"web": narrow}, order_of(packing, batch_rows=Contiguous().pack(web, SEQ_LEN).num_rows))
    with pytest.raises(ArtifactError, match=r"web-\d.arrow: has the id \d+, but the vocabulary has 500; "):
        loader.read(1)


def test_a_part_that_is_not_what_the_manifest_says_is_refused(streams):
    web = streams["web"]
    sizes = [b - a for a, b in pairwise(web.begins)]
    wrong = TokenStream(web.names, [sizes[0] + 1, *sizes[1:]], END, VOCABULARY)
    with pytest.raises(ArtifactError, match=f"the manifest says {sizes[0] + 1} tokens, found {sizes[0]}; tokenize"):
        wrong.read(0, 5)
    wide = TokenStream(web.names, sizes, END, 100_000)
    with pytest.raises(ArtifactError, match="wanted ids of uint32 for a vocabulary of 100000, found uint16"):
        wide.read(0, 5)


def test_parts_are_opened_when_they_are_read_and_no_more_than_may_be(streams, monkeypatch):
    opened = []

    def find(name):
        opened.append(name)
        return Path(name)

    monkeypatch.setattr(stream_module, "MAX_OPEN_PARTS", 2)
    web = streams["web"]
    sizes = [b - a for a, b in pairwise(web.begins)]
    lazy = TokenStream(web.names, sizes, END, VOCABULARY, find_part=find)
    loader = Loader({"web": lazy}, order_of(batch_rows=32))
    assert not opened
    expected = Loader({"web": web}, order_of(batch_rows=32))
    for step in range(1, 6):
        assert (loader.read(step).inputs == expected.read(step).inputs).all()
    assert len(lazy._parts) <= 2
    assert set(opened) == set(web.names)
