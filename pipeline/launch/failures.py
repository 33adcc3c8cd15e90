"""Why a rank ended: the reason that it leaves for its launcher, and what is said of one that left none."""

import json
import signal
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline import errors
from pipeline.artifact import WORK, write_json
from pipeline.env import Share
from pipeline.errors import ArtifactError, ConfigError, LaunchError, Lost, PipelineError

LAST_LINES = 15


def leave_reason(directory: Path, rank: int, error: PipelineError) -> None:
    """Leave the reason why this rank fails where its launcher finds it; on a full disk the exit status has to do."""
    problems = error.problems if isinstance(error, ConfigError) else [str(error)]
    with suppress(OSError, ArtifactError):
        data = {"class": type(error).__name__, "problems": list(problems)}
        write_json(directory / WORK / f"failure-{rank:05d}.json", data)


def left_reason(directory: Path, rank: int) -> PipelineError | None:
    """Return the error that a rank left, if it left one."""
    try:
        data: Mapping[str, Any] = json.loads((directory / WORK / f"failure-{rank:05d}.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    kind: type[PipelineError] = getattr(errors, data["class"], PipelineError)
    return kind(*data["problems"])


def forget_reasons(directory: Path, share: Share) -> None:
    """Remove what these ranks left at an earlier try."""
    for rank in range(share.first, share.first + share.count):
        (directory / WORK / f"failure-{rank:05d}.json").unlink(missing_ok=True)


def guessed_reason(directory: Path, rank: int, status: int) -> PipelineError:
    """Say how a rank ended that left no reason, with the end of its log.

    Args:
        status: Its exit status, or the number of the signal that ended it, negated.
    """
    log = rank_log(directory, rank)
    last = ""
    with suppress(OSError):
        last = "\n".join(log.read_text("utf-8", errors="replace").splitlines()[-LAST_LINES:])
    if status == ArtifactError.exit_status:
        return ArtifactError(f"{directory}: the disk is full; make room and run the same command again")
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
    end = f"; the end of {log}:\n{last}" if last else ""
    kind = Lost if status < 0 else LaunchError
    return kind(f"{directory}: rank {rank} {how}; the same command continues{end}")


def rank_log(directory: Path, rank: int) -> Path:
    """Return the file with the output of a rank."""
    return directory / "logs" / f"rank-{rank:05d}.log"
