"""What a stage is, and all that it may know about where it runs.

A stage is a `Choice` whose fields are its settings. `run` does one rank's work; `finish` is called once, after all
ranks, and may check and complete the numbers before the artifact is published.
"""

import json
import tempfile
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, StringConstraints

from pipeline.artifact import WORK, Artifact, FileRecord, atomic, write_json
from pipeline.env import Ranks
from pipeline.errors import ConfigError, LaunchError, PipelineError, Preempted
from pipeline.progress import Progress
from pipeline.proof import Proofs, settle
from pipeline.settings import Choice, Settings, decode, encode
from pipeline.track import Tracker

Stats = dict[str, Any]
TaskName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]  # becomes part of a path
SCRATCH = "scratch"  # in work/
PARTIAL = "partial"  # in work/: what a stage needs to go on with inside a unit; gone once the artifact is published
HEARTBEATS = "heartbeats"  # in work/: what each rank of a group is doing
PROGRESS = "progress"  # in work/: how far each rank is
ATTEMPT_FILE = "attempt"  # in work/: the number of the newest try; ranks of earlier ones may no longer write
SAVE_FILE = "save_s"  # in work/: the seconds that saving a checkpoint took at the most
CHECKPOINTS = "checkpoints"  # of a training, beside work/


class Parallel(Settings):
    """How a training task is spread over its ranks: as many data-parallel ones as there are groups of `tensor`.

    Attributes:
        zero: ZeRO stage (Rajbhandari et al. 2020, arXiv:1910.02054): what the data-parallel ranks share out among them;
            the optimizer's state (1), gradients too (2), weights too (3), or nothing (0).
        tensor: Neighbouring ranks that share every layer (Shoeybi et al. 2019, arXiv:1909.08053).
        sequence: Whether these also share the positions between the layers (Korthikanti et al. 2022, arXiv:2205.05198).
        offload: Where the state of the optimizer is kept and updated; null is on the device.
        offload_dir: A directory on a local disk, for offload "nvme".
        activation_checkpointing: What is computed again in the backward pass instead of being kept (Chen et al. 2016,
            arXiv:1604.06174): "full" is all of every layer, "selective" only what is cheap, so that the results of
            matrix products, attention and exchanges between ranks are kept.
        deepspeed: Merged last into DeepSpeed's JSON; refused where it contradicts a typed setting.
    """

    zero: Literal[0, 1, 2, 3] = 1
    tensor: int = Field(default=1, ge=1)
    sequence: bool = False
    offload: Literal["cpu", "nvme"] | None = None
    offload_dir: str | None = None
    activation_checkpointing: Literal["full", "selective"] | None = None
    deepspeed: dict[str, Any] = {}


class Checkpoints(Settings):
    """When the state of a training is saved, and what of it is kept.

    Attributes:
        every_steps: Steps between two checkpoints.
        every_minutes: Minutes after which one is saved in between, that goes when the next one is whole; null is never.
        keep: How many of the newest stay.
        keep_every_steps: Those of steps that this divides stay for ever; null is none.
        keep_best: Whether the one with the lowest validation loss stays too.
    """

    every_steps: int = Field(default=100, ge=1)
    every_minutes: float | None = Field(default=None, gt=0)
    keep: int = Field(default=2, ge=1)
    keep_every_steps: int | None = Field(default=None, ge=1)
    keep_best: bool = False


class Run(Choice):
    """How a task runs. Nothing here may change a result beyond rounding, and nothing here is hashed.

    Attributes:
        ranks: Processes of a task that can use several.
        threads: Processor threads of each rank; null shares the machine's processors among its ranks.
        microbatch_sequences: Sequences that a rank feeds at once; null feeds its share of the batch at once.
        compile: Whether the layers are compiled by torch before training.
        stall_timeout_s: Seconds without any progress after which a rank counts as stalled, and the task ends.
        tries: How often a task is begun without any progress in between before it has failed: ranks that were ended
            from outside are started again, and so is a task that was told to stop.
    """

    ranks: int = Field(default=1, ge=1)
    threads: int | None = Field(default=None, ge=1)
    microbatch_sequences: int | None = Field(default=None, ge=1)
    compile: bool = False
    stall_timeout_s: float = Field(default=600.0, gt=0)
    checkpoints: Checkpoints = Checkpoints()
    tries: int = Field(default=1, ge=1)
    parallel: Parallel = Parallel()

    def of(self, name: str, stage: "Stage") -> Self:
        """Return the settings of the task `name`, with `ranks` all of its processes."""
        return self.model_copy(update={"ranks": 1}) if stage.ranks == "one" else self


class Output:
    """Files and numbers of a task, or of one unit of its work, that will go into the manifest."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files: dict[str, FileRecord] = {}
        self.stats: Stats = defaultdict(int)
        self.proofs = Proofs(directory)

    @contextmanager
    def write(self, name: str, known: FileRecord | None = None) -> Iterator[Path]:
        """Give a path to write a file to; on success the file is durable, named `name` and in the manifest.

        Args:
            known: What the file will be, of who took its checksum while writing it; else it is read.
        """
        with atomic(self.directory / name) as temporary:
            yield temporary
            settle(temporary)
            if known is None:
                self._record(name, temporary)
                return
            status = temporary.stat()
            assert status.st_size == known.bytes, f"{name}: {status.st_size} bytes, but {known.bytes} were written"
            self.proofs.add(name, known.xxh128, status)
            self.files[name] = known

    def add(self, name: str) -> None:
        """Put a file that is already in the directory into the manifest."""
        self._record(name, self.directory / name)

    def _record(self, name: str, path: Path) -> None:
        num_bytes, xxh128 = self.proofs.prove(name, path)
        self.files[name] = FileRecord(bytes=num_bytes, xxh128=xxh128)

    def save(self, path: Path) -> None:
        """Leave a durable note of what was made."""
        write_json(path, encode(OutputRecord(files=self.files, stats=self.stats)))


class OutputRecord(Settings):
    """The note that a rank leaves of its own output or of a finished unit."""

    files: dict[str, FileRecord]
    stats: dict[str, Any]


class Unit(Output):
    """One unit of a data stage's work: skipped after a restart once it is finished."""

    def __init__(self, directory: Path, name: str) -> None:
        super().__init__(directory)
        self.name = name


class Stage(Choice):
    """Turns input artifacts into one output artifact.

    Class attributes:
        version: Raised by hand when the results change; part of the fingerprint.
        produces: Kind of artifact that it makes.
        ranks: "one" process; any number of them that share "units" of work; or a process "group".
        result: What a person opens of its artifact, relative to its directory; its path ends a job's output.
        streams: Whether a terminal has shown what `show` yields by the time that the stage ends.
    """

    version: ClassVar[int] = 1
    produces: ClassVar[str]
    result: ClassVar[str | None] = None
    ranks: ClassVar[Literal["one", "units", "group"]] = "one"
    streams: ClassVar[bool] = False

    @abstractmethod
    def run(self, ctx: "Context") -> None:
        """Do this rank's share of the work."""

    def finish(self, ctx: "Context", stats: Stats) -> Stats:
        """Check and complete the summed statistics of all ranks before they are published."""
        return stats

    def check(self, upstream: Mapping[str, "Stage"], run: Run) -> Iterator[tuple[str, str]]:
        """Yield (setting, problem) for what cannot work.

        Args:
            upstream: The stage that makes each input, by field; and where this job makes that input's inputs too, their
                stages, as "tokens/tokenizer".
        """
        return iter(())

    def check_inputs(self, inputs: Mapping[str, Artifact], run: Run) -> Iterator[tuple[str, str]]:
        """Yield (setting, problem) for what cannot work with inputs that are made, by their manifests and small files.

        Asked at planning, once `check` has found nothing, of those inputs that are there; `run` asks it of all.
        """
        return iter(())

    def identity(self, run: Run) -> Mapping[str, Any]:
        """Return what the output depends on beside settings and inputs, to be hashed with them."""
        return {}

    def disk_bytes(self, input_bytes: int, run: Run) -> int:
        """Return an estimate of the disk space that the output needs, given the size of all inputs."""
        return input_bytes

    def memory_bytes(self, upstream: Mapping[str, "Stage"], run: Run) -> int | None:
        """Return an estimate of the memory that a rank needs at the least; null where that is not known.

        Args:
            upstream: As of `check`.
        """
        return None

    def verify(self, artifact: Artifact, inputs: Mapping[str, Artifact]) -> Iterator[str]:
        """Yield, a line each, what is wrong with an artifact of this stage though its checksums are right.

        Called by `python -m pipeline verify` once every file is proven: the place to make again by plain means what
        was made by fast ones. `inputs` has what the artifact was made of, by field, where that is still there.
        """
        return iter(())

    @classmethod
    def headline(cls, stats: Stats) -> tuple[str, str]:
        """Return how much was done ("515 documents") and the number that matters ("12 dropped")."""
        return "", ""

    @classmethod
    def show(cls, artifact: Artifact) -> Iterator[str]:
        """Yield the lines that a person who ran this stage alone wants to read at its end."""
        return iter(())


@dataclass
class Context:
    """One rank's view of its task.

    Attributes:
        inputs: The open artifacts, by the dotted path of the setting that names each.
        open_tracker: Opens the tracker of this artifact, given the step to continue after; `tracker` calls it once.
        should_stop: Whether somebody asked this rank to stop.
        attempt: The number of the try that this rank belongs to; 0 where no launcher counts them.
        attempt_name: The file in work/ that counts the tries: an element of an array has one of its own.
        leave_reason: Leaves the reason of a failure where the launcher finds it.
        beat: Says that this rank begins a phase of its work, and of which step; null is the same step as before. All
            ranks of a group go through the same phases.
    """

    task: str
    directory: Path
    inputs: Mapping[str, Artifact]
    settings: Run
    ranks: Ranks = field(default_factory=Ranks)
    open_tracker: Callable[[int], Tracker] = lambda after_step: Tracker()
    should_stop: Callable[[], bool] = lambda: False
    attempt: int = 0
    attempt_name: str = ATTEMPT_FILE
    leave_reason: Callable[[PipelineError], None] = lambda error: None
    beat: Callable[[str, int | None], None] = lambda phase, step: None
    output: Output = field(init=False)
    _tracker: Tracker | None = None

    def __post_init__(self) -> None:
        self.output = Output(self.directory)

    def tracker(self, after_step: int) -> Tracker:
        """Return where numbers go, opened at the first call; on ranks other than 0 they go nowhere."""
        if self._tracker is None:
            self._tracker = self.open_tracker(after_step) if self.rank == 0 else Tracker()
        return self._tracker

    def rewind_tracker(self, after_step: int) -> None:
        """Go back to a step: the numbers of later ones are dropped."""
        self.close_tracker(failed=False)
        self._tracker = None
        self.tracker(after_step)

    def check_attempt(self) -> None:
        """Refuse to write for a try that has been followed by another one, as when a node that was cut off comes back.

        Raises:
            LaunchError: If a later try has begun.
        """
        path = self.directory / WORK / self.attempt_name
        if self.attempt and (newest := int(path.read_text("ascii"))) != self.attempt:
            raise LaunchError(
                f"{self.directory}: this is try {self.attempt} and try {newest} has begun; nothing more is written"
            )

    def close_tracker(self, failed: bool) -> None:
        """Write out what the tracker holds back, if one was opened."""
        if self._tracker is not None:
            self._tracker.close(failed)

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        return self.ranks.rank

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Give an empty directory on the output's disk, gone after the block, and after a kill at the next start."""
        parent = self.directory / WORK / SCRATCH
        parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent) as directory:
            yield Path(directory)

    def units(self, names: Sequence[str], noun: str) -> Iterator[Unit]:
        """Yield this rank's unfinished units; each is recorded as finished when the loop comes back for the next.

        Rank r of w takes units r, r + w, …; what is written must not depend on which rank does it.

        Raises:
            Preempted: Between two units, when somebody asked for a stop.
        """
        mine = names[self.ranks.rank :: self.ranks.world_size]
        progress = Progress(self.task, len(mine), noun, show=self.rank == 0, note=self._note())
        for name in mine:
            note = self.directory / WORK / "units" / f"{name}.json"
            if not note.exists():
                if self.should_stop():
                    raise Preempted(f"{self.task} between two {noun}; the finished ones stay")
                unit = Unit(self.directory, name)
                yield unit
                unit.save(note)
            progress.advance()
        progress.close()

    def progress(self, total: float, noun: str, start: float = 0, show: bool = True) -> Progress:
        """Return a progress line for `total` things, which all ranks do together: rank 0 speaks for them."""
        is_first = self.rank == 0
        return Progress(self.task, total, noun, start, show and is_first, self._note() if is_first else None)

    def _note(self) -> Path:
        """Return where `status` looks for how far this rank is."""
        return self.directory / WORK / PROGRESS / f"{self.rank:05d}.json"

    def refuse(self, problems: Iterable[tuple[str, str]]) -> None:
        """Raise one ConfigError with all (setting, problem), if there are any."""
        if lines := [say_problem(self.task, name, problem) for name, problem in problems]:
            raise ConfigError(*lines)

    def log(self, message: str) -> None:
        """Print one line."""
        if self.rank == 0:
            print(f"{self.task}: {message}", flush=True)


def say_problem(where: str, name: str, problem: str) -> str:
    """Return the line for a problem of a setting of the stage at `where`; one of `run` says its place itself."""
    return problem if problem.startswith("run.") else f"{where}.{name}: {problem}"


def read_outputs(directory: Path) -> tuple[dict[str, FileRecord], Stats]:
    """Merge what all ranks and units left in `work/`: their files, and the sums of their counts."""
    files: dict[str, FileRecord] = {}
    stats: Stats = {}
    for path in sorted((directory / WORK).glob("units/*.json")) + sorted((directory / WORK).glob("ranks/*.json")):
        record = decode(OutputRecord, json.loads(path.read_text("utf-8")))
        files.update(record.files)
        for name, value in record.stats.items():
            counted = isinstance(value, int | float) and name in stats
            stats[name] = stats[name] + value if counted else value
    return files, stats
