"""Which SLURM job is to make an artifact: so that jobs that share a task make it once, and nobody else writes there."""

import json
from pathlib import Path

from pipeline.artifact import WORK, write_json
from pipeline.errors import LaunchError
from pipeline.launch import scheduler
from pipeline.settings import Settings, decode, encode

CLAIM = "claim.json"  # in work/


class Claim(Settings):
    """A SLURM job that was submitted for a task, and the job that it is of."""

    slurm: str
    job: str


def write_claim(directory: Path, job: str, slurm: str) -> None:
    """Note that a SLURM job is to make the artifact in `directory`."""
    write_json(directory / WORK / CLAIM, encode(Claim(slurm=slurm, job=job)))


def forget_claim(directory: Path) -> None:
    """Take back what `write_claim` noted."""
    (directory / WORK / CLAIM).unlink(missing_ok=True)


def live_claim(directory: Path) -> Claim | None:
    """Return who is to make the artifact in `directory`, if SLURM says that this job waits or runs.

    Raises:
        LaunchError: If there is a claim, and SLURM cannot be asked whether it still holds.
    """
    try:
        claim = decode(Claim, json.loads((directory / WORK / CLAIM).read_text("utf-8")))
    except (OSError, ValueError):
        return None
    try:
        seen = scheduler.look([claim.slurm])
    except LaunchError as error:
        raise LaunchError(
            f"{directory}: SLURM job {claim.slurm} was submitted for it, and whether it still runs cannot be asked "
            f"({error}); ask on a login node, or delete {directory / WORK / CLAIM}"
        ) from None
    return claim if any(not one.is_over for one in seen.values()) else None
