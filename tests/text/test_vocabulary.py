import json

import numpy as np
import pytest

from pipeline.text import vocabulary
from pipeline.text.arrow import Document, read_texts, write_corpus
from pipeline.text.vocabulary import Tally, describe, headline

WORDS = ["<end>", "a", "bb", "ccc", "\N{REPLACEMENT CHARACTER}", "dd dd"]
DOCUMENTS = [
    Document("1", "a bb", "web", '{"lang": "en"}'),
    Document("2", "a", "web", '{"language": "de"}'),
    Document("3", "é", "books", '{"lang": 5, "language": "en"}'),
    Document("4", "ccc", "web"),
]
VALUES, LENGTHS = np.array([1, 2, 0, 1, 0, 4, 4, 0, 3, 0], np.uint16), np.array([3, 2, 3, 2])


def decode(ids):
    return " ".join(WORDS[number] for number in ids)


@pytest.fixture
def batch(tmp_path):
    write_corpus(tmp_path / "part.arrow", DOCUMENTS)
    (found,) = read_texts(tmp_path / "part.arrow", 1 << 20)
    return found


@pytest.fixture
def tally(batch):
    made = Tally(len(WORDS))
    made.add(batch, VALUES, LENGTHS)
    return made


def test_everything_is_counted_by_source_and_language(tally):
    assert tally.counts.tolist() == [4, 2, 1, 1, 2, 0]
    assert tally.sources == {"web": [3, 8, 7], "books": [1, 2, 3]}
    assert tally.languages == {"en": [2, 6, 6], "de": [1, 1, 2]}


def test_long_batches_are_counted_whole(batch, tally, monkeypatch):
    monkeypatch.setattr(vocabulary, "COUNTED_AT_ONCE", 3)
    made = Tally(len(WORDS))
    made.add(batch, VALUES, LENGTHS)
    assert made.counts.tolist() == tally.counts.tolist()


def test_an_id_outside_the_vocabulary_is_refused(batch):
    with pytest.raises(IndexError, match=r"id 4 is not in a vocabulary of 4"):
        Tally(4).add(batch, VALUES, LENGTHS)


def test_tallies_add_up_and_survive_being_written(batch, tally):
    tally.sample("a bb", [1, 2], decode)
    copy = Tally.from_plain(json.loads(json.dumps(tally.plain())))
    assert copy.plain() == tally.plain()
    copy.add(batch, VALUES, LENGTHS)
    copy.merge(tally)
    assert copy.counts.tolist() == [12, 6, 3, 3, 6, 0]
    assert copy.sources == {"web": [9, 24, 21], "books": [3, 6, 9]}
    assert copy.languages == {"en": [6, 18, 18], "de": [3, 3, 6]}
    assert copy.sampled == {"documents": 2, "exact": 2, "tokens": 4, "words": 4}


def test_the_sample_is_read_back(tally, monkeypatch):
    tally.sample("a bb", [1, 2], decode)
    tally.sample("A bb", [1, 2], decode)
    monkeypatch.setattr(vocabulary, "SAMPLE_TOKENS", 2)
    tally.sample("a bb ccc", [1, 2, 3], decode)  # read back as far as it goes
    tally.sample("a é", [1, 4, 4], decode)  # cut within a character
    tally.sample("b é", [1, 4, 4], decode)
    assert tally.sampled == {"documents": 5, "exact": 3, "tokens": 13, "words": 11}
    assert headline(tally, [0]) == {
        "fertility": 13 / 11,
        "unused_fraction": 1 / 5,
        "round_trip_documents": 5,
        "round_trip_fraction": 0.6,
    }


def test_the_description_leaves_special_tokens_out(tally):
    found = describe(tally, [0], decode)
    assert [token["text"] for token in found["longest"]] == ["dd dd", "ccc", "bb", "a", "\N{REPLACEMENT CHARACTER}"]
    assert found["longest"][1] == {"id": 3, "text": "ccc", "count": 1}
    assert found["unused"] == {"tokens": 1, "longest": ["dd dd"]}
    assert found["counts"] == [4, 2, 1, 1, 2, 0]
    assert found["sources"][0] == {"name": "web", "documents": 3, "bytes": 8, "tokens": 7}
    assert [group["name"] for group in found["languages"]] == ["en", "de"]


def test_many_sources_become_few(tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary, "MAX_NAMES", 5)
    monkeypatch.setattr(vocabulary, "SHOWN_NAMES", 2)
    write_corpus(tmp_path / "part.arrow", [Document(str(n), "x" * (n + 1), f"s{n}") for n in range(8)])
    (batch,) = read_texts(tmp_path / "part.arrow", 1 << 20)
    tally = Tally(2)
    tally.add(batch, np.zeros(8, np.uint16), np.ones(8, np.int64))
    assert tally.sources["(other)"] == [3, 6 + 7 + 8, 3]
    assert describe(tally, [0], lambda ids: "x")["sources"] == [
        {"name": "s4", "documents": 1, "bytes": 5, "tokens": 1},
        {"name": "s3", "documents": 1, "bytes": 4, "tokens": 1},
        {"name": "(other)", "documents": 6, "bytes": 27, "tokens": 6},
    ]
