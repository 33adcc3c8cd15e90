import json
from pathlib import Path

import pytest

from pipeline.errors import ArtifactError
from pipeline.settings import decode
from pipeline.stages.clean import Clean
from pipeline.text.arrow import read_corpus, read_rejects

MINI = Path(__file__).parents[1] / "data" / "mini.jsonl"
TEXTS = [json.loads(line)["text"] for line in MINI.read_text().splitlines()]
SPAM = "buy now, pay later\n" * 100


def clean(**settings) -> Clean:
    return decode(Clean, {"kind": "clean", "corpus": "@shards", **settings})


def texts(artifact):
    return [document.text for name in artifact.parts() for document in read_corpus(artifact.file(name))]


def rejects(artifact):
    return [reject for name in artifact.parts("rejects-") for reject in read_rejects(artifact.file(name))]


def test_the_books_balance_on_any_ranks(texts_to_corpus, same_on_any_ranks):
    corpus = texts_to_corpus([*TEXTS[:10], "tiny", SPAM, *TEXTS[10:], "e\u0301 " * 20 + "\r\n"], part_bytes=4_000)
    assert len(corpus.parts()) > 5
    made = same_on_any_ranks(clean(), {"corpus": corpus})
    assert texts(made) == [*TEXTS, "é " * 20 + "\n"]
    assert [(r.id, r.reason, r.text) for r in rejects(made)] == [
        ("d10", "too_short", None),
        ("d11", "repeated_lines", None),
    ]
    assert made.stats["documents_in"] == len(TEXTS) + 3
    assert made.stats["documents"] == len(TEXTS) + 1
    assert made.stats["bytes"] == sum(len(text.encode()) for text in texts(made))
    assert (made.stats["dropped.too_short"], made.stats["dropped.repeated_lines"]) == (1, 1)
    assert Clean.headline(made.stats) == ("20 documents", "2 dropped")


def test_parts_keep_their_names_and_documents_their_fields(tmp_path, texts_to_corpus, run_stage):
    corpus = texts_to_corpus(TEXTS, part_bytes=10_000)
    made = run_stage(clean(), {"corpus": corpus}, tmp_path / "clean")
    assert made.parts() == corpus.parts()
    for name in made.parts():
        assert list(read_corpus(made.file(name))) == list(read_corpus(corpus.file(name)))


def test_rejected_texts_are_kept_where_asked(tmp_path, texts_to_corpus, run_stage):
    corpus = texts_to_corpus([TEXTS[0], "tiny\r\n"])
    made = run_stage(clean(keep_rejected_text=True), {"corpus": corpus}, tmp_path / "clean")
    assert [(r.id, r.text) for r in rejects(made)] == [("d1", "tiny\r\n")]


def test_filters_are_asked_in_order(tmp_path, texts_to_corpus, run_stage):
    corpus = texts_to_corpus([min(TEXTS, key=len), SPAM])
    filters = [{"kind": "length", "max_chars": 1800}, {"kind": "repetition"}]
    for order, reason in ((filters, "too_long"), (filters[::-1], "repeated_lines")):
        made = run_stage(clean(filters=order), {"corpus": corpus}, tmp_path / reason)
        assert [r.reason for r in rejects(made)] == [reason]


def test_nothing_need_be_changed(tmp_path, texts_to_corpus, run_stage):
    odd = ["e\u0301\r\n", "x", SPAM]
    made = run_stage(clean(normalization=None, filters=[]), {"corpus": texts_to_corpus(odd)}, tmp_path / "clean")
    assert texts(made) == odd


def test_a_part_of_which_nothing_is_left_is_not_written(tmp_path, texts_to_corpus, run_stage):
    corpus = texts_to_corpus(["tiny", TEXTS[0]], part_bytes=1)
    made = run_stage(clean(), {"corpus": corpus}, tmp_path / "clean")
    assert made.names == ["part-00000-00001.arrow", "rejects-00000-00000.arrow"]


def test_nothing_left_at_all_is_an_error(tmp_path, texts_to_corpus, run_stage):
    with pytest.raises(
        ArtifactError, match=r"nothing is left of 2 documents; dropped: too_short: 2; loosen the filters"
    ):
        run_stage(clean(), {"corpus": texts_to_corpus(["a", "b"])}, tmp_path / "clean")


def test_a_damaged_part_is_not_read(tmp_path, texts_to_corpus, run_stage, damage):
    corpus = texts_to_corpus(TEXTS)
    damage(corpus.path / corpus.parts()[0])
    with pytest.raises(ArtifactError, match=r"part-00000-00000\.arrow: damaged"):
        run_stage(clean(), {"corpus": corpus}, tmp_path / "clean")


def test_a_document_that_got_lost_is_noticed(tmp_path, texts_to_corpus, run_stage):
    corpus = texts_to_corpus(TEXTS)
    corpus.manifest.stats["documents"] += 1
    with pytest.raises(ArtifactError, match="the books do not balance: 20 documents were to be read, 19 were"):
        run_stage(clean(), {"corpus": corpus}, tmp_path / "clean")
