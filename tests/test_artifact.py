import errno
import os
import shutil
import subprocess
import sys

import pytest

from pipeline import proof
from pipeline.artifact import Made, Manifest, atomic, open_artifact, record_file, write_manifest
from pipeline.errors import ArtifactError
from pipeline.stage import Output

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
    with pytest.raises(ArtifactError, match="has no manifest.json, so it is not an artifact"):
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


def flip(path, keep_time=False):
    """Change one byte; `keep_time` hides it, as a failing disk would."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def reads(monkeypatch):
    """The names of the files that are read in full from here on."""
    names, hash_file = [], proof.hash_file
    monkeypatch.setattr(proof, "hash_file", lambda path, tick: names.append(path.name) or hash_file(path, tick))
    return names


@pytest.fixture
def made(tmp_path):
    """An artifact as a stage writes it."""
    path = tmp_path / "tokens-1"
    (path / "work").mkdir(parents=True)
    output = Output(path)
    for name in ("part-0.arrow", "part-1.arrow", "held-0.arrow"):
        with output.write(name) as temporary:
            temporary.write_bytes(name.encode() * 1000)
    manifest = Manifest(
        kind="tokens", name="t", fingerprint="f", stage={}, inputs={}, files=output.files, stats={}, made=MADE
    )
    write_manifest(path, manifest)
    return path


def test_what_a_stage_has_written_is_not_read_again(made, reads):
    artifact = open_artifact(made)
    artifact.prove(artifact.parts())
    assert artifact.proven_file("part-0.arrow") == made / "part-0.arrow"
    assert artifact.proven_file("held-0.arrow").read_bytes().startswith(b"held-0")
    assert reads == []
    artifact.file("part-0.arrow")  # in full, whatever was proven
    assert reads == ["part-0.arrow"]


def test_a_write_is_noticed_however_soon_it_comes(tmp_path):
    (tmp_path / "work").mkdir()
    for number in range(200):
        output = Output(tmp_path)
        with output.write("x") as temporary:
            temporary.write_bytes(b"a")
        (tmp_path / "x").write_bytes(b"b")
        assert not proof.Proofs(tmp_path).hold("x", output.files["x"].xxh128), number


@pytest.mark.parametrize("ask", [lambda a: a.prove(a.parts()), lambda a: a.proven_file("part-1.arrow")])
def test_a_file_changed_since_its_proof_is_found_by_name(made, ask):
    flip(made / "part-1.arrow")
    with pytest.raises(ArtifactError, match=r"part-1.arrow: damaged: wanted 12000 bytes with xxh128"):
        ask(open_artifact(made))


def test_a_file_touched_or_copied_is_read_once_more_and_then_known(made, tmp_path, reads):
    os.utime(made / "part-1.arrow", (1, 1))
    for _ in range(2):
        open_artifact(made).prove(["part-0.arrow", "part-1.arrow"])
        assert reads == ["part-1.arrow"]
    shutil.copytree(made, tmp_path / "copy", ignore=shutil.ignore_patterns("work"))
    open_artifact(tmp_path / "copy").prove(["part-0.arrow", "part-1.arrow"])
    assert sorted(reads) == ["part-0.arrow", "part-1.arrow", "part-1.arrow"]
    open_artifact(tmp_path / "copy").prove(["part-0.arrow", "part-1.arrow"])
    assert len(reads) == 3


def test_a_file_that_is_being_written_is_not_taken_as_proven(made, reads):
    os.utime(made / "part-0.arrow")  # just now: what is written within the same tick would not show
    for times in (1, 2):
        open_artifact(made).prove(["part-0.arrow"])
        assert len(reads) == times
        os.utime(made / "part-0.arrow")


def test_damage_behind_the_file_system_is_found_by_reading_and_then_remembered(made):
    flip(made / "part-1.arrow", keep_time=True)
    artifact = open_artifact(made)
    artifact.prove(artifact.parts())  # nothing to see
    problems = list(artifact.check(artifact.names, "reading"))
    assert len(problems) == 1
    assert "part-1.arrow: damaged" in problems[0]
    with pytest.raises(ArtifactError, match=r"part-1.arrow: damaged"):
        open_artifact(made).prove(["part-1.arrow"])
    open_artifact(made).prove(["part-0.arrow", "held-0.arrow"])


def test_a_check_reports_all_problems(made):
    (made / "part-0.arrow").unlink()
    flip(made / "part-1.arrow")
    artifact = open_artifact(made, whole=False)
    problems = list(artifact.check(artifact.names, "reading"))
    assert len(problems) == 2
    assert "part-0.arrow: no such file, but the manifest lists it" in problems[0]
    assert "part-1.arrow: damaged" in problems[1]


@pytest.mark.parametrize("text", [b"", b"\xff\xfe garbage", b"half a li"])
def test_a_spoiled_record_of_proofs_proves_nothing(made, text, reads):
    (made / "work/proven").write_bytes(text)
    for _ in range(2):
        open_artifact(made).prove(["part-0.arrow"])
    assert reads == ["part-0.arrow"]


def test_an_artifact_that_cannot_be_written_is_read_each_time(made, reads):
    shutil.rmtree(made / "work")
    (made / "work").write_text("in the way")  # not even root can write there
    for times in (1, 2):
        open_artifact(made).prove(["part-0.arrow"])
        assert len(reads) == times


def test_a_name_that_is_not_in_the_manifest(made):
    for ask in (
        open_artifact(made).file,
        open_artifact(made).proven_file,
        lambda name: open_artifact(made).prove([name]),
    ):
        with pytest.raises(ArtifactError, match="has no file 'part-9.arrow'; it is a tokens artifact"):
            ask("part-9.arrow")


def test_a_file_that_cannot_be_read(made, monkeypatch):
    def fail(path, tick):
        raise OSError(errno.EIO, "Input/output error")  # no disk here fails at will

    monkeypatch.setattr(proof, "hash_file", fail)
    with pytest.raises(ArtifactError, match=r"part-0.arrow: cannot be read \(Input/output error\); see to its disk"):
        open_artifact(made).file("part-0.arrow")


def test_of_several_processes_one_reads(made):
    (made / "work/proven").unlink()
    code = (
        "from pathlib import Path; from pipeline import proof; from pipeline.artifact import open_artifact\n"
        "real = proof.hash_file\n"
        "proof.hash_file = lambda path, tick: print(path.name) or real(path, tick)\n"
        f"artifact = open_artifact(Path({str(made)!r})); artifact.prove(artifact.parts())"
    )
    ranks = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    read = "".join(rank.communicate()[0] for rank in ranks).split()
    assert [rank.returncode for rank in ranks] == [0] * 4
    assert sorted(read) == ["part-0.arrow", "part-1.arrow"]
