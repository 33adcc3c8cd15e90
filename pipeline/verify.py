"""`python -m pipeline verify PATH|URL|JOB.TASK … [root=DIR]`: reads artifacts in full and checks them.

Every checksum of every file first; then whatever the stage that made the artifact can find by making it again in a
plain way. What is wrong is said a line each, all of it.
"""

import os
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from pipeline.artifact import Artifact
from pipeline.errors import ArtifactError, ConfigError, PipelineError
from pipeline.operate import find_artifact
from pipeline.plan import stage_of
from pipeline.remote import is_url, open_anywhere
from pipeline.stage import Stage


def verify(arguments: Sequence[str]) -> int:
    """Verify all that is named; return the exit status, which is 3 if anything is wrong.

    Raises:
        ConfigError: If nothing is named, or something that is no artifact's name.
    """
    root = Path(next((word[5:] for word in reversed(arguments) if word.startswith("root=")), "artifacts"))
    names = [word for word in arguments if not word.startswith("root=")]
    wrong = [word for word in names if word.startswith("-") or ("=" in word and not Path(word).exists())]
    if wrong:
        raise ConfigError(f"verify: '{wrong[0]}' is none of its words; wanted artifacts and root=DIR")
    if not names:
        raise ConfigError("verify: say what: python -m pipeline verify PATH|URL|JOB.TASK … [root=DIR]")
    status = 0
    for name in names:
        try:
            problems = _verify_one(find_artifact(name, root, whole=False), root)
        except PipelineError as error:
            problems = [str(error)]
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr, flush=True)
        status = ArtifactError.exit_status if problems else status
    return status


def _verify_one(artifact: Artifact, root: Path) -> list[str]:
    """Print what was proven of an artifact, or return what is wrong with it."""
    began = time.monotonic()
    problems = list(artifact.check(artifact.names, f"verify {artifact.place}"))
    if problems:
        return problems
    seconds = max(time.monotonic() - began, 1e-9)
    megabytes = sum(record.bytes for record in artifact.manifest.files.values()) / 1e6
    rate = f"{megabytes:,.1f} MB in {seconds:.1f} s, {megabytes / seconds:,.0f} MB/s"
    print(f"{artifact.place}: {len(artifact.names):,} files as the manifest says ({rate})", flush=True)
    try:
        stage = stage_of(artifact)
    except ArtifactError:
        print(f"{artifact.place}: made by another version, so only its files were checked", flush=True)
        return []
    if type(stage).verify is Stage.verify:
        return []
    inputs, missing = inputs_of(artifact, root)
    for line in missing:
        print(f"{artifact.place}: {line}, so nothing was compared with it", flush=True)
    try:
        problems = [f"{artifact.place}: {problem}" for problem in stage.verify(artifact, inputs)]
    except ArtifactError as error:
        problems = [str(error)]
    if not problems:
        print(f"{artifact.place}: what '{stage.kind}' looks for is right", flush=True)
    return problems


def inputs_of(
    artifact: Artifact, root: Path, names: Collection[str] | None = None
) -> tuple[dict[str, Artifact], list[str]]:
    """Return the inputs that an artifact was made of, and a line for each that is not there any more.

    Args:
        names: The settings that name those that are wanted; null wants all.
    """
    inputs, missing = {}, []
    for name, record in artifact.manifest.inputs.items():
        if names is not None and name not in names:
            continue
        if is_url(record.path) or artifact.url is None:
            place = record.path if is_url(record.path) else os.path.normpath(artifact.path.resolve() / record.path)
        else:
            place = f"{artifact.url}/{record.path}"
        try:
            found = open_anywhere(place, root)
        except PipelineError as error:
            missing.append(f"its input '{name}' is not there ({error})")
            continue
        if found.manifest.fingerprint == record.fingerprint:
            inputs[name] = found
        else:
            missing.append(f"its input '{name}' is another one by now ({found.place})")
    return inputs, missing
