"""The weights of a checkpoint for who wants a model: without the optimizer, whatever the ranks were that wrote it."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from pipeline.artifact import FileRecord
from pipeline.errors import ArtifactError
from pipeline.proof import hash_file
from pipeline.training.checkpoints.format import DTYPES, WEIGHTS, Index, read_index, safetensors_header
from pipeline.training.checkpoints.reslice import Source
from pipeline.training.checkpoints.write import write_all

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.bfloat16, "fp8": torch.bfloat16}  # of training; else as it is


def read_weights(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights and buffers of a checkpoint, each whole, on the CPU, as exact as in training.

    They are those in training, not an average of them.

    Raises:
        ArtifactError: If it is not a checkpoint, or its weights are damaged; before the first is yielded.
    """
    index = read_index(checkpoint)
    for name in index.files:
        if name.startswith(f"{WEIGHTS}-"):
            check_file(checkpoint, index, name)
    source = Source(checkpoint, index)
    for name in sorted(model_tensors(index)):
        yield name, source.whole(name, WEIGHTS)


def write_weights(checkpoint: Path, path: Path) -> FileRecord:
    """Write the weights of a checkpoint to one safetensors file, in the precision of the training, durably.

    Only one of them at a time is in memory.

    Raises:
        ArtifactError: As `read_weights`.
    """
    index = read_index(checkpoint)
    source, precision = Source(checkpoint, index), PRECISIONS.get(index.about.get("precision", ""))
    entries = {}
    for name in sorted(model_tensors(index)):
        dtype, shape = source.dtype(name, WEIGHTS), index.tensors[name].shape
        dtype = precision if precision is not None and dtype.is_floating_point else dtype
        size = torch.Size(shape).numel() * dtype.itemsize
        entries[name] = (DTYPES[str(dtype).removeprefix("torch.")], shape, size)
    header = safetensors_header(entries)
    digest, size = xxhash.xxh3_128(header), len(header)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        write_all(descriptor, memoryview(header))
        for _, weight in read_weights(checkpoint):
            kept = weight.to(precision) if precision is not None and weight.is_floating_point() else weight
            numbers = kept.reshape(-1).view(torch.uint8).numpy().data
            digest.update(numbers)
            write_all(descriptor, numbers)
            size += len(numbers)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return FileRecord(bytes=size, xxh128=digest.hexdigest())


def model_tensors(index: Index) -> list[str]:
    """Return the names of parameters and buffers in a checkpoint."""
    return [name for name, record in index.tensors.items() if WEIGHTS in record.squares]


def check_file(checkpoint: Path, index: Index, name: str) -> None:
    """Read a file of a checkpoint in full.

    Raises:
        ArtifactError: If it is not what was written.
    """
    path, wanted = checkpoint / name, index.files.get(name)
    try:
        found = FileRecord(bytes=path.stat().st_size, xxh128=hash_file(path))
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror}); take another checkpoint") from None
    if found != wanted:
        raise ArtifactError(f"{path}: damaged: it is not as it was written; take another checkpoint")
