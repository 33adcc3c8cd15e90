import gzip
import json

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
        ("{\n", r"a.jsonl:5: not JSON"),
        ("[]\n", "a.jsonl:5: wanted a JSON object, found list"),
        ({"tt": "x", "y": "a", "s": "train"}, r"a.jsonl:5: has no text in field 't'; did you mean 'tt'\?"),
        ({"t": 3, "y": "a", "s": "train"}, "a.jsonl:5: has no text in field 't'"),
        ({"t": "x", "y": "a", "s": "dev"}, "a.jsonl:5: split 'dev' is none of train, valid, test"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    with pytest.raises(ArtifactError, match=message):
        read(write(tmp_path / "a.jsonl", [*ROWS, row]))


def test_a_missing_file_or_split_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"tasks.x.data: .*nowhere: no such file"):
        read(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="no rows of split valid or test in field 's'"):
        read(write(tmp_path / "a.jsonl", ROWS[:1]))
