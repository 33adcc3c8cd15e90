import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ArtifactError, ConfigError
from pipeline.settings import Source, decode, marked
from pipeline.stage import Run
from pipeline.stages.shard import Shard
from pipeline.text import lines
from pipeline.text.arrow import read_corpus, read_rejects
from pipeline.text.corpus import CorpusWriter

MINI = Path(__file__).parents[1] / "data" / "mini.jsonl"
ROWS = [json.loads(line) for line in MINI.read_text().splitlines()]


def shard(*sources, **settings) -> Shard:
    return decode(Shard, {"kind": "shard", "sources": list(sources), **settings})


def documents(artifact):
    return [document for name in artifact.parts() for document in read_corpus(artifact.file(name))]


def rejects(artifact):
    return [reject for name in artifact.parts("rejects-") for reject in read_rejects(artifact.file(name))]


def write(path: Path, rows) -> dict:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return {"path": str(path)}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A directory with a file of every kind, and a bad row in some."""
    raw = tmp_path / "raw"
    raw.mkdir()
    write(raw / "a.jsonl", [*ROWS[:6], "{bad\n", {"text": " "}, *ROWS[6:9]])
    (raw / "b.jsonl.gz").write_bytes(gzip.compress(MINI.read_bytes()))
    pq.write_table(pa.Table.from_pylist(ROWS[3:12]), raw / "c.parquet", row_group_size=2)
    for number in range(12):
        (raw / f"d{number:02}.txt").write_text(f"short text {number}")
    (raw / "e.txt").write_bytes(b"caf\xe9")
    return raw


def test_every_document_is_there_in_order(tmp_path, run_stage):
    made = run_stage(shard({"path": str(MINI), "reader": {"kind": "jsonl", "id_field": "id"}}), {}, tmp_path / "out")
    assert [(d.id, d.text) for d in documents(made)] == [(row["id"], row["text"]) for row in ROWS]
    assert made.stats["documents"] == made.stats["documents_in"] == len(ROWS)
    assert made.stats["bytes"] == sum(len(row["text"].encode()) for row in ROWS)
    assert made.manifest.kind == "corpus"


def test_ranks_and_restarts_change_nothing(mixed, same_on_any_ranks, monkeypatch):
    monkeypatch.setattr(lines, "UNIT_BYTES", 8_000)
    made = same_on_any_ranks(shard({"path": str(mixed)}, part_bytes=6_000), {})
    assert len(made.parts()) > 10
    assert {reject.reason for reject in rejects(made)} == {"bad_json", "empty", "bad_utf8"}
    assert made.stats["documents"] == len(documents(made)) == 9 + 19 + 9 + 12
    assert (made.stats["documents_in"], made.stats["dropped.bad_utf8"]) == (9 + 19 + 9 + 12 + 3, 1)


def test_a_kill_in_the_middle_of_a_unit_changes_nothing(mixed, run_stage, tmp_path, monkeypatch):
    stage = shard({"path": str(mixed)}, part_bytes=6_000)
    whole = run_stage(stage, {}, tmp_path / "whole")
    keep = CorpusWriter.keep
    for deadly in (1, 9, 30):
        left = iter(range(deadly))

        def dying_keep(writer, document, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            keep(writer, document)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(CorpusWriter, "keep", dying_keep)
            run_stage(stage, {}, tmp_path / "again")
    again = run_stage(stage, {}, tmp_path / "again")
    assert again.manifest.files == whole.manifest.files
    assert again.stats == whole.stats


def test_units_of_any_size_give_the_same_rows(mixed, run_stage, tmp_path, monkeypatch):
    whole = documents(run_stage(shard({"path": str(mixed)}), {}, tmp_path / "whole"))
    for unit_bytes in (500, 20_000):
        monkeypatch.setattr(lines, "UNIT_BYTES", unit_bytes)
        cut = run_stage(shard({"path": str(mixed)}), {}, tmp_path / f"cut{unit_bytes}", 2)
        assert documents(cut) == whole


def test_small_files_share_a_unit(mixed, run_stage, tmp_path):
    made = run_stage(shard({"path": str(mixed / "d*.txt")}), {}, tmp_path / "out")
    assert made.parts() == ["part-00000-00000.arrow"]
    assert [d.id for d in documents(made)] == [f"d{number:02}.txt:0" for number in range(12)]


def test_parts_hold_about_part_bytes(tmp_path, run_stage):
    made = run_stage(shard({"path": str(MINI)}, part_bytes=10_000), {}, tmp_path / "out")
    sizes = [sum(len(d.text.encode()) for d in read_corpus(made.file(name))) for name in made.parts()]
    assert all(10_000 <= size < 15_000 for size in sizes[:-1])
    assert made.parts() == [f"part-00000-{n:05d}.arrow" for n in range(len(sizes))]


def test_rows_not_wanted_are_skipped_and_counted(tmp_path, run_stage):
    source = write(tmp_path / "a.jsonl", [{"text": "a", "lang": "en"}, {"text": "b", "lang": "de"}, {"text": ""}])
    made = run_stage(shard(source | {"reader": {"kind": "auto", "where": {"lang": "en"}}}), {}, tmp_path / "out")
    assert [d.text for d in documents(made)] == ["a"]
    assert (made.stats["skipped.where"], made.stats["documents_in"]) == (2, 3)
    assert rejects(made) == []


def test_files_of_one_name_in_two_sources_get_different_ids(tmp_path, run_stage):
    sources = []
    for folder in ("x", "y", "z"):
        (tmp_path / folder).mkdir()
        sources.append(write(tmp_path / folder / "a.jsonl", [{"text": folder}]))
    made = run_stage(shard(*sources), {}, tmp_path / "out")
    assert [(d.id, d.source) for d in documents(made)] == [
        ("a.jsonl:0", "a"),
        ("1/a.jsonl:0", "a"),
        ("2/a.jsonl:0", "a"),
    ]


def test_one_file_may_be_two_sources(tmp_path, run_stage):
    source = write(tmp_path / "a.jsonl", [{"text": "a", "lang": "en"}, {"text": "b", "lang": "de"}])
    readers = [{"reader": {"kind": "jsonl", "where": {"lang": lang}, "source": lang}} for lang in ("de", "en")]
    made = run_stage(shard(*(source | reader for reader in readers)), {}, tmp_path / "out")
    assert [(d.source, d.text) for d in documents(made)] == [("de", "b"), ("en", "a")]


def test_ids_that_are_not_unique_are_refused(tmp_path, run_stage):
    source = write(tmp_path / "a.jsonl", [{"text": "a" * 50, "id": n % 4} for n in range(6)])
    stage = shard(source | {"reader": {"kind": "jsonl", "id_field": "id"}}, part_bytes=100)
    with pytest.raises(
        ArtifactError,
        match=r"sources: 2 ids are there more than once; the first is '0', in part-00000-00000\.arrow and "
        r"part-00000-00002\.arrow; choose an id_field that is unique, or null",
    ):
        run_stage(stage, {}, tmp_path / "out")


@pytest.mark.parametrize(
    ("rows", "reader", "message"),
    [
        (
            [{"body": "x", "n": 1}] * 3,
            {},
            r"sources\.0: none of the 3 rows of .*a\.jsonl can be used; the first problem is no_text at a\.jsonl:0: "
            r"no field 'text'; there is body, n; choose sources\.0\.reader\.text_field",
        ),
        ([{"txt": "x"}], {}, r"there is txt; did you mean 'txt'\?; choose sources\.0\.reader\.text_field"),
        ([{"text": "x"}], {"id_field": "id"}, r"no_id at a\.jsonl:0: .*choose sources\.0\.reader\.id_field"),
        (["[\n", '{"text": "a"}]\n'], {}, r"bad_json at a\.jsonl:0: .* read by sources\.0\.reader\.kind: datasets"),
        ([{"text": ""}], {}, r"empty at a\.jsonl:0: no text but white space$"),
        (
            [{"text": "x", "lang": "en"}] * 2,
            {"where": {"lang": "de"}},
            r"sources\.0\.reader\.where: none of the 2 rows of .* is wanted; wanted lang = 'de', but the first row "
            r"has lang = 'en'",
        ),
        ([{"text": "x", "lang": "en"}], {"where": {"lng": "en"}}, r"no field 'lng'; there is lang, text; did you mean"),
        (["\n"], {}, r"sources\.0\.path: .*a\.jsonl: there is no text in it; looked into 1 file$"),
    ],
)
def test_a_source_that_gives_nothing_is_refused_with_the_reason(tmp_path, run_stage, rows, reader, message):
    source = write(tmp_path / "a.jsonl", rows) | {"reader": {"kind": "jsonl", **reader}}
    with pytest.raises(ArtifactError, match=message):
        run_stage(shard(source), {}, tmp_path / "out")


def test_one_empty_source_among_others_is_refused(tmp_path, run_stage):
    sources = [write(tmp_path / "a.jsonl", [{"text": "x"}]), write(tmp_path / "b.jsonl", [{"txt": "x"}])]
    with pytest.raises(ArtifactError, match=r"sources\.1: none of the 1 rows of .*b\.jsonl can be used"):
        run_stage(shard(*sources), {}, tmp_path / "out")


def test_a_missing_source_is_an_error(tmp_path, run_stage):
    with pytest.raises(ArtifactError, match=r"gone\.jsonl: no such file or directory"):
        run_stage(shard({"path": str(tmp_path / "gone.jsonl")}), {}, tmp_path / "out")


def test_settings():
    stage = shard({"path": "a"}, {"path": "b", "reader": {"kind": "text"}})
    assert [(place, value) for place, _, value in marked(stage, Source)] == [
        ("sources.0.path", "a"),
        ("sources.1.path", "b"),
    ]
    with pytest.raises(ConfigError, match=r"sources\.0\.reader\.kind: no reader is called 'jsnl'"):
        shard({"path": "a", "reader": {"kind": "jsnl"}})
    with pytest.raises(ConfigError, match="sources"):
        shard()


def test_the_disk_estimate_counts_decompressed_text(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"x" * 100)
    (tmp_path / "b.jsonl").write_bytes(b"x" * 100)
    (tmp_path / "c.parquet").write_bytes(b"x" * 100)
    assert shard({"path": str(tmp_path)}).disk_bytes(300, Run(kind="local")) == 900
