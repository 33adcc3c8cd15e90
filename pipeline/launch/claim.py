"""Which SLURM job is to make an artifact: so that jobs that share a task make it once, and nobody else writes there.

A claim is written before its SLURM job is submitted: should the submission die meanwhile, it is found by its token.
"""

import json
from pathlib import Path

from pipeline.artifact import WORK, write_json
from pipeline.errors import ConfigError, LaunchError
from pipeline.launch import scheduler
from pipeline.settings import Settings, decode, encode

CLAIM = "claim.json"  # in work/


class Claim(Settings):
    """A SLURM job that was submitted for a task.

    Attributes:
        slurm: Its id; null until SLURM has answered.
        job: The job that it is of.
        token: Its comment, that no other SLURM job has; an older claim may lack it.
        cluster: Where it was submitted; an older claim does not say it.
    """

    slurm: str | None = None
    job: str
    token: str | None = None
    cluster: str | None = None


def write_claim(directory: Path, job: str, slurm: str | None, token: str | None) -> None:
    """Note that a SLURM job is, or is about to be submitted, to make the artifact in `directory`."""
    claim = Claim(slurm=slurm, job=job, token=token, cluster=scheduler.cluster())
    write_json(directory / WORK / CLAIM, encode(claim))


def forget_claim(directory: Path) -> None:
    """Take back what `write_claim` noted."""
    (directory / WORK / CLAIM).unlink(missing_ok=True)


def read_claim(directory: Path) -> Claim | None:
    """Return the SLURM job that was last submitted for a task, and the job that this was for; null if none is said."""
    try:
        claim = decode(Claim, json.loads((directory / WORK / CLAIM).read_text("utf-8")))
    except (OSError, ValueError, ConfigError):
        return None
    return claim if claim.slurm is None or claim.slurm.isdecimal() else None


def live_claim(directory: Path) -> Claim | None:
    """Return who is to make the artifact in `directory`, if SLURM says that this job waits or runs; with its id.

    Raises:
        LaunchError: If there is a claim, and SLURM cannot be asked whether it still holds, as on another cluster.
    """
    claim = read_claim(directory)
    if claim is None:
        return None
    try:
        here = scheduler.cluster() if claim.cluster else None
        if claim.cluster != here:
            raise LaunchError(f"it is of cluster {claim.cluster}, and this is {here}")
        slurm = claim.slurm or (scheduler.find(claim.token) if claim.token else None)
        seen = scheduler.look([slurm] if slurm else [])
    except LaunchError as error:
        where = f"on a login node{f' of {claim.cluster}' if claim.cluster else ''}"
        raise LaunchError(
            f"{directory}: a SLURM job{f' ({claim.slurm})' if claim.slurm else ''} was submitted for it, and whether "
            f"it still runs cannot be asked ({error}); ask {where}, or, once it is over, delete "
            f"{directory / WORK / CLAIM}"
        ) from None
    claim = claim.model_copy(update={"slurm": slurm})
    return claim if any(not one.is_over for one in seen.values()) else None
