"""Saving and loading of one rank's training state: ours, DeepSpeed's, torch's distributed checkpoint, and the disk.

    python bench/checkpoint.py [--layers 20] [--repeats 3] [--threads 2] [--directory DIR] [--quick]

All ways save the same state of the same engine (fp32 weights and AdamW's two moments, 1 GB with 20 layers), and take
turns; medians count. A save begins right after a step, and while it goes on the next steps are done. Stall is how long
the training loop could not go on: the call itself, and the wait before the next update. Total is until everything is
on the disk (DeepSpeed, which leaves that to the kernel, has its files synced, and the time counts). Before a load the
files are dropped from the kernel's memory. The disk's own rate is that of the same bytes, written in one go and synced,
past the kernel's cache and through it; the faster of the two is the limit.
"""

import argparse
import mmap
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from tables import print_lines
from torch import Tensor, nn

PROJECT = Path(__file__).parent.parent
sys.path.insert(0, str(PROJECT))

from pipeline.parallel.engine import EngineSettings, build_engine, process_group  # noqa: E402
from pipeline.parallel.mesh import Mesh, shape_batch  # noqa: E402
from pipeline.parallel.partitions import flat_partitions  # noqa: E402
from pipeline.stage import Checkpoints  # noqa: E402
from pipeline.training.checkpoints.saver import Saver  # noqa: E402
from pipeline.training.optim import AdamW  # noqa: E402

WIDTH, ROWS, BLOCK_BYTES = 2048, 256, 16 << 20
STALL_LIMIT, TOTAL_LIMIT = 0.05, 1.3  # of DeepSpeed's stall, of the disk's own time


class Layers(nn.Module):
    """Linear layers, each added to what it is given."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(count))

    def forward(self, x_BD: Tensor) -> Tensor:
        """Return a loss."""
        for layer in self.layers:
            x_BD = x_BD + torch.tanh(layer(x_BD))
        return x_BD.square().mean()


@dataclass
class Bench:
    """A training in progress."""

    engine: Any
    mesh: Mesh
    x_BD: Tensor

    def backward(self) -> None:
        """Do all of a step but the update."""
        self.engine.backward(self.engine(self.x_BD))

    def step(self, before_update: Callable[[], None] = lambda: None) -> float:
        """Do a step; return how long it took until the update."""
        began = time.perf_counter()
        self.backward()
        seconds = time.perf_counter() - began
        before_update()
        self.engine.step()
        return seconds

    def tensors(self) -> dict[str, Tensor]:
        """Return the state as the optimizer has it."""
        found = {}
        for number, flat in enumerate(flat_partitions(self.engine)):
            found[f"{number}.weights"] = flat.detach()
            state = self.engine.optimizer.optimizer.state[flat]
            found |= {f"{number}.{name}": state[name] for name in ("exp_avg", "exp_avg_sq")}
        return found


@dataclass(frozen=True)
class Times:
    """Seconds."""

    stall: float
    total: float
    load: float


def ours(bench: Bench, directory: Path) -> Times:
    """Save with this pipeline's saver."""
    saver = Saver(bench.engine, directory, bench.mesh, 1, Checkpoints(every_steps=1), 10**6)
    for step in (1, 2):  # the first save takes its memory from the system, as the others do in a long training
        bench.step()
        assert saver.stall_s >= 0  # from now on
        began, path = time.time(), directory / f"step-{step:08d}"
        saver.save(step, {})
        bench.step(saver.before_update)
        stall = saver.stall_s
        while not path.is_dir():
            assert not saver.failed
            bench.step()
        total = path.stat().st_ctime - began  # when it got its name
        saver.finish()
    drop(directory)
    began = time.perf_counter()
    assert saver.restore() is not None
    return Times(stall, total, time.perf_counter() - began)


def deepspeeds(bench: Bench, directory: Path) -> Times:
    """Save with DeepSpeed's own function."""
    bench.step()
    began = time.perf_counter()
    bench.engine.save_checkpoint(str(directory), tag="x")
    stall = time.perf_counter() - began
    sync(directory)
    total = time.perf_counter() - began
    drop(directory)
    began = time.perf_counter()
    bench.engine.load_checkpoint(str(directory), tag="x")
    return Times(stall, total, time.perf_counter() - began)


def torchs(bench: Bench, directory: Path) -> Times:
    """Save with torch.distributed.checkpoint's async_save; it copies before it returns."""
    group = torch.distributed.new_group(backend="gloo")
    bench.step()
    began = time.perf_counter()
    saving = dcp.async_save(bench.tensors(), checkpoint_id=str(directory), process_group=group)
    stall, ended = time.perf_counter() - began, list[float]()
    saving.add_done_callback(lambda saved: ended.append(time.perf_counter()))
    while not saving.done():
        bench.step()
    saving.result()
    total = ended[0] - began
    drop(directory)
    began = time.perf_counter()
    dcp.load(bench.tensors(), checkpoint_id=str(directory), process_group=group)
    return Times(stall, total, time.perf_counter() - began)


def disk(bench: Bench, directory: Path, past_cache: bool = True) -> Times:
    """Write as many bytes, and read them."""
    path, flags = directory / "x", os.O_WRONLY | os.O_CREAT | (os.O_DIRECT if past_cache else 0)
    directory.mkdir(parents=True)
    left = sum(tensor.numel() * tensor.element_size() for tensor in bench.tensors().values())
    block = mmap.mmap(-1, BLOCK_BYTES)  # which begins where a disk wants it
    block.write(os.urandom(BLOCK_BYTES))
    began = time.perf_counter()
    descriptor = os.open(path, flags)
    while left > 0:
        left -= os.write(descriptor, block)
    os.fsync(descriptor)
    os.close(descriptor)
    total = time.perf_counter() - began
    drop(directory)
    began = time.perf_counter()
    with open(path, "rb", buffering=0) as stream:
        block = bytearray(BLOCK_BYTES)
        while stream.readinto(block):
            pass
    return Times(total, total, time.perf_counter() - began)


def files(directory: Path) -> list[Path]:
    """Return all files in a directory."""
    return [path for path in directory.rglob("*") if path.is_file()]


def sync(directory: Path) -> None:
    """Wait until all files are on the disk."""
    for path in files(directory):
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())


def drop(directory: Path) -> None:
    """Drop the files from the kernel's memory (Linux)."""
    sync(directory)
    for path in files(directory):
        with open(path, "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


WAYS: dict[str, tuple[str, Callable[[Bench, Path], Times]]] = {
    "ours": ("ours", ours),
    "deepspeed": ("DeepSpeed, save_checkpoint", deepspeeds),
    "dcp": ("torch DCP, async_save", torchs),
    "disk": ("the disk alone", disk),
    "cached": ("the disk through the cache", partial(disk, past_cache=False)),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--directory", type=Path, help="on the disk to measure; by default the system's temporary one")
    parser.add_argument("--quick", action="store_true", help="two layers, once, in seconds")
    args = parser.parse_args()
    layers, repeats = (2, 1) if args.quick else (args.layers, args.repeats)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with process_group() as mesh:
        bench = start(layers, mesh)
        held = sum(tensor.numel() * tensor.element_size() for tensor in bench.tensors().values())
        steps = [bench.step() for _ in range(3)]
        print(f"torch {torch.__version__}, {args.threads} thread(s), median of {repeats}; {held / 1e9:.2f} GB of state")
        print(f"forward and backward of a step take {statistics.median(steps):.2f} s")
        found: dict[str, list[Times]] = {way: [] for way in WAYS}
        for _ in range(repeats):
            for way, (_, save) in WAYS.items():
                with tempfile.TemporaryDirectory(dir=args.directory) as parent:
                    found[way].append(save(bench, Path(parent) / "x"))
        print_table({way: middle(times) for way, times in found.items()})


def start(layers: int, mesh: Mesh) -> Bench:
    """Return a training after its first step."""
    model = Layers(layers)
    optimizer = AdamW(lr=1e-4).build(model)
    settings = EngineSettings(shape_batch(ROWS, None, 1), 1, "fp32", 1.0, {})
    bench = Bench(build_engine(model, optimizer, settings, mesh), mesh, torch.randn(ROWS, WIDTH))
    bench.step()
    return bench


def middle(times: list[Times]) -> Times:
    """Return the medians."""
    return Times(*(statistics.median(getattr(one, name) for one in times) for name in ("stall", "total", "load")))


def print_table(found: dict[str, Times]) -> None:
    """Print the times, the two ratios and their limits."""
    lines = [["", "stall s", "total s", "load s", "stall / DeepSpeed's", "total / disk's"]]
    for way, times in found.items():
        cells = [f"{times.stall:.3f}", f"{times.total:.2f}", f"{times.load:.2f}"]
        limit = min(found["disk"].total, found["cached"].total)
        ratios = [times.stall / found["deepspeed"].stall, times.total / limit]
        lines.append([WAYS[way][0], *cells, *(f"{ratio:.2f}" for ratio in ratios)])
    print_lines(lines)
    print(f"limits: stall {STALL_LIMIT} of DeepSpeed's, total {TOTAL_LIMIT} of the disk's")


if __name__ == "__main__":
    main()
