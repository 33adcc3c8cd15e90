"""What the documents say is true: their commands parse, their paths exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from support import PROJECT, command, run_pipeline

from pipeline.__main__ import COMMANDS
from pipeline.compose import compose
from pipeline.launch.local import Local
from pipeline.launch.slurm import Slurm
from pipeline.plan import Command, StageHolder
from pipeline.settings import decode
from pipeline.stages.pretrain import Pretrain

README = (PROJECT / "README.md").read_text()
DOCS = "".join(path.read_text() for path in sorted((PROJECT / "docs").glob("*.md")))
SLURM = (PROJECT / "slurm/README.md").read_text()
LINES = re.findall(r"^\$ (.+?)(?:\s+#.*)?$", README + DOCS + SLURM, re.MULTILINE)
PIPELINE = [line for line in LINES if line.startswith("python -m pipeline")]
DEVCLUSTER = [line for line in LINES if "slurm/devcluster" in line]
SBATCH = [line for line in LINES if line.startswith("sbatch ")]


def test_the_first_screen_shows_the_two_commands():
    first_screen = README.splitlines()[:35]
    assert any(line.startswith("$ make quickstart") for line in first_screen)
    assert any(line.startswith("$ make test") for line in first_screen)


@pytest.mark.parametrize("line", PIPELINE)
def test_every_command_composes_and_decodes(line):
    arguments = shlex.split(line)[3:]
    if arguments[0] in COMMANDS:
        words = COMMANDS[arguments[0]].words
        assert all("=" not in word or word.split("=")[0] in re.findall(r"\w+", words) for word in arguments[1:])
        return
    if arguments[0].startswith("--") or "--help" in arguments:
        assert run_pipeline(*arguments).stdout
        return
    commands = []
    assert compose(arguments, lambda data, job: commands.append(decode(Command, data)) or 0) == 0
    assert len(commands) == (2 if "-m" in arguments else 1)


def test_the_job_of_the_readme_plans(tmp_path):
    job = re.search(r"```yaml\n(.+?)```", README, re.DOTALL).group(1)
    (tmp_path / "web.jsonl").write_text('{"content": "text", "url": "u", "lang": "en"}\n')
    job = job.replace("/data/books/**/*.txt", str(PROJECT / "*.md"))
    job = job.replace("/data/web.jsonl.zst", str(tmp_path / "web.jsonl"))
    (tmp_path / "books.yaml").write_text(job)
    done = run_pipeline(f"job={tmp_path}/books.yaml", f"root={tmp_path}/artifacts", "--plan")
    assert "10 of 10 tasks would run" in done.stdout
    preset = "model@tasks.pretrain.model=gpt2_124m"
    done = run_pipeline(f"job={tmp_path}/books.yaml", preset, f"root={tmp_path}/artifacts", "--cfg", "job")
    assert "norm: layernorm" in done.stdout
    sweep = next(line for line in README.splitlines() if " -m job=quickstart" in line).split("#")[0].split()[-1]
    done = run_pipeline("-m", f"job={tmp_path}/books.yaml", sweep, f"root={tmp_path}/artifacts", "--plan")
    assert done.stdout.count("10 of 10 tasks would run") == 2


@pytest.mark.parametrize("block", re.findall(r"```yaml pretrain\n(.+?)```", DOCS, re.DOTALL))
def test_the_settings_of_pretraining_decode(block):
    stage = decode(Pretrain, {"kind": "pretrain", "steps": 1, **plain(block)})
    assert list(stage.check({}, Local())) == []


@pytest.mark.parametrize("block", re.findall(r"```yaml run\n(.+?)```", DOCS, re.DOTALL))
def test_how_it_runs_decodes(block):
    assert decode(Local, {"kind": "local", **plain(block)}) != Local()


@pytest.mark.parametrize("block", re.findall(r"```yaml tasks\n(.+?)```", DOCS, re.DOTALL))
def test_the_tasks_of_the_documents_decode(block):
    for name, settings in plain(block).items():
        assert decode(StageHolder, {"stage": settings}, where=name).stage.kind == settings["kind"]


def plain(block: str) -> dict:
    """Return YAML as Hydra reads it."""
    return OmegaConf.to_container(OmegaConf.create(block))


@pytest.mark.parametrize("line", sorted(set(DEVCLUSTER)))
def test_every_word_of_devcluster_is_in_its_help(line):
    script = PROJECT / "slurm/devcluster"
    known = subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout
    words = re.search(r"slurm/devcluster ([^\")]+)", line).group(1).split()
    assert re.search(rf"^  {words[0]}\b", known, re.MULTILINE)
    assert all(f" {word} " in known for word in words if word.startswith("--"))


@pytest.mark.parametrize("line", sorted(set(SBATCH)))
def test_every_line_of_sbatch_composes_and_decodes(line):
    flags, _, arguments = line.partition(" slurm/stage.sbatch ")
    assert all(flag.startswith("--") for flag in flags.split()[1:])
    commands = []
    words = shlex.split(arguments)
    words += [] if "run=" in arguments else ["run=slurm"]
    assert compose(words, lambda data, job: commands.append(decode(Command, data)) or 0) == 0
    assert commands[0].run.kind == "slurm"


def test_the_page_on_slurm_names_every_setting():
    table = SLURM[SLURM.index("| key |") : SLURM.index("Data tasks (")]
    named = {name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split(" | ")[0])}
    assert named == set(Slurm.model_fields) - {"kind", "ranks"}


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.+?)```", SLURM, re.DOTALL))
def test_the_clusters_of_the_page_on_slurm_decode(block):
    settings = plain(block)
    assert settings.pop("defaults") == ["slurm", "_self_"]
    assert decode(Slurm, {"kind": "slurm", **settings}).ranks == 8


@pytest.mark.parametrize("line", sorted(set(LINES) - set(PIPELINE) - set(DEVCLUSTER) - set(SBATCH)))
def test_every_make_target_exists(line):
    program, target = line.split()
    assert program == "make"
    assert re.search(rf"^{target}:", (PROJECT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/data.md", "docs/models.md", "slurm/README.md"])
def test_every_path_exists(name):
    text = (PROJECT / name).read_text()
    for path in re.findall(r"`((?:pipeline|conf|jobs|slurm|tests)/[\w./]+)`", text):
        assert "NAME" in path or (PROJECT / path).exists(), f"{name} names {path}"


def test_the_console_script_is_the_same_command():
    script = Path(sys.executable).parent / "pretrain-pipeline"
    arguments = command("--help")[3:]
    done = subprocess.run([script, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout == run_pipeline("--help").stdout


def test_the_changelog_has_an_unreleased_section():
    assert "## [Unreleased]" in (PROJECT / "CHANGELOG.md").read_text()
