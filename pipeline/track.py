"""Where numbers go: `metrics.jsonl` in the artifact, and beside it Weights & Biases or TensorBoard.

One artifact is one run: its tracker run is named by its fingerprint, so a resumed task continues the same run, on one
axis of steps. `metrics.jsonl` is the record; what a tracker loses in a crash is in it, and `upload` makes up for it.
"""

import io
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field

from pipeline.errors import ConfigError, LaunchError
from pipeline.settings import Choice

METRICS = "metrics.jsonl"
PATIENCE_S = 30  # for an answer of W&B
State = Literal["finished", "failed", "unfinished"]


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
    """Weights & Biases; without an account or in a SLURM job, offline files in `wandb/` of the artifact.

    Attributes:
        mode: Null is online where an account is set up, but offline in a SLURM job, whose node may have no network;
            `python -m pipeline sync` uploads from where there is one.
    """

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

        mode = choice.mode or ("online" if _has_account() and "SLURM_JOB_ID" not in os.environ else "offline")
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
            print(f"wandb: offline; to upload: python -m pipeline sync {self.directory}", flush=True)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the rows of a `metrics.jsonl`; none if it is not there. What is no row, as one cut short, is left out."""
    rows = []
    for line in path.read_text("utf-8", errors="replace").splitlines() if path.exists() else []:
        with suppress(ValueError):
            row = json.loads(line)
            if (
                isinstance(row, dict)
                and isinstance(row.get("step"), int)
                and isinstance(row.get("time", 0), int | float)
            ):
                rows.append(row)
    return rows


def upload(
    choice: Wandb, run_id: str, name: str, config: Mapping[str, Any], rows: Sequence[Mapping[str, float]], state: State
) -> tuple[int, int]:
    """Bring the rows of a `metrics.jsonl` that W&B lacks into its run, and mark how the run ended.

    Args:
        state: W&B knows no state of a run that will go on later but "preempted": that is what "unfinished" becomes.

    Returns:
        How many rows were sent, and the last step that W&B had before.

    Raises:
        ConfigError: If no account is set up, or W&B does not take it.
        LaunchError: If W&B cannot be reached, or does not take what is sent.
    """
    if not _has_account():
        raise ConfigError("W&B: no account is set up here; `wandb login`, or WANDB_API_KEY in the environment, does it")
    os.environ["WANDB_SILENT"] = "false"
    import wandb

    said = io.StringIO()  # W&B does not raise that it could not send something, but says so
    try:
        with TemporaryDirectory() as scratch, redirect_stderr(said):
            run = _open_online(choice, run_id, name, config, scratch)
            lacking = [row for row in rows if row["step"] >= run.starting_step]
            for row in lacking:
                numbers = {key: value for key, value in row.items() if key not in ("step", "time")}
                run.log({**numbers, "_timestamp": row["time"]}, step=int(row["step"]))
            if state == "unfinished":
                run.mark_preempting()
            run.finish(exit_code=0 if state == "finished" else 1)
    except wandb.errors.AuthenticationError as error:
        raise ConfigError(f"W&B: {_in_one_line(str(error))}") from None
    except wandb.Error as error:
        raise LaunchError(f"W&B: {_in_one_line(str(error))}; what is not there yet comes with the next sync") from None
    if "Fatal error" in said.getvalue():
        raise LaunchError(f"W&B: {name}: not all that was sent was taken; the next sync sends the rest")
    return len(lacking), run.starting_step - 1


def _open_online(choice: Wandb, run_id: str, name: str, config: Mapping[str, Any], scratch: str) -> Any:
    """Open a run of W&B that may be there already."""
    import wandb

    return wandb.init(
        project=choice.project,
        entity=choice.entity,
        id=run_id,
        name=name,
        resume="allow",
        mode="online",
        dir=scratch,
        config=dict(config),
        settings=wandb.Settings(
            console="off",
            init_timeout=PATIENCE_S,
            x_disable_stats=True,
            x_disable_meta=True,  # of this machine, which is not the one that trained
            disable_git=True,
            x_graphql_retry_max=5,
            x_file_stream_retry_max=5,
            x_file_stream_retry_wait_max_seconds=PATIENCE_S / 5,
        ),
    )


def _in_one_line(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _has_account() -> bool:
    """Return whether Weights & Biases would find an API key without asking."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or "wandb"
    known = netrc.read_text("utf-8") if netrc.exists() else ""
    return host in known or "wandb" in known
