import pytest

from pipeline.errors import ArtifactError
from pipeline.settings import decode
from pipeline.stages.dedup import Dedup
from pipeline.text.arrow import read_corpus, read_rejects

TEXTS = [f"text {number * number % 17}" for number in range(40)]


@pytest.fixture
def stage() -> Dedup:
    return decode(Dedup, {"kind": "dedup", "corpus": "@clean"})


def documents(artifact):
    return [document for name in artifact.parts() for document in read_corpus(artifact.file(name))]


def rejects(artifact):
    return [reject for name in artifact.parts("rejects-") for reject in read_rejects(artifact.file(name))]


def test_the_first_of_equal_texts_stays_whatever_the_parts(stage, tmp_path, texts_to_corpus, run_stage):
    first: dict[str, int] = {}
    for number, text in enumerate(TEXTS):
        first.setdefault(text, number)
    for part_bytes in (1, 50, 10_000):
        corpus = texts_to_corpus(TEXTS, part_bytes, f"raw{part_bytes}")
        made = run_stage(stage, {"corpus": corpus}, tmp_path / f"dedup{part_bytes}")
        assert [(d.id, d.text) for d in documents(made)] == [(f"d{n}", text) for text, n in first.items()]
        assert [(r.id, r.reason, r.detail) for r in rejects(made)] == [
            (f"d{n}", "duplicate", f"d{first[text]}") for n, text in enumerate(TEXTS) if n != first[text]
        ]
        assert made.stats["documents"] == len(first)
        assert made.stats["dropped.duplicate"] == 40 - len(first)


def test_a_restart_changes_nothing(stage, texts_to_corpus, same_on_any_ranks, monkeypatch):
    monkeypatch.setattr("pipeline.stages.dedup.Dedup.ranks", "units")  # the helper runs it on several, to no harm
    assert same_on_any_ranks(stage, {"corpus": texts_to_corpus(TEXTS, 50)}).stats["documents_in"] == 40


def test_texts_that_differ_by_a_space_both_stay(stage, tmp_path, texts_to_corpus, run_stage):
    made = run_stage(stage, {"corpus": texts_to_corpus(["a b", "a  b", "a b "])}, tmp_path / "dedup")
    assert len(documents(made)) == 3
    assert made.names == ["part-00000-00000.arrow"]


def test_a_damaged_part_is_not_read(stage, tmp_path, texts_to_corpus, run_stage, damage):
    corpus = texts_to_corpus(TEXTS)
    damage(corpus.path / corpus.parts()[0])
    with pytest.raises(ArtifactError, match="damaged"):
        run_stage(stage, {"corpus": corpus}, tmp_path / "dedup")
