import json
from pathlib import Path

import pytest

from pipeline.artifact import Artifact, InputRecord, Made, Manifest, open_artifact, record_file, write_manifest
from pipeline.errors import ArtifactError, ConfigError
from pipeline.settings import Input, decode, marked
from pipeline.stage import Run
from pipeline.stages.report import Report
from pipeline.text.arrow import write_tokens

MADE = Made(
    version="0", commit=None, python="3", host="here", time="2025-07-03T14:02:11+00:00", seconds=1.5, ranks=1
)  # fmt: skip


def make(root, kind, stage, stats, names=(), inputs=None):
    """Turn the files `names` in a directory into an artifact."""
    directory = root / stage
    directory.mkdir(parents=True, exist_ok=True)
    manifest = Manifest(
        kind=kind,
        name=stage,
        fingerprint=stage,
        stage={"kind": stage},
        inputs={n: InputRecord(path=f"../{a.path.name}", fingerprint=a.manifest.fingerprint) for n, a in (inputs or {}).items()},
        files={name: record_file(directory / name) for name in names},
        stats=stats,
        made=MADE,
    )
    write_manifest(directory, manifest)
    return open_artifact(directory)
