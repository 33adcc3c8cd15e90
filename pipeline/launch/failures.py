"""Why a rank ended: the reason that it leaves for its launcher, what is said of one that left none."""

import json
import re
import signal
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline import errors
from pipeline.artifact import WORK, write_json
from pipeline.env import Share
from pipeline.errors import ArtifactError, ConfigError, LaunchError, Lost, PipelineError, TrainingError
from pipeline.launch.output import newest_try, rank_log
from pipeline.stage import HEARTBEATS

LAST_LINES = 15
OF_A_PEER = re.compile("Connection (?:closed|reset) by peer|remote process exited", re.IGNORECASE)


def blame(status: int) -> int:
    """Return how well an exit status tells what went wrong, best first: our own; a signal's, negated; any other's."""
    if status in (ConfigError.exit_status, ArtifactError.exit_status, TrainingError.exit_status):
        return 0
    return 1 if status < 0 else 2


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


def forget_ranks(directory: Path, share: Share) -> None:
    """Remove what these ranks left at an earlier try: their reasons, and signs of life, which are too old by now."""
    for rank in range(share.first, share.first + share.count):
        for name in (f"failure-{rank:05d}.json", f"{HEARTBEATS}/{rank:05d}"):
            (directory / WORK / name).unlink(missing_ok=True)


def guessed_reason(directory: Path, rank: int, status: int, node: str = "") -> PipelineError:
    """Say how a rank ended that left no reason, with the end of its log.

    Args:
        status: Its exit status, or the number of the signal that ended it, negated.
        node: Where it ran, if there are several.
    """
    log = rank_log(directory, rank)
    last = "\n".join(newest_try(log)[-LAST_LINES:]).strip()
    if status == ArtifactError.exit_status:
        return ArtifactError(f"{directory}: the disk is full; make room and run the same command again")
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
    hint = ""
    if status == -signal.SIGKILL:
        hint = f"; if nobody sent that, memory has run out: {short_of_memory(directory)}"
    elif found := OF_A_PEER.search(last):
        how += f" ({found[0]}: another rank was gone first)"
    end = f"; the end of {log}:\n{last}" if last else ""
    kind = Lost if status < 0 else LaunchError
    who = f"rank {rank} on {node}" if node else f"rank {rank}"
    return kind(f"{directory}: {who} {how}; the same command continues{hint}{end}")


def short_of_memory(directory: Path) -> str:
    """Say what memory the task frozen in `directory` was given, what it needs if that is known, and what helps."""
    try:
        task: Mapping[str, Any] = json.loads((directory / WORK / "task.json").read_text("utf-8"))
    except (OSError, ValueError):
        return "give it more, or run fewer ranks on a machine"
    run, need = task["run"], task.get("memory_bytes")
    words = []
    if "memory_per_node" in run:
        asked = run["memory_per_node"]
        words.append(f"the job asked for {f'memory_per_node={asked}' if asked else 'no memory_per_node'}")
    if need is not None:
        words.append(f"the model's states alone need about {gigabytes(need)} a rank, activations come on top")
    more = "raise run.memory_per_node, or " if "memory_per_node" in run else ""
    if need is None:
        return "; ".join([*words, f"{more}run fewer ranks on a machine"])
    spread = "spread the model (run.parallel.zero, run.parallel.tensor, more ranks on more nodes)"
    smaller = "feed less at once (run.microbatch_sequences, run.parallel.activation_checkpointing)"
    return "; ".join([*words, f"{more}{spread}, or {smaller}"])


def gigabytes(num_bytes: int) -> str:
    """Return a size as people say it."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.1f} MB"
