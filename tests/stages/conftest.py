"""Stages run without a launcher: all ranks one after another in this process, published as the worker does."""

import platform
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from pipeline.artifact import WORK, Artifact, InputRecord, Made, Manifest, open_artifact, write_manifest
from pipeline.env import Ranks
from pipeline.settings import encode, fingerprint
from pipeline.stage import Context, Run, Stage, read_outputs

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


@pytest.fixture
def run_stage() -> RunStage:
    """Give a function that runs a stage on some ranks and opens what it made."""

    def run(stage: Stage, inputs: Mapping[str, Artifact], directory: Path, world_size: int = 1) -> Artifact:
        return publish(stage, run_ranks(stage, inputs, directory, world_size), world_size)

    return run
