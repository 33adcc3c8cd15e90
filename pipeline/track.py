"""Where numbers go: `metrics.jsonl` in the artifact, and beside it Weights & Biases or TensorBoard.

One artifact is one run: its tracker run is named by its fingerprint, so a resumed task continues the same run, on one
axis of steps. `metrics.jsonl` is the record; what a tracker loses in a crash is in it.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Annotated, Any, Literal

from pydantic import Field

from pipeline.settings import Choice

METRICS = "metrics.jsonl"


class Tracker:
    """Takes numbers and drops them: what `tracker=none` and every rank but 0 use, and what the others extend."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the numbers of a step; steps only grow."""

    def close(self, failed: bool = False) -> None:
        """Write out what is held back."""


class NoTracker(Choice):
    """No record at all, not even `metrics.jsonl`; the report then has no curves."""

    kind: Literal["none"] = "none"


class Jsonl(Choice):
    """Only `metrics.jsonl` in the artifact."""

    kind: Literal["jsonl"] = "jsonl"


class TensorBoard(Choice):
    """Event files in `tensorboard/` of the artifact. Needs the extra `tensorboard`."""

    kind: Literal["tensorboard"] = "tensorboard"


class Wandb(Choice):
    """Weights & Biases; without an account, offline files in `wandb/` of the artifact, to be synced later."""

    kind: Literal["wandb"] = "wandb"
    project: str = "pipeline"
    entity: str | None = None
    mode: Literal["online", "offline"] | None = None


AnyTracker = Annotated[NoTracker | Jsonl | TensorBoard | Wandb, Field(discriminator="kind")]


def open_tracker(
    choice: NoTracker | Jsonl | TensorBoard | Wandb,
    directory: Path,
    run_id: str,
    name: str,
    config: Mapping[str, Any],
    after_step: int,
) -> Tracker:
    """Open the tracker of the artifact in `directory`.

    Args:
        run_id: Identity of the run in Weights & Biases; the same at every resume.
        after_step: The step that the state in hand has reached; later numbers of an earlier try are dropped.
    """
    if isinstance(choice, NoTracker):
        (directory / METRICS).unlink(missing_ok=True)  # of an earlier try with another tracker: it would stop short
        return Tracker()
    trackers: list[Tracker] = [MetricsFile(directory / METRICS, after_step)]
    if isinstance(choice, TensorBoard):
        trackers.append(TensorBoardTracker(directory / "tensorboard", after_step))
    if isinstance(choice, Wandb):
        trackers.append(WandbTracker(choice, directory, run_id, name, config))
    return Several(trackers)


class Several(Tracker):
    """Hands every number to each of some trackers."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self.trackers = trackers

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand the numbers on."""
        for tracker in self.trackers:
            tracker.log(step, metrics)

    def close(self, failed: bool = False) -> None:
        """Close each."""
        for tracker in self.trackers:
            tracker.close(failed)


class MetricsFile(Tracker):
    """Appends one JSON object a step: `step`, `time` (seconds since the epoch) and the numbers."""

    def __init__(self, path: Path, after_step: int) -> None:
        kept = [row for row in read_metrics(path) if row["step"] <= after_step]
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        temporary.replace(path)
        self.file: IO[str] = open(path, "a", buffering=1)  # noqa: SIM115 (closed by close)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a row."""
        self.file.write(json.dumps({"step": step, "time": round(time.time(), 3), **metrics}) + "\n")

    def close(self, failed: bool = False) -> None:
        """Make the rows durable."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


class TensorBoardTracker(Tracker):
    """Writes scalars to TensorBoard event files."""

    def __init__(self, directory: Path, after_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides the numbers that a killed try logged after its last checkpoint
        self.writer = SummaryWriter(str(directory), purge_step=after_step + 1 if after_step else None)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write each number."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self, failed: bool = False) -> None:
        """Flush and close the event file."""
        self.writer.close()


class WandbTracker(Tracker):
    """Logs to one Weights & Biases run, resumed by its id; offline where no account is set up."""

    def __init__(self, choice: Wandb, directory: Path, run_id: str, name: str, config: Mapping[str, Any]) -> None:
        import wandb

        mode = choice.mode or ("online" if _has_account() else "offline")
        self.run = wandb.init(
            project=choice.project,
            entity=choice.entity,
            id=run_id,
            name=name,
            resume="allow" if mode == "online" else None,
            mode=mode,
            dir=str(directory),
            config=dict(config),
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=mode == "offline"),
        )
        self.mode, self.directory = mode, directory

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log a row at its step."""
        self.run.log(dict(metrics), step=step)

    def close(self, failed: bool = False) -> None:
        """Finish the run; say how to sync one that is offline."""
        self.run.finish(exit_code=1 if failed else 0)
        if self.mode == "offline":
            print(f"wandb: offline; to upload: wandb sync {self.directory}/wandb/offline-run-*", flush=True)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the rows of a `metrics.jsonl`; none if it is not there. A last line cut by a kill is left out."""
    rows = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _has_account() -> bool:
    """Return whether Weights & Biases would find an API key without asking."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return netrc.exists() and "wandb" in netrc.read_text("utf-8")
