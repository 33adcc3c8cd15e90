"""Artifacts as inputs from elsewhere: over a real S3 server, and over file systems that fail on demand."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from support import PROJECT, run_pipeline

from pipeline import remote
from pipeline.artifact import open_artifact, read_manifest
from pipeline.errors import ArtifactError, ConfigError
from pipeline.remote import open_anywhere

BUCKET = "texts"
NAME = "shard-0123456789abcdef"


class Server:
    """An S3 server of this machine; its log has a line for every request."""

    def __init__(self, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = log
        self.start()
        self.variables = {
            "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "somebody",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",  # the tries below ours
        }

    def start(self) -> None:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def requests(self, *words: str) -> int:
        """How many requests the log has with all these words."""
        return sum(all(word in line for word in words) for line in self.log.read_text().splitlines())

    def put(self, directory: Path, prefix: str) -> str:
        """Upload the files of an artifact; return its URL."""
        files = fsspec.filesystem("s3")
        files.mkdir(BUCKET)
        for path in directory.iterdir():
            if path.is_file():
                files.pipe_file(f"{BUCKET}/{prefix}/{path.name}", path.read_bytes())
        return f"s3://{BUCKET}/{prefix}"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server without any data."""
    server = Server(tmp_path / "server.log")
    for name, value in server.variables.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield server
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.kill()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus of several parts."""
    root = tmp_path_factory.mktemp("made")
    source = f"stage.sources=[{{path: {PROJECT}/tests/data/mini.jsonl}}]"
    run_pipeline("stage=shard", source, "stage.part_bytes=4000", f"root={root}")
    return next(root.glob("corpus/shard-*"))


def cached(root: Path) -> list[str]:
    """Names of the fetched files, whatever they are called."""
    return sorted(path.name for path in root.glob("cache/*/*") if path.is_file())


@pytest.mark.slow
def test_a_stage_reads_s3_as_it_reads_the_disk(server, corpus, tmp_path):
    url = server.put(corpus, f"our/{corpus.name}")
    near, far = tmp_path / "near", tmp_path / "far"
    run_pipeline("stage=clean", f"stage.corpus={corpus}", f"root={near}")
    run_pipeline("stage=clean", f"stage.corpus={url}", f"root={far}", "run.ranks=2")
    one, other = (next(root.glob("corpus/clean-*")) for root in (near, far))
    assert one.name == other.name  # the same fingerprint
    assert read_manifest(one).files == read_manifest(other).files
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in read_manifest(one).files)
    assert read_manifest(other).inputs["corpus"].path == url
    assert len(open_artifact(corpus).parts()) > 3
    for name in open_artifact(corpus).parts():
        assert server.requests(f"HEAD /{BUCKET}/our", name) == 1, name  # one rank asked for it, once

    before = server.requests("/")
    run_pipeline("stage=clean", f"stage.corpus={url}", f"root={far}", "stage.filters=[]")
    assert server.requests("/") == before
    shutil.rmtree(far / "corpus")
    server.kill()  # nothing is asked of it
    done = run_pipeline("stage=clean", f"stage.corpus={url}/", f"root={far}")
    assert "clean done in" in done.stdout


def test_a_place_without_fingerprint_is_asked_what_it_is(server, corpus, tmp_path):
    url = server.put(corpus, "jobs/news/shard")
    artifact = open_anywhere(url, tmp_path)
    assert artifact.path == tmp_path / "cache" / artifact.manifest.fingerprint
    assert artifact.place == url
    assert cached(tmp_path) == ["manifest.json", "origin"]
    path = artifact.proven_file(artifact.parts()[0])
    assert path.read_bytes() == (corpus / path.name).read_bytes()
    assert path.stat().st_mode == artifact.path.joinpath("manifest.json").stat().st_mode
    asked = server.requests("GET", "part-")
    again = open_anywhere(url, tmp_path)
    again.prove(again.parts())  # what is yet to be fetched is no problem, and not fetched
    assert again.proven_file(path.name) == path
    assert server.requests("GET", "part-") == asked
    assert server.requests("GET", "manifest.json") == 2


@pytest.mark.slow
def test_a_damaged_object_is_refused_by_name(server, corpus, tmp_path):
    url = server.put(corpus, f"our/{corpus.name}")
    name = open_artifact(corpus).parts()[1]
    data = bytearray((corpus / name).read_bytes())
    data[len(data) // 2] ^= 1
    fsspec.filesystem("s3").pipe_file(f"{url}/{name}", bytes(data))
    done = run_pipeline("stage=clean", f"stage.corpus={url}", f"root={tmp_path / 'root'}", status=3)
    assert f"error: {url}/{name}: damaged: wanted {len(data)} bytes with xxh128" in done.stderr
    assert not list(tmp_path.glob("root/corpus/*/manifest.json"))
    fsspec.filesystem("s3").pipe_file(f"{url}/{name}", bytes(data[:-1]))
    done = run_pipeline("stage=clean", f"stage.corpus={url}", f"root={tmp_path / 'root'}", status=3)
    assert f"{url}/{name}: damaged: wanted {len(data)} bytes, found {len(data) - 1}; put" in done.stderr
    assert name not in cached(tmp_path / "root")
    assert not list(tmp_path.glob("root/cache/*/work/*.tmp"))
    fsspec.filesystem("s3").pipe_file(f"{url}/{name}", (corpus / name).read_bytes())
    run_pipeline("stage=clean", f"stage.corpus={url}", f"root={tmp_path / 'root'}")


@pytest.mark.slow
def test_a_server_that_dies_leaves_no_half_file_and_the_next_run_goes_on(server, corpus, tmp_path, monkeypatch):
    url = server.put(corpus, f"our/{corpus.name}")
    artifact = open_anywhere(url, tmp_path / "root")
    first, second = artifact.parts()[:2]
    artifact.file(first)
    monkeypatch.setattr(remote, "RANGE_BYTES", 64)
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    killed = []

    def kill_in_the_middle():
        while not any(path.stat().st_size for path in artifact.path.glob("work/*.tmp")):
            time.sleep(0.001)
        server.kill()
        killed.append(True)

    monkeypatch.setattr(remote, "open", partial(open, buffering=0), raising=False)  # so that it shows
    watcher = threading.Thread(target=kill_in_the_middle)
    watcher.start()
    with pytest.raises(ArtifactError, match=rf"{second}: cannot be fetched \(.*, 3 times\); run it again to go on"):
        artifact.file(second)
    watcher.join()
    assert killed
    assert cached(tmp_path / "root") == sorted(["manifest.json", "origin", first])
    assert not list(artifact.path.glob("work/*.tmp"))

    server.start()
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.put(corpus, f"our/{corpus.name}")
    artifact = open_anywhere(url, tmp_path / "root")
    for name in artifact.parts():
        assert artifact.file(name).read_bytes() == (corpus / name).read_bytes()
    assert server.requests("HEAD", first) == 1


@pytest.mark.slow
def test_several_processes_fetch_a_file_once(server, corpus, tmp_path):
    url = server.put(corpus, f"our/{corpus.name}")
    name = open_artifact(corpus).parts()[0]
    code = (
        "import sys; from pathlib import Path; from pipeline.remote import open_anywhere\n"
        f"path = open_anywhere({url!r}, Path({str(tmp_path)!r})).proven_file({name!r})\n"
        f"assert path.read_bytes() == Path({str(corpus / name)!r}).read_bytes()"
    )
    ranks = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    assert [rank.wait() for rank in ranks] == [0] * 4
    assert server.requests("HEAD", name) == 1
    assert cached(tmp_path) == sorted(["manifest.json", "origin", name])


@pytest.mark.parametrize("url", [f"s3://{BUCKET}/nothing/{NAME}", f"s3://no-such-bucket/{NAME}"])
@pytest.mark.slow
def test_a_missing_bucket_or_key_is_named(server, corpus, tmp_path, url):
    server.put(corpus, "there")
    done = run_pipeline("stage=clean", f"stage.corpus={url}", f"root={tmp_path}", status=3)
    wanted = f"error: stage.corpus: {url}/manifest.json: no such file, or no such bucket; wanted an artifact\n"
    assert done.stderr == wanted
    assert not cached(tmp_path)


@pytest.mark.slow
def test_a_server_that_is_not_there(tmp_path):
    done = run_pipeline(
        "stage=clean",
        f"stage.corpus=s3://{BUCKET}/{NAME}",
        f"root={tmp_path}",
        status=3,
        AWS_ENDPOINT_URL_S3="http://127.0.0.1:9",
        AWS_ACCESS_KEY_ID="x",
        AWS_SECRET_ACCESS_KEY="x",
        AWS_MAX_ATTEMPTS="1",
    )
    assert f"{NAME}/manifest.json: cannot be fetched (Could not connect to the endpoint URL" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_library_that_is_not_installed_is_named_with_the_way_to_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)
    with pytest.raises(ConfigError, match=r"manifest.json: its library is missing .*; pip install -e '.\[s3\]' brings"):
        open_anywhere(f"s3://{BUCKET}/{NAME}", tmp_path)


def test_a_kind_of_url_that_there_is_not(tmp_path):
    done = run_pipeline("stage=clean", f"stage.corpus=s4://{BUCKET}/{NAME}", f"root={tmp_path}", status=2)
    assert "wanted s3:// or another that fsspec knows, found s4://" in done.stderr


def test_another_artifact_than_the_url_is_called_is_refused(corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "shard-0123456789abcdef")
    with pytest.raises(ArtifactError, match="not of what the URL is called"):
        open_anywhere(f"file://{tmp_path}/shard-0123456789abcdef", tmp_path)


def test_artifacts_are_not_written_elsewhere(corpus):
    done = run_pipeline("stage=clean", f"stage.corpus={corpus}", f"root=s3://{BUCKET}/artifacts", status=2)
    assert done.stderr.startswith(f"error: root: wanted a directory of this machine, found 's3://{BUCKET}/artifacts'")


def test_a_file_url_is_an_input_too(corpus, tmp_path):
    done = run_pipeline("stage=clean", f"stage.corpus=file://{corpus}", f"root={tmp_path}")
    assert "clean done in" in done.stdout
    frozen = json.loads(next(tmp_path.glob("corpus/clean-*/work/task.json")).read_text())
    assert frozen["stage"]["corpus"] == f"file://{corpus}"
    assert frozen["inputs"]["corpus"] == str(tmp_path / "cache" / corpus.name.removeprefix("shard-"))


class Failing(MemoryFileSystem):
    """Keeps files in memory; the calls in `faults` fail first, each with its errors in turn."""

    protocol = "failing"
    store, pseudo_dirs = {}, [""]
    faults: dict[str, list[Exception]] = {}

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("failing://"))

    def _fail(self, name: str) -> None:
        if self.faults.get(name):
            raise self.faults[name].pop(0)

    def cat_file(self, path, start=None, end=None, **more):
        self._fail("cat_file")
        return super().cat_file(path, start, end, **more)

    def size(self, path):
        self._fail("size")
        return super().size(path)

    def cat_ranges(self, paths, starts, ends, **more):
        self._fail("cat_ranges")
        return super().cat_ranges(paths, starts, ends, **more)


@pytest.fixture
def failing(corpus, monkeypatch):
    """The URL of a corpus in a place that fails as told, and the waits in between."""
    monkeypatch.setattr(Failing, "faults", {})
    monkeypatch.setattr(Failing, "store", {})
    fsspec.register_implementation("failing", Failing, clobber=True)
    for path in corpus.iterdir():
        if path.is_file():
            fsspec.filesystem("failing").pipe_file(f"/{corpus.name}/{path.name}", path.read_bytes())
    waits = []
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    return f"failing://{corpus.name}", waits


@pytest.mark.parametrize("call", ["cat_ranges", "size"])
def test_a_broken_transfer_is_tried_again(failing, corpus, tmp_path, monkeypatch, call):
    url, waits = failing
    monkeypatch.setattr(remote, "RANGE_BYTES", 1000)
    artifact = open_anywhere(url, tmp_path)
    Failing.faults = {call: [ConnectionResetError("reset"), TimeoutError()]}
    name = artifact.parts()[0]
    assert artifact.file(name).read_bytes() == (corpus / name).read_bytes()
    assert waits == [0.5, 1.0]
    Failing.faults = {call: [ConnectionResetError("reset")] * 3}
    with pytest.raises(ArtifactError, match=r"cannot be fetched \(reset, 3 times\); run it again to go on"):
        artifact.file(artifact.parts()[1])
    assert len(waits) == 4


def test_what_may_not_be_read_is_not_tried_again(failing, tmp_path):
    url, waits = failing
    Failing.faults = {"cat_file": [PermissionError("Access Denied.")]}
    with pytest.raises(ArtifactError, match=r"manifest.json: not allowed to read it \(Access Denied\)"):
        open_anywhere(url, tmp_path)
    assert waits == []


def test_a_server_that_sends_less_than_asked(failing, tmp_path, monkeypatch):
    url, _ = failing
    artifact = open_anywhere(url, tmp_path)
    monkeypatch.setattr(Failing, "cat_ranges", lambda self, paths, starts, ends, **more: [b"x"] * len(paths))
    with pytest.raises(ArtifactError, match=r"cannot be fetched \(the server sent 1 bytes of \d+, 3 times\)"):
        artifact.file(artifact.parts()[0])


def test_a_cached_file_that_was_spoiled_is_fetched_again(failing, corpus, tmp_path):
    url, _ = failing
    name = open_artifact(corpus).parts()[0]
    path = open_anywhere(url, tmp_path).file(name)
    for spoil in (lambda: os.truncate(path, 10), lambda: path.write_bytes(bytes(path.stat().st_size))):
        for ask in (lambda a: a.file(name), lambda a: a.proven_file(name), lambda a: a.prove([name])):
            spoil()
            ask(open_anywhere(url, tmp_path))
            assert path.read_bytes() == (corpus / name).read_bytes()


def test_what_a_killed_process_left_is_cleared(failing, tmp_path):
    url, _ = failing
    artifact = open_anywhere(url, tmp_path)
    name = artifact.parts()[0]
    slot = remote.crc32(name.encode()) % remote.NUM_LOCKS
    left = artifact.path / "work" / f"fetch-{slot:03}.abc.tmp"
    left.write_bytes(b"half")
    artifact.file(name)
    assert not left.exists()


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", ".hidden", "manifest.json", "origin", "work"])
def test_names_that_lead_out_of_the_cache_are_refused(failing, corpus, tmp_path, name):
    url, _ = failing
    text = (corpus / "manifest.json").read_text().replace(open_artifact(corpus).parts()[0], name)
    fsspec.filesystem("failing").pipe_file(f"/{corpus.name}/manifest.json", text.encode())
    with pytest.raises(ArtifactError, match=f"manifest.json: '{name}' cannot be the name of a file"):
        open_anywhere(url, tmp_path)
    assert not cached(tmp_path)


def test_something_else_than_a_manifest(failing, corpus, tmp_path):
    url, _ = failing
    fsspec.filesystem("failing").pipe_file(f"/{corpus.name}/manifest.json", b"<html>")
    with pytest.raises(ArtifactError, match=r"failing://.*/manifest.json: not a manifest of this version"):
        open_anywhere(url, tmp_path)


def test_a_place_of_the_wrong_kind_is_named(failing, tmp_path):
    url, _ = failing
    with pytest.raises(ArtifactError, match=rf"stage.model: {url}: wanted an artifact of kind model, found one"):
        open_anywhere(url, tmp_path, "model", where="stage.model")
