import bz2
import gzip
import random
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.errors import ArtifactError
from pipeline.text import lines
from pipeline.text.lines import byte_ranges, read_lines, read_paragraphs, read_whole, runs, whole_file


def spans(path: Path) -> list[lines.Span]:
    return byte_ranges(path.name, path)


def read_all(read, path: Path) -> list[tuple[int, bytes]]:
    return [item for span in spans(path) for item in read(span)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "raw.txt"


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_lines_have_offsets_and_no_ends(path, end):
    path.write_bytes(b"one" + end + b"two" + end + end + b"three")
    width = len(end)
    expected = [(0, b"one"), (3 + width, b"two"), (6 + 3 * width, b"three")]
    assert read_all(read_lines, path) == expected


def test_a_byte_order_mark_is_taken_off_the_first_line_only(path):
    path.write_bytes(b"\xef\xbb\xbfone\n\xef\xbb\xbftwo\n")
    assert read_all(read_lines, path) == [(0, b"one"), (7, b"\xef\xbb\xbftwo")]
    assert read_all(read_paragraphs, path) == [(0, b"one\n\xef\xbb\xbftwo")]
    assert list(read_whole(whole_file("raw.txt", path))) == [(0, b"one\n\xef\xbb\xbftwo\n")]


def test_an_empty_file_has_no_ranges(path):
    path.write_bytes(b"")
    assert spans(path) == []


@pytest.mark.parametrize("unit_bytes", range(1, 40))
def test_ranges_of_any_size_give_each_line_and_paragraph_once(path, monkeypatch, unit_bytes):
    path.write_bytes(b"\xef\xbb\xbfone\n  \ntwo\r\nthree\n\n\n\nfour five six\r\n\r\n  seven\neight\n \t\n\nnine")
    whole = {read: read_all(read, path) for read in (read_lines, read_paragraphs)}
    assert [text for _, text in whole[read_lines]] == [
        *(b"one", b"two", b"three", b"four five six", b"  seven", b"eight", b"nine")
    ]
    assert [text for _, text in whole[read_paragraphs]] == [
        *(b"one", b"two\nthree", b"four five six", b"  seven\neight", b"nine")
    ]
    monkeypatch.setattr(lines, "UNIT_BYTES", unit_bytes)
    for read, expected in whole.items():
        assert read_all(read, path) == expected


def test_ranges_of_random_files(path, monkeypatch):
    noise = random.Random(0)
    pieces = [b"\n", b"\r\n", b"\n\n", b" ", b"a", b"bc", b"\t\n", b"def" * 5]
    for _ in range(150):
        path.write_bytes(b"".join(noise.choices(pieces, k=noise.randrange(1, 40))))
        monkeypatch.setattr(lines, "UNIT_BYTES", 1 << 20)
        whole = [read_all(read_lines, path), read_all(read_paragraphs, path)]
        monkeypatch.setattr(lines, "UNIT_BYTES", noise.randrange(1, 12))
        assert [read_all(read_lines, path), read_all(read_paragraphs, path)] == whole


def test_a_range_may_start_after_a_very_long_blank_line(path, monkeypatch):
    path.write_bytes(b"one\n" + b" " * 20_000 + b"\ntwo\n")
    monkeypatch.setattr(lines, "UNIT_BYTES", 10_000)
    assert read_all(read_paragraphs, path) == [(0, b"one"), (20_005, b"two")]


def compress(path: Path, data: bytes) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data[: len(data) // 2]) + gzip.compress(data[len(data) // 2 :]))  # two members
    elif path.suffix == ".bz2":
        path.write_bytes(bz2.compress(data))
    else:
        with pa.CompressedOutputStream(str(path), {".zst": "zstd", ".lz4": "lz4"}[path.suffix]) as stream:
            stream.write(data)
    return path


@pytest.mark.parametrize("suffix", lines.COMPRESSED)
def test_compressed_files_are_one_range(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(lines, "UNIT_BYTES", 100)
    data = b"\xef\xbb\xbf" + b"".join(b"line %d\n" % number for number in range(10_000))
    path = compress(tmp_path / f"raw.txt{suffix}", data)
    assert len(spans(path)) == 1
    found = read_all(read_lines, path)
    assert [text for _, text in found] == [b"line %d" % number for number in range(10_000)]
    assert all(data[offset:].removeprefix(b"\xef\xbb\xbf").startswith(text) for offset, text in found)


@pytest.mark.parametrize("suffix", lines.COMPRESSED)
def test_a_compressed_file_that_is_cut_off_is_an_error(tmp_path, suffix):
    path = compress(tmp_path / f"raw.txt{suffix}", random.Random(0).randbytes(50_000))
    path.write_bytes(path.read_bytes()[:-9_000])
    with pytest.raises(ArtifactError, match=rf"raw\.txt\{suffix}: damaged, cannot be decompressed"):
        read_all(read_lines, path)


def test_something_else_named_gz_is_an_error(tmp_path):
    path = tmp_path / "raw.gz"
    path.write_bytes(b"plain text\n")
    with pytest.raises(ArtifactError, match="cannot be decompressed"):
        read_all(read_lines, path)


def test_runs_join_neighbours_up_to_a_unit(monkeypatch):
    monkeypatch.setattr(lines, "UNIT_BYTES", 10)
    assert list(runs([3, 3, 3, 3, 20, 1, 9, 1, 0])) == [(0, 3), (3, 4), (4, 5), (5, 7), (7, 9)]
    assert list(runs([])) == []
