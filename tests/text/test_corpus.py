import errno

import pytest

from pipeline.artifact import Artifact
from pipeline.errors import ArtifactError
from pipeline.stage import Context, Output, Run
from pipeline.text.arrow import Document, Reject, read_corpus, read_rejects, write_corpus
from pipeline.text.corpus import CorpusStage, CorpusWriter, check_books, part_label
from pipeline.text.dedup import digest, find_duplicates, ids_at


def documents(count: int) -> list[Document]:
    return [Document(f"d{n}", "é" * 5, "s") for n in range(count)]


def context(tmp_path) -> Context:
    return Context("clean", tmp_path, {}, Run(kind="local"))


def test_parts_are_closed_once_they_are_full(tmp_path):
    output = Output(tmp_path)
    with CorpusWriter(output, "00007", part_bytes=20) as writer:
        for document in documents(5):
            writer.keep(document)
    assert sorted(output.files) == [f"part-00007-{n:05d}.arrow" for n in range(3)]
    assert [len(list(read_corpus(tmp_path / name))) for name in sorted(output.files)] == [2, 2, 1]
    assert output.stats == {"documents": 5, "bytes": 50}


def test_files_appear_only_where_there_is_something_to_put_in(tmp_path):
    output = Output(tmp_path)
    with CorpusWriter(output, "00000"):
        pass
    assert list(tmp_path.iterdir()) == []
    with CorpusWriter(output, "00000") as writer:
        writer.drop(Reject("a", "empty", "x" * 1000 + "\ud800"))
        writer.drop(Reject("b", "empty", "\udc80", "text"))
    assert list(output.files) == ["rejects-00000.arrow"]
    assert [(r.id, len(r.detail), r.text) for r in read_rejects(tmp_path / "rejects-00000.arrow")] == [
        ("a", 300, None),
        ("b", 6, "text"),
    ]
    assert output.stats == {"dropped.empty": 2}


def test_a_failure_leaves_nothing_under_a_final_name(tmp_path):
    def fail():
        with CorpusWriter(Output(tmp_path), "00000") as writer:
            writer.keep(documents(1)[0])
            writer.drop(Reject("a", "empty", ""))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert {path.suffix for path in tmp_path.iterdir()} <= {".tmp"}


def test_a_full_disk_is_said_in_one_line(tmp_path):
    def fill():
        with CorpusWriter(Output(tmp_path), "00000") as writer:
            writer.keep(documents(1)[0])
            raise OSError(errno.ENOSPC, "no space")

    with pytest.raises(ArtifactError, match=r"part-00000\.arrow: the disk is full"):
        fill()


def test_a_label_is_what_tells_parts_apart():
    assert part_label("part-00000-00001.arrow") == "00000-00001"


def test_books_balance(tmp_path):
    stats = {"documents_in": 10, "documents": 6, "dropped.empty": 3, "skipped.where": 1}
    check_books(context(tmp_path), stats)
    check_books(context(tmp_path), stats, 10)


@pytest.mark.parametrize(("change", "expected"), [({"documents": 5}, None), ({"dropped.x": 1}, None), ({}, 11)])
def test_books_that_do_not_balance_are_an_error(tmp_path, change, expected):
    stats = {"documents_in": 10, "documents": 6, "dropped.empty": 3, "skipped.where": 1} | change
    with pytest.raises(ArtifactError, match="the books do not balance: .*; delete this directory and run again"):
        check_books(context(tmp_path), stats, expected)


def test_nothing_left_is_an_error(tmp_path):
    stats = {"documents_in": 3, "dropped.too_short": 2, "dropped.empty": 1}
    with pytest.raises(
        ArtifactError, match=r"clean: nothing is left of 3 documents; dropped: too_short: 2, empty: 1; less"
    ):
        check_books(context(tmp_path), stats, way_out="less")


def test_a_person_sees_what_was_left_out(tmp_path):
    stats = {"documents": 1200, "dropped.a": 1, "dropped.b": 2000, "skipped.where": 5}
    assert CorpusStage.headline(stats) == ("1,200 documents", "2,001 dropped")
    artifact = Artifact.__new__(Artifact)
    object.__setattr__(artifact, "path", tmp_path)
    object.__setattr__(artifact, "manifest", type("Stub", (), {"stats": stats}))
    dropped, skipped = CorpusStage.show(artifact)
    assert dropped.startswith("dropped: b: 2,000, a: 1 (each document and its reason: ")
    assert skipped == "skipped: where: 5"


def test_duplicates_are_found_with_their_first():
    texts = ["a", "b", "a", "c", "b", "a", "", ""]
    repeats, firsts = find_duplicates(digest(texts))
    assert list(zip(repeats.tolist(), firsts.tolist(), strict=True)) == [(2, 0), (4, 1), (5, 0), (7, 6)]
    assert [len(found) for found in find_duplicates(digest([]))] == [0, 0]


def test_many_duplicates_are_found_as_a_dictionary_would():
    texts = [str(n * n % 3001) for n in range(20_000)]
    seen: dict[str, int] = {}
    expected = [(n, first) for n, text in enumerate(texts) if (first := seen.setdefault(text, n)) != n]
    repeats, firsts = find_duplicates(digest(texts))
    assert list(zip(repeats.tolist(), firsts.tolist(), strict=True)) == expected


def test_ids_at_counts_through_all_parts(tmp_path):
    write_corpus(tmp_path / "a", documents(3))
    write_corpus(tmp_path / "b", [Document("x", "t", "s"), Document("y", "t", "s")])
    assert ids_at([tmp_path / "a", tmp_path / "b"], {0, 3}) == {0: "d0", 3: "x"}
    assert ids_at([tmp_path / "a"], set()) == {}
