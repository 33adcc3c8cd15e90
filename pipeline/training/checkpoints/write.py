"""Copies what a rank holds to memory of the host, and writes it as safetensors with everything that is checked."""

import errno
import fcntl
import math
import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

from pipeline.artifact import FileRecord
from pipeline.errors import TrainingError
from pipeline.training.checkpoints.format import (
    DTYPES,
    OPTIMIZER,
    WEIGHTS,
    Part,
    Piece,
    Record,
    file_name,
    key,
    safetensors_header,
)
from pipeline.training.checkpoints.holdings import Holding

WRITE_BYTES = 16 << 20  # at once
BLOCK_BYTES = 4096  # what lies at multiples of it, in memory and in the file, a disk takes without the kernel's copy
DIRECT = getattr(os, "O_DIRECT", 0)
SUM_ELEMENTS = 1 << 16  # in fp64: half a megabyte, which stays in a processor's cache


@dataclass
class Copied:
    """A share of a holding in one state, and where its copy lies."""

    holding: Holding
    state: str
    source: Tensor
    copy: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def num_bytes(self) -> int:
        """Size of the copy."""
        return self.source.numel() * self.source.element_size()


class Snapshot:
    """Copies on the host of all that this rank writes; its memory is used again for the next one."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self.files: dict[str, list[Copied]] = {}
        self._bounds: dict[str, tuple[int, int]] = {}
        self._ready = {kind: threading.Event() for kind in (WEIGHTS, OPTIMIZER)}

    def begin(self) -> None:
        """Get ready for `take`: from now on `wait` waits for it."""
        for ready in self._ready.values():
            ready.clear()

    def take(self, holdings: Iterable[Holding]) -> None:
        """Copy the shares of all holdings; those of one file after those of the other, so that it can be written."""
        try:
            self._lay_out(holdings)
            for kind, copied in self.files.items():
                _copy_all(copied)
                self._ready[kind].set()
        except BaseException:
            self.files = {}
            raise
        finally:
            for ready in self._ready.values():
                ready.set()

    def wait(self, kind: str) -> list[Copied] | None:
        """Return what is in a file, once it is copied; nothing if that failed."""
        self._ready[kind].wait()
        return self.files.get(kind)

    def _lay_out(self, holdings: Iterable[Holding]) -> None:
        """Give everything its place in memory."""
        self.files = {WEIGHTS: [], OPTIMIZER: []}
        for holding in holdings:
            for state, numbers in holding.states.items():
                if len(share := numbers[holding.share]):
                    self.files[WEIGHTS if state == WEIGHTS else OPTIMIZER].append(Copied(holding, state, share))
        for copied in self.files.values():
            copied.sort(key=lambda one: -one.source.element_size())  # each begins where a processor wants it
        needed = sum(one.num_bytes for copied in self.files.values() for one in copied)
        self._provide(needed + BLOCK_BYTES * (2 + len(self.files)))
        end = -self._memory.data_ptr() % BLOCK_BYTES
        for kind, copied in self.files.items():
            begin = end
            for one in copied:
                one.copy = self._memory[end : end + one.num_bytes]
                end += one.num_bytes
            self._bounds[kind] = (begin, end)
            end += -(end - begin) % BLOCK_BYTES

    def memory(self, kind: str) -> tuple[memoryview, int]:
        """Return all numbers of a file, as they will be in it, to the end of a block; and how many bytes they are."""
        begin, end = self._bounds[kind]
        return self._memory[begin : end + -(end - begin) % BLOCK_BYTES].numpy().data, end - begin

    def _provide(self, num_bytes: int) -> None:
        if len(self._memory) < num_bytes:
            self._memory = torch.empty(0, dtype=torch.uint8)  # frees the old one first
            self._memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())


def write_part(directory: Path, snapshot: Snapshot, rank: int, world: int) -> Part:
    """Write a rank's files, each once its numbers are copied, and make them durable; return what they hold.

    Raises:
        TrainingError: If a number is not finite.
    """
    files, tensors = {}, dict[str, Record]()
    for kind in (WEIGHTS, OPTIMIZER):
        if (copied := snapshot.wait(kind)) is None:
            break  # who copies says why
        name = file_name(kind, rank, world)
        files[name], squares = _write_file(directory / name, copied, *snapshot.memory(kind))
        for one, square in zip(copied, squares, strict=True):
            if not math.isfinite(square):
                raise TrainingError(
                    f"{directory}: {_describe(one)} has numbers that are not finite, so no checkpoint was made; "
                    "those before it stay; a lower optimizer.lr or a clip_norm often helps"
                )
            _record(tensors, one, square, rank)
    return Part(files=files, tensors=tensors)


def sum_of_squares(numbers: Tensor) -> float:
    """Return the sum of squares in fp64 of numbers in one row; not finite if one of them is not."""
    if numbers.device.type != "cpu" or numbers.dtype == torch.bfloat16:
        return float(numbers.double().square().sum())
    block, total, array = np.empty(SUM_ELEMENTS), 0.0, numbers.numpy()
    for start in range(0, len(array), SUM_ELEMENTS):
        some = array[start : start + SUM_ELEMENTS]
        here = block[: len(some)]
        np.copyto(here, some)
        total += float(np.einsum("i,i->", here, here))  # one thread: training has the others
    return total


def write_all(descriptor: int, numbers: memoryview) -> None:
    """Write all bytes to an open file."""
    while numbers:
        numbers = numbers[os.write(descriptor, numbers[:WRITE_BYTES]) :]


def _copy_all(copied: Sequence[Copied]) -> None:
    """Copy from the host's memory without the threads that compute, from an accelerator beside what it computes."""
    streams = {}
    for one in copied:
        source = one.source.view(torch.uint8)
        if source.device.type == "cpu":
            np.copyto(one.copy.numpy(), source.numpy())
            continue
        device = source.device
        if device not in streams:
            streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            streams[device].wait_stream(torch.cuda.default_stream(device))
        with torch.cuda.stream(streams[device]):
            one.copy.copy_(source, non_blocking=True)
    for stream in streams.values():
        stream.synchronize()


def _write_file(
    path: Path, copied: Sequence[Copied], blocks: memoryview, num_bytes: int
) -> tuple[FileRecord, list[float]]:
    """Write a file and make it durable; its checksum and sums are taken beside.

    It goes past the kernel's cache where the disk allows: that costs neither memory nor time of the processors, and is
    faster (`bench/checkpoint.py`).
    """
    header = safetensors_header({key(one.holding.name, one.state): _entry(one) for one in copied}, BLOCK_BYTES)
    with ThreadPoolExecutor(1) as pool:
        digest = pool.submit(_digest, header, blocks[:num_bytes])
        squares = pool.submit(lambda: [sum_of_squares(one.copy.view(one.source.dtype)) for one in copied])
        descriptor = _open_past_cache(path)
        try:
            _write_past_cache(descriptor, _aligned(header))
            _write_past_cache(descriptor, blocks)
            os.ftruncate(descriptor, len(header) + num_bytes)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return FileRecord(bytes=len(header) + num_bytes, xxh128=digest.result()), squares.result()


def _open_past_cache(path: Path) -> int:
    """Open a file to write blocks to, past the kernel's cache if the file system can."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.open(path, flags, 0o666)


def _write_past_cache(descriptor: int, blocks: memoryview) -> None:
    """Write whole blocks; through the cache if this disk wants larger ones."""
    while blocks:
        try:
            blocks = blocks[os.write(descriptor, blocks[:WRITE_BYTES]) :]
        except OSError as error:
            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & DIRECT:
                raise
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~DIRECT)


def _aligned(data: bytes) -> memoryview:
    """Return a copy that begins at a multiple of a block in memory."""
    memory = np.empty(len(data) + BLOCK_BYTES, dtype=np.uint8)
    copy = memory[-memory.ctypes.data % BLOCK_BYTES :][: len(data)]
    copy[:] = np.frombuffer(data, dtype=np.uint8)
    return copy.data


def _digest(header: bytes, numbers: memoryview) -> str:
    digest = xxhash.xxh3_128(header)
    digest.update(numbers)
    return digest.hexdigest()


def _entry(one: Copied) -> tuple[str, tuple[int], int]:
    return DTYPES[str(one.source.dtype).removeprefix("torch.")], (len(one.source),), one.num_bytes


def _record(tensors: dict[str, Record], one: Copied, square: float, rank: int) -> None:
    """Put a state of a holding to what is known of it."""
    holding, share = one.holding, one.holding.share
    start, stop = holding.start + share.start, holding.start + share.stop
    piece = Piece(rank=rank, tensor_rank=holding.tensor_rank, start=start, stop=stop)
    known = tensors.get(holding.name)
    squares = {**(known.squares if known else {}), one.state: square}
    tensors[holding.name] = Record(shape=list(holding.shape), sliced=holding.sliced, pieces=[piece], squares=squares)


def _describe(one: Copied) -> str:
    return f"'{one.holding.name}'" if one.state == WEIGHTS else f"'{one.state}' of '{one.holding.name}'"
