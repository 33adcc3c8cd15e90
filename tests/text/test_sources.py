import builtins
import errno
import gzip
import json
import os
import socket
from pathlib import Path

import pytest

from pipeline.errors import ArtifactError
from pipeline.text.sources import identify, list_files, regular_file


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


# --- what cannot be read: tests may run as root, who may read all, so the system's refusal is made up ---


def refuse(monkeypatch, module, function, refused):
    """Let `function` say that there is no permission for the path `refused`."""
    real = getattr(module, function)

    def maybe(path, *args, **kwargs):
        if os.fspath(path) == str(refused):
            raise PermissionError(errno.EACCES, "Permission denied", str(refused))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(module, function, maybe)


def error_of(call, path) -> str:
    with pytest.raises(ArtifactError) as caught:
        call(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("pattern", ["", "**/*.jsonl", "*/*.jsonl", "*/deep/*.txt", "a/*/*"])
def test_a_folder_without_permission_is_never_left_out(tree, monkeypatch, pattern):
    folder = tree / "a" / "deep" if "deep" in pattern or pattern == "a/*/*" else tree / "a"
    refuse(monkeypatch, os, "scandir", folder)
    found = error_of(list_files, tree / pattern)
    assert found == f"{folder}: permission denied; wanted what can be read; mend that, or name other files"


def test_a_file_without_permission_is_named(tree, monkeypatch):
    refuse(monkeypatch, builtins, "open", tree / "b.jsonl")
    assert error_of(identify, tree).startswith(f"{tree / 'b.jsonl'}: permission denied; wanted")


@pytest.mark.parametrize("function", [list_files, identify])
@pytest.mark.parametrize("pattern", ["", "*", "**", "odd"])
def test_a_named_pipe_is_refused_not_waited_for(tmp_path, function, pattern):
    os.mkfifo(tmp_path / "odd")
    assert error_of(function, tmp_path / pattern) == (
        f"{tmp_path / 'odd'}: not a regular file but a named pipe; remove it, or name other files"
    )


def test_sockets_devices_and_directories_are_no_regular_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("odd")
        assert "not a regular file but a socket" in error_of(list_files, tmp_path)
    assert "/dev/null: not a regular file but a device" in error_of(identify, "/dev/null")
    assert "not a regular file but a directory" in error_of(lambda path: regular_file(Path(path)), tmp_path)


@pytest.mark.parametrize("pattern", ["", "*.txt", "odd.txt"])
def test_a_link_that_leads_nowhere_is_named(tmp_path, pattern):
    (tmp_path / "a.txt").write_text("x")
    link = tmp_path / "odd.txt"
    link.symlink_to("gone.txt")
    assert error_of(list_files, tmp_path / pattern) == (
        f"{link}: a link to 'gone.txt', which leads to nothing; mend it or remove it"
    )
    link.unlink()
    link.symlink_to(link)
    assert error_of(list_files, tmp_path / pattern).startswith(f"{link}: too many levels of symbolic links; wanted")


@pytest.mark.parametrize("function", [list_files, identify])
@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("/tmp/" + "x" * 300, "file name too long; wanted"),
        ("/tmp/" + "x/" * 3000, "file name too long; wanted"),
        ("~no-such-user/x", "could not determine home directory; wanted"),
        ("~no-such-user/*.txt", "could not determine home directory; wanted"),
        ("/tmp/a\0b", "embedded null"),
    ],
)
def test_a_path_that_cannot_be_is_an_error(function, path, problem):
    assert problem in error_of(function, path)


def test_a_missing_file_in_a_directory_that_cannot_be_listed(tmp_path, monkeypatch):
    def deny(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", deny)
    assert error_of(list_files, tmp_path / "x").endswith("x: no such file or directory; wanted raw text files")
