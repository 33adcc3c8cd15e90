"""What a node is found to be, for `pipeline.preflight`: `probe.py look DIR` and `probe.py reach DIR NODE …`.

srun runs the first once on every node and the second once for every rank. Each prints a line of JSON, and asks for
nothing but Python's own library until it has said what is missing.
"""

import importlib
import json
import os
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from pipeline.code import PACKAGE, code_digest
from pipeline.env import adopt_slurm_rank

SAYS = "preflight: "  # how the line begins
MARKS = "work/preflight"  # in the directory of a task: a file of every node
NEEDED = ("torch", "deepspeed")
BLOCK = 1 << 20
FILE_BLOCKS = 64  # of the file that is written and read
SIZES = (1 << 20, 1 << 24, 1 << 26)  # bytes that are summed over all ranks
REPEATS = 4
MEET_S = 120  # until ranks that do not find one another give up
SEEN_S = 15.0  # until a file shows on another node: a network's disk may remember for some seconds what it had

Facts = dict[str, Any]


def look(directory: Path) -> Facts:
    """Return what this node has: versions, code, GPUs, and how fast the directory is written and read."""
    warnings.simplefilter("ignore")
    facts: Facts = {
        "python": platform.python_version(),
        "executable": sys.executable,
        "code": code_digest(PACKAGE),
        "missing": {},
    }
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if Path("/dev/nvidiactl").exists() else "cpu")
    for name in (*NEEDED, "pipeline.worker"):
        try:
            facts[name] = getattr(importlib.import_module(name), "__version__", None)
        except Exception as error:  # a broken installation raises whatever it likes
            facts["missing"][name.partition(".")[0]] = _in_one_line(error)
            break  # what comes after needs it
    if "torch" in facts:
        cuda = sys.modules["torch"].cuda
        facts["gpus"] = cuda.device_count()
        memories = [cuda.get_device_properties(index).total_memory for index in range(facts["gpus"])]
        facts["gpu_bytes"] = min(memories, default=None)
    return facts | _disk(directory)


def _disk(directory: Path) -> Facts:
    """Leave this node's mark in a directory, and measure in it, in MB/s."""
    marks = directory / MARKS
    file, block = marks / f"{_node()}.bin", os.urandom(BLOCK)
    try:
        marks.mkdir(parents=True, exist_ok=True)
        (marks / _node()).touch()
        began = time.perf_counter()
        with open(file, "wb") as stream:
            for _ in range(FILE_BLOCKS):
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # not what is still in memory
        written = time.perf_counter()
        with open(file, "rb", buffering=0) as stream:
            while stream.read(BLOCK):
                pass
        read = time.perf_counter()
        free = shutil.disk_usage(directory).free
    except OSError as error:
        return {"disk_error": f"{error.strerror}: {error.filename or directory}"}
    finally:
        with suppress(OSError):  # it says above what is wrong
            file.unlink()
    megabytes = FILE_BLOCKS * BLOCK / 1e6
    return {"write": megabytes / (written - began), "read": megabytes / (read - written), "free_bytes": free}


def reach(directory: Path, nodes: list[str]) -> Facts:
    """Return how fast all ranks sum, in GB/s by bytes, whose marks this node sees, and its clock at one moment."""
    warnings.simplefilter("ignore")
    adopt_slurm_rank()
    import torch
    import torch.distributed as dist

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    backend = "nccl" if device == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=MEET_S))
        dist.barrier()
        clock = time.time()
        rates = {str(size): _sum_rate(size, device) for size in SIZES}
        dist.destroy_process_group()
    except Exception as error:  # of whatever lies below torch
        return {"rank": int(os.environ["RANK"]), "error": _in_one_line(error)}
    unseen = [] if int(os.environ["LOCAL_RANK"]) else _unseen(directory, nodes)
    return {"rank": int(os.environ["RANK"]), "backend": backend, "clock": clock, "rates": rates, "unseen": unseen}


def _sum_rate(size: int, device: str) -> float:
    """Return the bandwidth of an all-reduce, as its links see it: 2 (n - 1) / n times the bytes a second."""
    import torch
    import torch.distributed as dist

    numbers = torch.ones(size // 4, device=device)
    dist.all_reduce(numbers)
    began = time.perf_counter()
    for _ in range(REPEATS):
        dist.all_reduce(numbers)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / REPEATS
    world = dist.get_world_size()
    return 2 * (world - 1) / world * size / seconds / 1e9


def _unseen(directory: Path, nodes: list[str]) -> list[str]:
    deadline = time.monotonic() + SEEN_S
    while unseen := [node for node in nodes if not (directory / MARKS / node).exists()]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    return unseen


def _node() -> str:
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def _in_one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


if __name__ == "__main__":
    what, place, *others = sys.argv[1:]
    found: Callable[[], Facts] = {"look": lambda: look(Path(place)), "reach": lambda: reach(Path(place), others)}[what]
    print(f"\n{SAYS}{json.dumps({'node': _node(), **found()})}", flush=True)
