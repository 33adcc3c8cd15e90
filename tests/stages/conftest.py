"""Stages run without a launcher: all ranks one after another in this process, published as the worker does."""

import json
import platform
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from pipeline.artifact import WORK, Artifact, InputRecord, Made, Manifest, open_artifact, write_manifest
from pipeline.env import Ranks
from pipeline.errors import Preempted
from pipeline.settings import encode, fingerprint
from pipeline.stage import Context, Run, Stage, read_outputs
from pipeline.stages.shard import Shard, TextSource
from pipeline.text.readers import Jsonl

RunStage = Callable[..., Artifact]


def run_ranks(
    stage: Stage,
    inputs: Mapping[str, Artifact],
    directory: Path,
    world_size: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> Context:
    """Run every rank and return the context of the publisher."""
    for folder in ("units", "ranks"):
        (directory / WORK / folder).mkdir(parents=True, exist_ok=True)
    settings = Run(kind="local", ranks=world_size)
    for rank in range(world_size):
        ctx = Context(stage.kind, directory, inputs, settings, Ranks(rank, world_size, rank), should_stop=should_stop)
        stage.run(ctx)
        ctx.output.save(directory / WORK / "ranks" / f"{rank:05d}.json")
    return Context(stage.kind, directory, inputs, settings)


def publish(stage: Stage, ctx: Context, world_size: int) -> Artifact:
    """Turn the finished work of all ranks into an artifact."""
    files, stats = read_outputs(ctx.directory)
    ctx.output.files.update(files)
    made = Made(
        version="0", commit=None, python=platform.python_version(), host="", time="", seconds=0, ranks=world_size
    )
    manifest = Manifest(
        kind=stage.produces,
        name=stage.kind,
        fingerprint=fingerprint(encode(stage)),
        stage=encode(stage),
        inputs={n: InputRecord(path=str(a.path), fingerprint=a.manifest.fingerprint) for n, a in ctx.inputs.items()},
        stats=stage.finish(ctx, stats),
        files=dict(sorted(ctx.output.files.items())),
        made=made,
    )
    write_manifest(ctx.directory, manifest)
    return open_artifact(ctx.directory, stage.produces)


@pytest.fixture(scope="session")
def theirs(tmp_path_factory) -> Path:
    """A directory with a model of others of every family, which no test may change."""
    from hf_directories import FAMILIES, write_hf  # which imports transformers

    root = tmp_path_factory.mktemp("hf")
    for family in FAMILIES:
        write_hf(root / family, family)
    return root


@pytest.fixture
def run_stage() -> RunStage:
    """Give a function that runs a stage on some ranks and opens what it made."""

    def run(stage: Stage, inputs: Mapping[str, Artifact], directory: Path, world_size: int = 1) -> Artifact:
        return publish(stage, run_ranks(stage, inputs, directory, world_size), world_size)

    return run


@pytest.fixture
def texts_to_corpus(tmp_path: Path, run_stage: RunStage) -> Callable[..., Artifact]:
    """Give a function that makes a corpus of texts, with ids d0, d1, …, in parts of about `part_bytes`."""

    def make(texts: list[str], part_bytes: int = 64 << 20, name: str = "raw") -> Artifact:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"id": f"d{n}", "text": text}) + "\n" for n, text in enumerate(texts)))
        reader = Jsonl(id_field="id")
        shard = Shard(sources=[TextSource(path=str(path), reader=reader)], part_bytes=part_bytes)
        return run_stage(shard, {}, tmp_path / f"{name}-corpus")

    return make


@pytest.fixture
def damage() -> Callable[[Path], None]:
    """Give a function that flips one bit in the middle of a file."""

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    return flip


def content(artifact: Artifact) -> dict[str, bytes]:
    """Return all files of an artifact but its manifest."""
    return {name: artifact.file(name).read_bytes() for name in artifact.names}


@pytest.fixture
def same_on_any_ranks(tmp_path: Path, run_stage: RunStage) -> Callable[..., Artifact]:
    """Give a function that checks that 1, 2 and 3 ranks, and one that is killed after each unit, make equal bytes."""

    def check(stage: Stage, inputs: Mapping[str, Artifact]) -> Artifact:
        first = run_stage(stage, inputs, tmp_path / "one")
        for world_size in (2, 3):
            other = run_stage(stage, inputs, tmp_path / f"on{world_size}", world_size)
            assert content(other) == content(first)
            assert other.stats == first.stats
        killed = publish(stage, _run_killed(stage, inputs, tmp_path / "killed"), 1)
        assert content(killed) == content(first)
        assert killed.stats == first.stats
        return first

    return check


def _run_killed(stage: Stage, inputs: Mapping[str, Artifact], directory: Path) -> Context:
    """Run a stage that is asked to stop after every unit, again and again until it is done."""
    for _ in range(100):
        asked = iter([False])
        try:
            return run_ranks(stage, inputs, directory, 1, lambda asked=asked: next(asked, True))
        except Preempted:
            notes = sorted((directory / WORK / "units").iterdir())
    raise AssertionError(f"not done after 100 tries; finished units: {notes}")
