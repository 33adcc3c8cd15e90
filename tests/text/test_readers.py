import gzip
import json
import random
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ArtifactError, ConfigError
from pipeline.settings import Settings, decode
from pipeline.text import lines, rows
from pipeline.text.arrow import Document, Reject
from pipeline.text.readers import AnyReader, Arrow, Auto, Datasets, Jsonl, Parquet, Text

ROWS = [{"text": f"text {n} é漢", "id": f"r{n}", "lang": "de" if n % 3 else "en", "n": n} for n in range(200)]


class Holder(Settings):
    reader: AnyReader = Auto()


def read(reader, path: Path | str) -> list[Any]:
    return [outcome for span in reader.spans(str(path)) for outcome in reader.read(span)]


def write_jsonl(path: Path, items=ROWS) -> Path:
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in items).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_arrow_stream(path: Path, table: pa.Table) -> Path:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=30)
    return path


def write_arrow_file(path: Path, table: pa.Table) -> Path:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=30)
    return path


def write_parquet(path: Path, table: pa.Table) -> Path:
    pq.write_table(table, path, row_group_size=30)
    return path


def write_saved(path: Path, table: pa.Table) -> Path:
    datasets.Dataset(table).save_to_disk(str(path))
    return path


def write_csv(path: Path, table: pa.Table) -> Path:
    path.write_text("text,id,lang\n" + "".join(f'"{r["text"]}",{r["id"]},{r["lang"]}\n' for r in table.to_pylist()))
    return path


TABLES = [
    ("a.parquet", write_parquet, Parquet),
    ("a.arrow", write_arrow_stream, Arrow),
    ("a.feather", write_arrow_file, Arrow),
    ("a.saved", write_saved, Datasets),
]


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "a.jsonl")


# --- JSON lines ---


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", "a.jsonl.gz"])
@pytest.mark.parametrize("reader", [Jsonl(), Auto()])
def test_jsonl_gives_documents_named_by_their_place(tmp_path, name, reader):
    path = write_jsonl(tmp_path / name)
    found = read(reader, path)
    assert [d.text for d in found] == [row["text"] for row in ROWS]
    assert {d.source for d in found} == {"a"}
    assert found[0].id == f"{name}:0"
    assert len({d.id for d in found}) == len(ROWS)


def test_an_id_of_jsonl_is_where_its_line_starts(jsonl):
    for document in read(Jsonl(), jsonl):
        offset = int(document.id.rpartition(":")[2])
        assert json.loads(jsonl.read_bytes()[offset:].splitlines()[0])["text"] == document.text


@pytest.mark.parametrize("unit_bytes", [1, 7, 50, 333, 5_000])
def test_a_big_jsonl_in_many_units_gives_the_same_rows(jsonl, monkeypatch, unit_bytes):
    whole = read(Jsonl(), jsonl)
    monkeypatch.setattr(lines, "UNIT_BYTES", unit_bytes)
    assert len(Jsonl().spans(str(jsonl))) == -(-jsonl.stat().st_size // unit_bytes)
    assert read(Jsonl(), jsonl) == whole


def test_jsonl_with_crlf_blank_lines_byte_order_mark_and_no_end(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n   \n{"text": "two"}\n{"text": "three"}')
    assert [d.text for d in read(Jsonl(), path)] == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        (b"{bad", "bad_json", "Expecting property name"),
        (b'["a"]', "bad_json", "wanted an object, found a list"),
        (b'"a"', "bad_json", "wanted an object, found a string"),
        (b"[" * 100_000, "bad_json", "recursion"),
        (b'{"n": ' + b"9" * 5_000 + b"}", "bad_json", "digits"),
        (b'{"text": "caf\xe9"}', "bad_utf8", "byte 0xe9 at 13 is not UTF-8"),
        (b'{"text": "\\ud800"}', "bad_utf8", "surrogate"),
        (b'{"txt": "a", "n": 1}', "no_text", "no field 'text'; there is n, txt; did you mean 'txt'?"),
        (b"{}", "no_text", "no field 'text'; the row is empty"),
        (b'{"text": null}', "no_text", "field 'text' is null"),
        (b'{"text": 5}', "no_text", "field 'text' is a number"),
        (b'{"text": ["a"]}', "no_text", "field 'text' is a list"),
        (b'{"text": ""}', "empty", "white space"),
        (b'{"text": " \\n\\t\\u3000"}', "empty", "white space"),
        ("ＵＴＦ".encode("utf-16"), "bad_utf8", "byte 0xff at 0"),
    ],
)
def test_a_row_that_cannot_be_used_is_a_reject_with_its_reason(tmp_path, line, reason, detail):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
    before, reject, *_, after = read(Jsonl(), path)
    assert (before.text, after.text) == ("before", "after")
    assert isinstance(reject, Reject)
    assert (reject.id, reject.reason) == ("a.jsonl:19", reason)
    assert detail in reject.detail


def test_a_document_too_large_for_a_part_is_a_reject(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "é" * 10}, {"text": "é" * 11}])
    monkeypatch.setattr(rows, "MAX_DOCUMENT_BYTES", 20)
    kept, reject = read(Jsonl(), path)
    assert (kept.text, reject.reason) == ("é" * 10, "too_large")


def test_fields_become_id_source_and_meta(jsonl):
    reader = Jsonl(id_field="id", source_field="lang", meta_fields=["n", "gone"])
    assert read(reader, jsonl)[4] == Document("r4", "text 4 é漢", "de", '{"n": 4, "gone": null}')


def test_meta_is_json_that_strict_parsers_read(tmp_path):
    def refuse(constant):
        raise AssertionError(constant)

    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "n": NaN, "deep": {"x": [1.5, -Infinity, {"y": 1e999}], "s": "NaN"}}\n')
    [document] = read(Jsonl(meta_fields=["n", "deep"]), path)
    deep = {"x": [1.5, None, {"y": None}], "s": "NaN"}
    assert json.loads(document.meta, parse_constant=refuse) == {"n": None, "deep": deep}
    table = pa.table({"text": ["a"], "n": [float("nan")], "deep": [[1.0, float("inf")]]})
    [document] = read(Parquet(meta_fields=["n", "deep"]), write_parquet(tmp_path / "a.parquet", table))
    assert json.loads(document.meta, parse_constant=refuse) == {"n": None, "deep": [1.0, None]}


def test_fields_nested_at_any_depth_are_documents_or_rejects(tmp_path):
    depths = range(100, 3000, 50)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "a", "n": {"[" * n}NaN{"]" * n}}}\n' for n in depths))
    found = read(Jsonl(meta_fields=["n"]), path)
    assert len(found) == len(depths)
    assert isinstance(found[0], Document)
    details = [reject.detail for reject in found if isinstance(reject, Reject) and reject.reason == "bad_json"]
    assert "a field is nested too deeply to be written as JSON again" in details


def test_a_file_that_is_gone_when_it_is_read_is_an_error(jsonl):
    spans = Jsonl().spans(str(jsonl))
    jsonl.unlink()
    with pytest.raises(ArtifactError, match=r"a\.jsonl: no such file or directory; wanted"):
        list(Jsonl().read(spans[0]))


def test_a_numeric_id_is_fine_and_a_missing_one_is_a_reject(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "id": 7}, {"text": "b"}, {"text": "c", "id": ""}])
    seven, missing, empty = read(Jsonl(id_field="id"), path)
    assert seven.id == "7"
    assert (missing.reason, missing.detail) == ("no_id", "no field 'id'; there is text")
    assert (empty.reason, empty.detail) == ("no_id", "field 'id' is an empty string")


def test_where_keeps_rows_of_one_value(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "n": 1, "ok": True}, {"text": "b", "n": 2}, {"text": "c"}])
    assert [getattr(found, "text", None) for found in read(Jsonl(where={"n": "1"}), path)] == ["a", None, None]
    assert [getattr(found, "text", None) for found in read(Jsonl(where={"ok": "true"}), path)] == ["a", None, None]
    assert read(Jsonl(where={"n": "1", "ok": "false"}), path) == [None, None, None]


def test_the_source_is_what_the_setting_says(jsonl):
    assert {d.source for d in read(Jsonl(source="mine"), jsonl)} == {"mine"}
    with pytest.raises(ConfigError, match="source and source_field exclude each other"):
        decode(Jsonl, {"kind": "jsonl", "source": "a", "source_field": "b"})


# --- plain text ---


def test_text_files_are_documents(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\n")
    (tmp_path / "b.md").write_text("three")
    found = read(Auto(), tmp_path)
    assert [(d.id, d.text, d.source) for d in found] == [
        ("a.txt:0", "one\r\n\r\ntwo\n", "a"),
        ("b.md:0", "three", "b"),
    ]


@pytest.mark.parametrize(
    ("document", "expected"), [("line", ["one", "two", "three"]), ("paragraph", ["one\ntwo", "three"])]
)
@pytest.mark.parametrize("unit_bytes", [1, 3, 5, 100])
def test_text_by_line_and_by_paragraph(tmp_path, monkeypatch, document, expected, unit_bytes):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo\r\n\r\n\r\nthree")
    monkeypatch.setattr(lines, "UNIT_BYTES", unit_bytes)
    found = read(Text(document=document), path)
    assert [d.text for d in found] == expected
    assert [d.id for d in found][-1] == "a.txt:14"


def test_text_in_another_encoding_is_a_reject(tmp_path):
    for name, encoding in (("a.txt", "latin-1"), ("b.txt", "gb18030"), ("c.txt", "utf-16"), ("d.txt", "utf-8")):
        (tmp_path / name).write_bytes("größer 漢字"[: None if encoding != "latin-1" else 6].encode(encoding))
    found = read(Auto(), tmp_path)
    assert [getattr(outcome, "reason", None) for outcome in found] == ["bad_utf8", "bad_utf8", "bad_utf8", None]


def test_an_empty_text_file_is_a_reject(tmp_path):
    (tmp_path / "a.txt").write_text("")
    assert [reject.reason for reject in read(Text(), tmp_path)] == ["empty"]


def test_a_huge_text_file_is_not_read_whole(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x" * 1000)
    monkeypatch.setattr(lines, "MAX_DOCUMENT_BYTES", 100)
    monkeypatch.setattr(rows, "MAX_DOCUMENT_BYTES", 100)
    reject = read(Text(), tmp_path)[0]
    assert reject.reason == "too_large"
    assert "cut it into paragraphs or lines" in reject.detail


# --- tables ---


@pytest.mark.parametrize(("name", "write", "kind"), TABLES)
@pytest.mark.parametrize("auto", [True, False])
@pytest.mark.parametrize("unit_bytes", [1, 1_500, 1 << 26])
def test_tables_in_any_number_of_units_give_the_same_rows(tmp_path, monkeypatch, name, write, kind, auto, unit_bytes):
    path = write(tmp_path / name, pa.Table.from_pylist(ROWS))
    settings = {"where": {"lang": "en"}, "meta_fields": ["n"]}
    reader = Auto(**settings) if auto else kind(**settings)
    monkeypatch.setattr(lines, "UNIT_BYTES", unit_bytes)
    found = read(reader, path)
    assert len(found) == len(ROWS)
    stem = "dataset" if kind is Datasets else "a"
    label = stem if kind is Datasets else name
    for number, (row, outcome) in enumerate(zip(ROWS, found, strict=True)):
        expected = Document(f"{label}:{number}", row["text"], stem, json.dumps({"n": row["n"]}))
        assert outcome == (expected if row["lang"] == "en" else None)


@pytest.mark.parametrize(("name", "write", "kind"), TABLES[:3])
def test_one_huge_table_is_many_units(tmp_path, monkeypatch, name, write, kind):
    path = write(tmp_path / name, pa.Table.from_pylist(ROWS))
    monkeypatch.setattr(lines, "UNIT_BYTES", 1)
    assert len(kind().spans(str(path))) == 7


@pytest.mark.parametrize(("name", "write", "kind"), TABLES)
def test_a_table_without_the_field_is_refused_at_once(tmp_path, name, write, kind):
    path = write(tmp_path / name, pa.Table.from_pylist(ROWS))
    with pytest.raises(ArtifactError, match=r"no field 'txt'; there is id, lang, n, text; did you mean 'text'\?"):
        kind(text_field="txt").spans(str(path))


@pytest.mark.parametrize(("name", "write", "kind"), TABLES[:3])
def test_strings_of_tables_that_are_not_utf8_are_rejects(tmp_path, name, write, kind):
    raw = pa.array([b"good", b"caf\xe9", None], pa.binary())
    column = pa.StringArray.from_buffers(3, *raw.buffers()[1:], raw.buffers()[0])
    path = write(tmp_path / name, pa.table({"text": column}))
    good, bad, null = read(kind(), path)
    assert (good.text, bad.reason, null.reason) == ("good", "bad_utf8", "no_text")


@pytest.mark.parametrize(("kind", "name"), [(Parquet, "a.parquet"), (Arrow, "a.arrow")])
def test_a_damaged_table_is_an_error_that_names_it(tmp_path, kind, name):
    path = tmp_path / name
    path.write_bytes(random.Random(0).randbytes(1000))
    with pytest.raises(ArtifactError, match=rf"{name}: cannot be read as {name[2:]} "):
        kind().spans(str(path))


# --- datasets ---


def test_splits_of_a_saved_dataset(tmp_path):
    parts = {"train": datasets.Dataset.from_list(ROWS[:5]), "test": datasets.Dataset.from_list(ROWS[5:8])}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    found = read(Auto(), tmp_path / "saved")
    assert [d.id for d in found] == [*(f"train:{n}" for n in range(5)), *(f"test:{n}" for n in range(3))]
    assert len(read(Datasets(split="test"), tmp_path / "saved")) == 3
    with pytest.raises(ArtifactError, match="has no split 'valid'; there is train, test"):
        read(Datasets(split="valid"), tmp_path / "saved")


def test_local_files_by_a_builder_of_datasets(tmp_path):
    path = write_csv(tmp_path / "a.csv", pa.Table.from_pylist(ROWS))
    found = read(Datasets(builder="csv", id_field="id"), path)
    assert found[7] == Document("r7", ROWS[7]["text"], "a")
    assert len(found) == len(ROWS)


def test_a_json_array_by_the_builder_json(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    assert [d.text for d in read(Datasets(builder="json"), tmp_path / "a.json")] == [row["text"] for row in ROWS]


def test_what_a_builder_cannot_read_is_an_error(tmp_path):
    path = write_csv(tmp_path / "a.csv", pa.Table.from_pylist(ROWS))
    with pytest.raises(ArtifactError, match=r"no field 'body'; there is id, lang, text"):
        read(Datasets(builder="csv", text_field="body"), path)
    (tmp_path / "a.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(ArtifactError, match="cannot be read by the builder 'parquet'"):
        read(Datasets(builder="parquet"), tmp_path / "a.parquet")


def test_a_directory_that_was_not_saved_needs_a_builder(tmp_path):
    with pytest.raises(
        ArtifactError, match="not a directory made by save_to_disk; for files, say which reader.builder"
    ):
        read(Datasets(), tmp_path)


@pytest.mark.parametrize("reader", [Datasets(), Auto()])
def test_a_saved_dataset_that_lacks_its_rows_is_an_error(tmp_path, reader):
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"wanted what save_to_disk makes, but it cannot .* by a pattern such as"):
        reader.spans(str(tmp_path))
    for state in ("{", "{}", "[]", "null", '{"_data_files": 3}'):
        (tmp_path / "state.json").write_text(state)
        with pytest.raises(ArtifactError, match=r"wanted what save_to_disk makes, but it cannot be opened"):
            reader.spans(str(tmp_path))


@pytest.mark.parametrize("reader", [Datasets(), Auto()])
def test_a_saved_dataset_that_was_cut_off_is_an_error(tmp_path, reader):
    write_saved(tmp_path / "saved", pa.Table.from_pylist(ROWS))
    [arrow] = (tmp_path / "saved").glob("*.arrow")
    whole = arrow.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"garbage" * 50):
        arrow.write_bytes(content)
        with pytest.raises(ArtifactError, match=r"saved: wanted what save_to_disk makes, but it cannot be opened"):
            reader.spans(str(tmp_path / "saved"))


@pytest.mark.parametrize("reader", [Datasets(), Auto()])
def test_a_split_that_is_not_there_is_an_error(tmp_path, reader):
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(ArtifactError, match=r"/train: wanted what save_to_disk makes, .*FileNotFoundError: .*save it"):
        reader.spans(str(tmp_path))


@pytest.mark.parametrize("reader", [Datasets(), Auto()])
@pytest.mark.parametrize(
    "index", [b"", b"{", b"[]", b"{}", b"null", b'{"splits": "train"}', b'{"splits": [1]}', b"[" * 10_000, b"\xff"]
)
def test_a_damaged_list_of_splits_is_an_error(tmp_path, reader, index):
    (tmp_path / "dataset_dict.json").write_bytes(index)
    with pytest.raises(
        ArtifactError, match=r"dataset_dict\.json: damaged; wanted .*, found .*; save it again"
    ) as error:
        reader.spans(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("reader", [Datasets(), Auto(), Jsonl()])
def test_the_home_of_a_user_that_does_not_exist_is_an_error(reader):
    with pytest.raises(ArtifactError, match=r"~no-such-user/x: could not determine home directory"):
        reader.spans("~no-such-user/x")


def test_a_path_too_long_is_an_error():
    with pytest.raises(ArtifactError, match=r"file name too long"):
        Auto().spans("/tmp/" + "x" * 300)


# --- auto ---


def test_auto_reads_a_mixed_directory(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS[:2])
    write_parquet(tmp_path / "b.parquet", pa.Table.from_pylist(ROWS[2:4]))
    (tmp_path / "c.txt").write_text("three")
    assert [d.id for d in read(Auto(), tmp_path)] == [
        "a.jsonl:0",
        f"a.jsonl:{len(json.dumps(ROWS[0], ensure_ascii=False).encode()) + 1}",
        "b.parquet:0",
        "b.parquet:1",
        "c.txt:0",
    ]


def test_auto_refuses_what_it_does_not_know(tmp_path):
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(
        ArtifactError, match=r"a\.docx: no reader is known for '\.docx' files, .* say which reader\.kind"
    ):
        read(Auto(), tmp_path)


def test_auto_refuses_fields_of_plain_text(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ArtifactError, match=r"a\.txt: plain text has no fields, but .* \['text', 'lang'\]"):
        read(Auto(where={"lang": "en"}), tmp_path)


def test_auto_tells_the_reader_what_it_was_told(jsonl):
    assert read(Auto(text_field="lang", id_field="id", source="s"), jsonl)[0] == Document("r0", "en", "s")


# --- settings ---


def test_readers_decode_by_kind_and_say_what_is_wrong():
    assert decode(Holder, {"reader": {"kind": "text", "document": "line"}}).reader == Text(document="line")
    with pytest.raises(ConfigError, match=r"reader\.kind: no reader is called 'jsnl'; did you mean 'jsonl'\?"):
        decode(Holder, {"reader": {"kind": "jsnl"}})
    with pytest.raises(ConfigError, match=r"reader\.text_feild: no such setting; did you mean 'text_field'\?"):
        decode(Holder, {"reader": {"kind": "jsonl", "text_feild": "x"}})
