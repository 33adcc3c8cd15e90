"""`python -m pipeline verify`: all that is wrong is found and said."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import PROJECT, run_pipeline

from pipeline.artifact import MANIFEST, open_artifact
from pipeline.errors import ArtifactError, ConfigError
from pipeline.operate import find_artifact
from pipeline.stages.clean import Clean
from pipeline.verify import verify


def run_command(*arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command that is no job."""
    words = [sys.executable, "-m", "pipeline", *map(str, arguments)]
    done = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, timeout=100)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The root of two tasks of a job called news."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "news.yaml").write_text(
        "# @package _global_\ntasks:\n"
        f"  shard: {{kind: shard, sources: [{{path: {PROJECT}/tests/data/mini.jsonl}}], part_bytes: 4000}}\n"
        '  clean: {kind: clean, corpus: "@shard"}\n'
    )
    run_pipeline(f"job={folder}/news.yaml", f"root={folder / 'root'}")
    return folder / "root"


@pytest.fixture
def root(made, tmp_path) -> Path:
    """A copy that may be spoiled."""
    return Path(shutil.copytree(made, tmp_path / "root", symlinks=True))


def spoil(path: Path) -> None:
    """Change one byte behind the file system's back."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_whole_artifacts_are_said_to_be_whole(root):
    names = ["news.shard", root / "jobs/news/clean", f"file://{(root / 'jobs/news/shard').resolve()}"]
    done = run_command("verify", *names, f"root={root}")
    assert len(done.stdout.splitlines()) == 3
    assert all(" files as the manifest says (" in line and " MB/s)" in line for line in done.stdout.splitlines())
    assert done.stdout.startswith(f"{(root / 'jobs/news/shard').resolve()}: ")
    assert done.stderr == ""


def test_all_that_is_wrong_is_reported_together(root):
    shard, clean = (open_artifact((root / "jobs/news" / task).resolve()) for task in ("shard", "clean"))
    first, second, third = shard.parts()[:3]
    spoil(shard.path / first)
    os.truncate(shard.path / second, 10)
    (shard.path / third).unlink()
    spoil(clean.path / clean.parts()[0])
    done = run_command("verify", "news.shard", "nowhere/at/all", "news.clean", f"root={root}", status=3)
    errors = done.stderr.splitlines()
    assert len(errors) == 5
    assert all(line.startswith("error: ") for line in errors)
    assert f"{shard.path / first}: damaged: wanted" in errors[0]
    assert f"{second}: damaged: wanted" in errors[1]
    assert "found 10 with" in errors[1]
    assert f"{third}: no such file, but the manifest lists it" in errors[2]
    assert "nowhere/at/all: no such directory" in errors[3]
    assert f"{clean.path / clean.parts()[0]}: damaged" in errors[4]
    assert done.stdout == ""


def test_the_stage_that_made_it_has_the_last_word(root, monkeypatch, capsys):
    seen = []

    def find(self, artifact, inputs):
        seen.append((artifact.manifest.kind, inputs["corpus"].path, self.corpus))
        yield "document 7 is not what it was"
        yield "document 9 neither"

    place = (root / "jobs/news/clean").resolve()
    monkeypatch.setattr(Clean, "verify", find)
    assert verify([str(place), f"root={root}"]) == 3
    assert seen == [("corpus", (root / "jobs/news/shard").resolve(), "@shard")]
    said = capsys.readouterr()
    assert said.err == f"error: {place}: document 7 is not what it was\nerror: {place}: document 9 neither\n"
    monkeypatch.setattr(Clean, "verify", lambda self, artifact, inputs: iter(()))
    assert verify([str(place), f"root={root}"]) == 0
    assert f"{place}: what 'clean' looks for is right\n" in capsys.readouterr().out

    def fail(self, artifact, inputs):
        raise ArtifactError("x.arrow: damaged")
        yield

    monkeypatch.setattr(Clean, "verify", fail)
    assert verify([str(place), f"root={root}"]) == 3
    assert capsys.readouterr().err == "error: x.arrow: damaged\n"


def test_an_input_that_is_gone_or_another_is_not_compared_with(root, monkeypatch, capsys):
    inputs_seen = []
    monkeypatch.setattr(Clean, "verify", lambda self, artifact, inputs: inputs_seen.append(inputs) or iter(()))
    shard = (root / "jobs/news/shard").resolve()
    manifest = json.loads((shard / MANIFEST).read_text())
    (shard / MANIFEST).write_text(json.dumps(manifest | {"fingerprint": "0" * 16}))
    assert verify([str(root / "jobs/news/clean")]) == 0
    assert f"its input 'corpus' is another one by now ({shard}), so nothing was compared" in capsys.readouterr().out
    shutil.rmtree(shard)
    assert verify([str(root / "jobs/news/clean")]) == 0
    assert "its input 'corpus' is not there (" in capsys.readouterr().out
    assert inputs_seen == [{}, {}]


def test_an_artifact_of_another_version_has_its_files_checked(root, capsys):
    place = (root / "jobs/news/clean").resolve()
    manifest = json.loads((place / MANIFEST).read_text())
    manifest["stage"]["old_setting"] = 1
    (place / MANIFEST).write_text(json.dumps(manifest))
    assert verify([str(place)]) == 0
    said = capsys.readouterr().out
    assert "files as the manifest says" in said
    assert f"{place}: made by another version, so only its files were checked\n" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "verify: say what: python -m pipeline verify PATH|URL|JOB.TASK … [root=DIR]"),
        (["root=somewhere"], "verify: say what"),
        (["--deep", "x"], "verify: '--deep' is none of its words; wanted artifacts and root=DIR"),
        (["x", "roto=y"], "verify: 'roto=y' is none of its words"),
    ],
)
def test_words_that_say_nothing(arguments, message):
    with pytest.raises(ConfigError) as caught:
        verify(arguments)
    assert message in str(caught.value)


def test_names_of_jobs_and_tasks(root, tmp_path, monkeypatch):
    assert find_artifact("news.clean", root).manifest.name == "clean"
    (root / "jobs/news/job.lock").touch()
    with pytest.raises(ArtifactError, match=r"new.clean: no job called 'new' has run in .*; did you mean 'news'\?"):
        find_artifact("new.clean", root)
    with pytest.raises(ArtifactError, match=r"no task called 'claen' has run in .*/jobs/news; did you mean 'clean'\?"):
        find_artifact("news.claen", root)
    with pytest.raises(ArtifactError, match=r"no task called 'x' has run in .*/jobs/news; there is clean, shard$"):
        find_artifact("news.x", root)
    with pytest.raises(ArtifactError, match=r"wanted an artifact of kind model, found one of kind 'corpus'"):
        find_artifact("news.clean", root, "model")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.corpus").symlink_to(root / "jobs/news/shard")  # what is there comes first
    assert find_artifact("my.corpus", root).manifest.name == "shard"


def test_commands_are_listed_and_a_typo_meets_the_nearest():
    assert "python -m pipeline verify PATH|URL|JOB.TASK ... [root=DIR]   " in run_command("--help").stdout
    assert run_command("verify", "--help").stdout.startswith("python -m pipeline verify PATH|URL|JOB.TASK")
    done = run_command("verfy", "x", status=2)
    assert done.stderr == "error: no command is called 'verfy' (a job is run by job=NAME); did you mean 'verify'?\n"
    assert run_command("verify", status=2).stderr.startswith("error: verify: say what")
    assert "a job is run by job=NAME" in run_command("quickstart", status=2).stderr


def test_the_command_loads_nothing_heavy(root):
    code = (
        "import sys; from pipeline.__main__ import main; sys.argv = ['pipeline', 'verify', sys.argv[1]]\n"
        "try: main()\nexcept SystemExit as end: assert end.code == 0\n"
        "print([m for m in ('torch', 'hydra', 'numpy', 'pyarrow', 'fsspec', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, root / "jobs/news/shard"], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
