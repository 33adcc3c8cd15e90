import gzip
import json
import os
import random

import pytest

from pipeline.errors import ArtifactError
from pipeline.text.labelled import Labelled, read_labelled

ROWS = [{"t": f"text {i}", "y": "ab"[i % 2], "s": split} for i, split in enumerate(["train", "valid", "test", "train"])]


def read(path):
    return read_labelled(str(path), "t", "y", "s", "tasks.x.data")


def write(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_come_by_split_in_order(tmp_path):
    splits = read(write(tmp_path / "a.jsonl", ROWS))
    assert splits["train"] == [Labelled("text 0", "a"), Labelled("text 3", "b")]
    assert [len(splits[name]) for name in ("train", "valid", "test")] == [2, 1, 1]
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write((tmp_path / "a.jsonl").read_bytes())
    assert read(tmp_path / "a.jsonl.gz") == splits


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{\n", r"a.jsonl:5: not a JSON object in UTF-8 \(Expecting property .*\); wanted one on each line"),
        ("[]\n", r"a.jsonl:5: not a JSON object in UTF-8 \(wanted an object, found a list\); wanted one"),
        ("[" * 100_000 + "\n", r"a.jsonl:5: not a JSON object in UTF-8 \(maximum recursion depth"),
        ({"tt": "x", "y": "a", "s": "train"}, r"a.jsonl:5: no field 't'; there is s, tt, y; did you mean 'tt'\?"),
        ({"t": 3, "y": "a", "s": "train"}, r"a.jsonl:5: field 't' is a number \(3\), wanted text"),
        ({"t": "x", "y": 1, "s": "train"}, r"a.jsonl:5: field 'y' is a number \(1\), wanted text"),
        ({"t": "x", "y": True, "s": "train"}, r"a.jsonl:5: field 'y' is a boolean \(true\), wanted text"),
        ({"t": "x", "y": None, "s": "train"}, r"a.jsonl:5: field 'y' is null, wanted text"),
        ({"t": "x\ud800", "y": "a", "s": "train"}, r"a.jsonl:5: field 't' has half of a surrogate pair \(\\ud800\)"),
        ({"t": "x", "y": "\udfff", "s": "train"}, r"a.jsonl:5: field 'y' has half of a surrogate pair \(\\udfff\)"),
        ({"t": "x", "y": "a", "s": "a\nb"}, r"a.jsonl:5: split 'a\\nb' is none of train, valid, test"),
        ({"t": "x", "y": "a", "s": "dev"}, "a.jsonl:5: split 'dev' is none of train, valid, test"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    with pytest.raises(ArtifactError, match=message) as error:
        read(write(tmp_path / "a.jsonl", [*ROWS, row]))
    assert "\n" not in str(error.value)


def test_text_that_is_not_utf8_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    path.write_bytes(path.read_bytes() + '{"t": "café"}\n'.encode("latin-1"))
    with pytest.raises(ArtifactError, match=r"a.jsonl:5: not a JSON object in UTF-8 \(byte 0xe9 at 10 is not UTF-8\)"):
        read(path)


def test_a_byte_order_mark_crlf_and_empty_text_are_accepted(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"t": "", "y": "a", "s": "train"}, *ROWS])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert read(path)["train"][:2] == [Labelled("", "a"), Labelled("text 0", "a")]


def test_a_compressed_file_that_is_cut_off_is_named(tmp_path):
    noise = random.Random(0)
    rows = [*ROWS, *({"t": str(noise.random()), "y": "a", "s": "train"} for _ in range(100_000))]
    path = write(tmp_path / "a.jsonl", rows)
    packed = gzip.compress(path.read_bytes())
    for size in (10, 1000, len(packed) // 2, len(packed) - 4):
        (tmp_path / "a.jsonl.gz").write_bytes(packed[:size])
        with pytest.raises(
            ArtifactError, match=r"a\.jsonl\.gz:\d+: damaged, cannot be decompressed .*; fetch it again"
        ):
            read(tmp_path / "a.jsonl.gz")
    (tmp_path / "a.jsonl.gz").write_bytes(path.read_bytes())
    with pytest.raises(ArtifactError, match=r"a\.jsonl\.gz:1: damaged, cannot be decompressed"):
        read(tmp_path / "a.jsonl.gz")


def test_the_home_directory_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.jsonl", ROWS)
    assert read("~/a.jsonl") == read(tmp_path / "a.jsonl")
    with pytest.raises(ArtifactError, match=r"tasks.x.data: ~no-such-user/a: could not determine home directory"):
        read("~no-such-user/a")


def test_what_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("gone")
    for name, message in (("", "not a regular file but a directory"), ("pipe", "a named pipe"), ("link", "to 'gone'")):
        with pytest.raises(ArtifactError, match=rf"tasks.x.data: {tmp_path / name}: .*{message}.* labelled texts as"):
            read(tmp_path / name)


def test_a_missing_file_or_split_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"tasks.x.data: .*nowhere: no such file"):
        read(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="no rows of split valid or test in field 's'"):
        read(write(tmp_path / "a.jsonl", ROWS[:1]))
