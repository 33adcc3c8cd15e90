import gzip
import json
from pathlib import Path

import pytest

from pipeline.errors import ArtifactError
from pipeline.text.sources import identify, list_files


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.jsonl", "a/c.jsonl", "a/deep/d.txt", ".hidden", ".git/config", "a/.e.jsonl"):
        path = tmp_path / "raw" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "raw"


def names(path: object) -> list[str]:
    return [name for name, _ in list_files(str(path))]


def test_a_file_is_named_by_itself(tree):
    assert list_files(str(tree / "b.jsonl")) == [("b.jsonl", tree / "b.jsonl")]


def test_a_directory_is_read_to_the_bottom_without_hidden_files(tree):
    assert names(tree) == ["a/c.jsonl", "a/deep/d.txt", "b.jsonl"]


def test_a_glob_names_files_relative_to_its_fixed_part(tree):
    assert names(tree / "**" / "*.jsonl") == ["a/c.jsonl", "b.jsonl"]
    assert names(tree / "a" / "[cd].*") == ["c.jsonl"]


def test_a_relative_glob_and_a_relative_directory(tree, monkeypatch):
    monkeypatch.chdir(tree)
    assert names("*.jsonl") == ["b.jsonl"]
    assert names("a") == ["c.jsonl", "deep/d.txt"]


def test_a_name_with_glob_characters_is_a_file_first(tmp_path):
    path = tmp_path / "data[1].jsonl"
    path.write_text("x")
    assert list_files(str(path)) == [("data[1].jsonl", path)]


def test_links_to_directories_are_followed_but_not_in_circles(tree):
    (tree / "a" / "up").symlink_to(tree)
    (tree / "z").symlink_to(tree / "a" / "deep")
    assert names(tree) == ["a/c.jsonl", "a/deep/d.txt", "b.jsonl", "z/d.txt"]


def test_a_file_name_that_is_not_utf8_gets_a_readable_name(tmp_path):
    try:
        (Path(str(tmp_path)) / "caf\udce9.txt").write_text("x")
    except OSError:
        pytest.skip("this file system takes no such names")
    assert names(tmp_path) == ["caf\\xe9.txt"]


def test_missing_says_what_was_wanted_and_what_is_there(tree):
    with pytest.raises(ArtifactError, match=r"b\.jsnl: no such file or directory; .*did you mean 'b\.jsonl'\?"):
        list_files(str(tree / "b.jsnl"))
    with pytest.raises(ArtifactError, match=r"there is no directory .*nowhere either"):
        list_files(str(tree / "nowhere" / "b.jsonl"))
    with pytest.raises(ArtifactError, match=r"no file matches this pattern"):
        list_files(str(tree / "*.parquet"))


def test_an_empty_directory_is_refused(tmp_path):
    (tmp_path / ".hidden").write_text("x")
    with pytest.raises(ArtifactError, match="no files but hidden ones"):
        list_files(str(tmp_path))


def test_identity_is_plain_data_that_does_not_depend_on_the_place(tree, tmp_path):
    identity = identify(str(tree))
    assert json.loads(json.dumps(identity)) == identity
    assert identity[0][:2] == ["a/c.jsonl", len("a/c.jsonl")]
    tree.rename(tmp_path / "moved")
    assert identify(str(tmp_path / "moved")) == identity


def test_identity_sees_the_head_and_the_tail_of_a_file(tmp_path):
    path = tmp_path / "big.txt"
    content = bytearray(300_000)
    path.write_bytes(content)
    plain = identify(str(path))
    seen = set()
    for place in (0, 65_535, 299_999, 300_000 - 65_536):
        changed = content.copy()
        changed[place] = 1
        path.write_bytes(changed)
        seen.add(identify(str(path))[0][2])
    assert len(seen | {plain[0][2]}) == 5


@pytest.mark.parametrize("size", [0, 1, 65_536, 65_537, 131_072, 131_073])
def test_identity_of_every_size(tmp_path, size):
    path = tmp_path / "x"
    path.write_bytes(b"x" * size)
    assert identify(str(path))[0][1] == size


def test_compressed_files_are_files_like_others(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write(b"{}\n")
    assert names(tmp_path) == ["a.jsonl.gz"]
