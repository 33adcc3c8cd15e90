import errno
import os

import pytest

from pipeline.artifact import Made, Manifest, atomic, open_artifact, record_file, write_manifest
from pipeline.errors import ArtifactError

MADE = Made(version="0", commit=None, python="3", host="h", time="t", seconds=1.0, ranks=1)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus-1"
    path.mkdir()
    for name in ("part-00001.arrow", "part-00000.arrow", "rejects-00000.arrow"):
        (path / name).write_bytes(name.encode() * 1000)
    files = {entry.name: record_file(entry) for entry in path.iterdir()}
    manifest = Manifest(
        kind="corpus", name="c", fingerprint="f", stage={}, inputs={}, files=files, stats={"documents": 2}, made=MADE
    )
    write_manifest(path, manifest)
    return path


def test_a_written_artifact_is_read_back(corpus):
    artifact = open_artifact(corpus, "tokens", "corpus")
    assert artifact.parts() == ["part-00000.arrow", "part-00001.arrow"]
    assert artifact.file("part-00000.arrow").read_bytes().startswith(b"part-00000")
    assert artifact.stats["documents"] == 2


def test_a_directory_without_manifest_is_never_read(corpus):
    (corpus / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="has no manifest.json, so it is unfinished"):
        open_artifact(corpus)


def test_a_missing_artifact_names_the_setting(tmp_path):
    with pytest.raises(
        ArtifactError, match=r"stage.corpus: .*nowhere: no such directory; wanted an artifact of kind c"
    ):
        open_artifact(tmp_path / "nowhere", "corpus", where="stage.corpus")


def test_an_artifact_of_another_kind_is_refused(corpus):
    with pytest.raises(ArtifactError, match="wanted an artifact of kind tokens or model, found one of kind 'corpus'"):
        open_artifact(corpus, "tokens", "model")


def test_a_cut_part_is_refused_at_once(corpus):
    os.truncate(corpus / "part-00000.arrow", 10)
    with pytest.raises(ArtifactError, match=r"part-00000.arrow: damaged: wanted 16000 bytes, found 10; delete"):
        open_artifact(corpus)


def test_a_missing_part_is_refused_at_once(corpus):
    (corpus / "part-00000.arrow").unlink()
    with pytest.raises(ArtifactError, match="damaged: wanted 16000 bytes, found no such file"):
        open_artifact(corpus)


def test_a_flipped_byte_is_found_when_the_part_is_read(corpus):
    part = corpus / "part-00001.arrow"
    data = bytearray(part.read_bytes())
    data[5000] ^= 1
    part.write_bytes(data)
    artifact = open_artifact(corpus)
    artifact.file("part-00000.arrow")
    with pytest.raises(ArtifactError, match=r"part-00001.arrow: damaged: wanted 16000 bytes with xxh128"):
        artifact.file("part-00001.arrow")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2}'])
def test_a_manifest_of_another_format_is_refused(corpus, text):
    (corpus / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match="not a manifest of this version"):
        open_artifact(corpus)


def test_an_atomic_write_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    with atomic(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir() if entry.name == "x"] == ["x"]


def test_a_full_disk_is_said_as_such(tmp_path):
    with pytest.raises(ArtifactError, match="the disk is full; make room"), atomic(tmp_path / "x") as temporary:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "no space")
    assert list(tmp_path.iterdir()) == []
