"""Checkpoints of training state: whole or not there, checksummed, the newest good one found by itself.

DeepSpeed writes the state of its ranks; it is neither atomic nor durable, so it writes into a temporary directory
that gets its final name after every file is on the disk and listed in `checkpoint.json`.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from pipeline.artifact import FileRecord, fsync, record_file, write_json
from pipeline.errors import ArtifactError, PipelineError, TrainingError
from pipeline.settings import Settings, decode, encode

NOTE = "checkpoint.json"
STATE = "state"  # DeepSpeed's own directory inside


class CheckpointNote(Settings):
    """What a checkpoint is: where training was, how it was laid out, and its files."""

    step: int
    ranks: int
    zero: int
    files: dict[str, FileRecord]


def save_checkpoint(engine: Any, directory: Path, step: int, zero: int, keep: int) -> None:
    """Save the state after `step` as `<directory>/step-00000123` and drop all but the newest `keep`.

    Raises:
        ArtifactError: If it cannot be written.
    """
    import deepspeed.comm as dist

    final = directory / f"step-{step:08d}"
    temporary = directory / f"{final.name}.tmp"
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    try:
        engine.save_checkpoint(str(temporary), tag=STATE, save_latest=False)
    except (RuntimeError, OSError) as error:  # torch says what happened in no better way
        free = shutil.disk_usage(directory).free
        message = f"{temporary}: could not be written ({str(error).splitlines()[0]}), with {free / 1e6:,.1f} MB free"
        raise ArtifactError(f"{message}; make room and run the same command again") from error
    dist.barrier()
    if dist.get_rank() == 0:
        _complete(temporary, final, step, zero)
        for old in checkpoints(directory)[keep:]:
            _remove(old)
    dist.barrier()


def load_checkpoint(engine: Any, directory: Path, zero: int, log: Any) -> int:
    """Load the newest undamaged checkpoint into `engine`; return the step it is of, or 0 where there is none.

    Raises:
        TrainingError: If it was saved by another number of ranks or another ZeRO stage.
    """
    import deepspeed.comm as dist

    if dist.get_rank() == 0:
        for unfinished in directory.glob("step-*.tmp"):
            shutil.rmtree(unfinished)
        _set_damaged_aside(directory, log)
    dist.barrier()
    found = checkpoints(directory)
    if not found:
        return 0
    note = _read_note(found[0])
    if (note.ranks, note.zero) != (dist.get_world_size(), zero):
        raise TrainingError(
            f"{found[0]}: saved by {note.ranks} ranks with ZeRO stage {note.zero}, this run has "
            f"{dist.get_world_size()} with {zero}; continue with run.ranks={note.ranks} "
            f"run.parallel.zero={note.zero}, or delete {directory} to start over"
        )
    engine.load_checkpoint(str(found[0]), tag=STATE)
    return note.step


def checkpoints(directory: Path) -> list[Path]:
    """Return the complete checkpoints, the newest first."""
    found = [path for path in directory.glob("step-*") if path.name[5:].isdigit() and (path / NOTE).is_file()]
    return sorted(found, reverse=True)


def _complete(temporary: Path, final: Path, step: int, zero: int) -> None:
    """Make every file durable, list it, and give the directory its name."""
    import deepspeed.comm as dist

    files = {}
    for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
        fsync(path)
        files[str(path.relative_to(temporary))] = record_file(path)
    note = CheckpointNote(step=step, ranks=dist.get_world_size(), zero=zero, files=files)
    write_json(temporary / NOTE, encode(note))
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    fsync(final.parent)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint so that a kill in the middle leaves none that looks whole."""
    unwanted = checkpoint.with_name(checkpoint.name + ".tmp")
    checkpoint.rename(unwanted)
    shutil.rmtree(unwanted)


def _set_damaged_aside(directory: Path, log: Any) -> None:
    """Look at the newest checkpoints until one is whole; rename those that are not."""
    for path in checkpoints(directory):
        try:
            note = _read_note(path)
            damaged = [name for name, record in note.files.items() if record_file(path / name) != record]
        except (PipelineError, ValueError) as error:
            damaged = [str(error)]
        if not damaged:
            return
        aside = path.with_name(path.name + ".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        log(f"checkpoint {path.name} is damaged ({damaged[0]}); set aside as {aside.name}, trying the one before")


def _read_note(path: Path) -> CheckpointNote:
    return decode(CheckpointNote, json.loads((path / NOTE).read_text("utf-8")), where=str(path / NOTE))
