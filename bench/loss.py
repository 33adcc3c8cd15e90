"""Memory and time of the cross entropy over a vocabulary: ours in chunks, torch's on all logits, and the minimum.

    python bench/loss.py [--repeats 3] [--threads 1] [--quick]

Forward and backward, down to the gradients of hidden states and output weight, in processes of their own that take
turns; the best of the repeats counts. Memory is how much the process's peak grows over what it holds before (Linux).
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tables import print_lines
from torch import Tensor

PROJECT = Path(__file__).parent.parent
sys.path.insert(0, str(PROJECT))

from pipeline.models.loss import CPU_CHUNK_TOKENS, IGNORED_LABEL, Output, summed_cross_entropy  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Loss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # hidden, weight, labels → their two gradients


@dataclass(frozen=True)
class Shape:
    """What a loss is computed over."""

    tokens: int
    d_model: int
    vocab_size: int
    dtype: str

    @property
    def words(self) -> str:
        """Say it."""
        return f"{self.tokens:,} tokens, d_model {self.d_model:,}, {self.vocab_size:,} ids, {self.dtype}"

    @property
    def minimum_bytes(self) -> int:
        """Bytes of the two gradients, which have to exist at the end whatever the way."""
        return (self.tokens + self.vocab_size) * self.d_model * DTYPES[self.dtype].itemsize

    @property
    def logits_bytes(self) -> int:
        """Bytes of all logits in fp32."""
        return self.tokens * self.vocab_size * 4


SHAPES = [
    Shape(4096, 256, 4096, "fp32"),
    Shape(4096, 256, 32768, "fp32"),
    Shape(4096, 768, 50304, "fp32"),
    Shape(4096, 768, 50304, "bf16"),
]
QUICK = [Shape(2048, 128, 8192, "fp32")]


def ours(x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Run what the model trains with."""
    summed_cross_entropy(x_ND, Output(weight_VD, None, len(weight_VD)), labels_N).backward()  # type: ignore[no-untyped-call]
    return gradients(x_ND, weight_VD)


def full(x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Run torch's on all logits in fp32, as most training code does."""
    logits_NV = F.linear(x_ND, weight_VD).float()
    F.cross_entropy(logits_NV, labels_N, reduction="sum", ignore_index=IGNORED_LABEL).backward()  # type: ignore[no-untyped-call]
    return gradients(x_ND, weight_VD)


def products(x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Run only the three matrix products that no way can do without, in chunks, so that no logits are kept."""
    with torch.no_grad():
        dx_ND, dweight_VD = torch.empty_like(x_ND), torch.zeros_like(weight_VD)
        for start in range(0, len(x_ND), CPU_CHUNK_TOKENS):
            chunk = slice(start, start + CPU_CHUNK_TOKENS)
            logits_MV = x_ND[chunk] @ weight_VD.T
            torch.mm(logits_MV, weight_VD, out=dx_ND[chunk])
            dweight_VD.addmm_(logits_MV.T, x_ND[chunk])
            del logits_MV  # or the next chunk's would be made beside them
    return dx_ND, dweight_VD


WAYS: dict[str, tuple[str, Loss]] = {
    "ours": ("this loss", ours),
    "full": ("F.cross_entropy, fp32 logits", full),
    "products": ("the three products alone", products),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="one small shape, in seconds")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)  # what a process of its own is told
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        way, *numbers, dtype = args.one
        print(json.dumps(measure(WAYS[way][1], Shape(*map(int, numbers), dtype))))
        return
    print(f"torch {torch.__version__}, {args.threads} thread(s), best of {args.repeats}")
    for shape in QUICK if args.quick else SHAPES:
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(args.repeats):
            for way in WAYS:
                found[way].append(in_own_process(way, shape, args.threads))
        print_table(shape, {way: {key: min(r[key] for r in runs) for key in runs[0]} for way, runs in found.items()})


def in_own_process(way: str, shape: Shape, threads: int) -> dict[str, float]:
    """Measure one way once."""
    words = [way, shape.tokens, shape.d_model, shape.vocab_size, shape.dtype]
    command = [sys.executable, __file__, "--threads", str(threads), "--one", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    result: dict[str, float] = json.loads(done.stdout)
    return result


def measure(loss: Loss, shape: Shape) -> dict[str, float]:
    """Return the growth of the peak in bytes and the seconds, wall and processor, of a second call."""
    loss(*inputs(Shape(64, shape.d_model, 512, shape.dtype)))  # libraries are loaded and have their buffers
    x_ND, weight_VD, labels_N = inputs(shape)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    loss(x_ND, weight_VD, labels_N)
    peak = memory("VmHWM") - before
    x_ND.grad = weight_VD.grad = None
    wall, cpu = time.perf_counter(), time.process_time()
    loss(x_ND, weight_VD, labels_N)
    return {"bytes": peak, "wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states and an output weight that are leaves, and labels, some of which do not count."""
    generator, dtype = torch.Generator().manual_seed(0), DTYPES[shape.dtype]
    x_ND = torch.randn(shape.tokens, shape.d_model, generator=generator).to(dtype).requires_grad_()
    weight_VD = (0.02 * torch.randn(shape.vocab_size, shape.d_model, generator=generator)).to(dtype).requires_grad_()
    labels_N = torch.randint(shape.vocab_size, (shape.tokens,), generator=generator)
    labels_N[::50] = IGNORED_LABEL
    return x_ND, weight_VD, labels_N


def gradients(x_ND: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of both."""
    assert x_ND.grad is not None
    assert weight_VD.grad is not None
    return x_ND.grad, weight_VD.grad


def memory(name: str) -> float:
    """Return a line of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def print_table(shape: Shape, best: dict[str, dict[str, float]]) -> None:
    """Print memory and time of each way, and both against the minimum."""
    print(f"\n{shape.words}; all logits in fp32 {shape.logits_bytes / 1e6:,.0f} MB\n")
    lines = [("", "peak MB", "of the minimum", "CPU s", "wall s", "of the products")]
    limit = best["products"]["cpu_s"]
    for way, numbers in best.items():
        lines.append(
            (
                WAYS[way][0],
                f"{numbers['bytes'] / 1e6:,.1f}",
                f"{numbers['bytes'] / shape.minimum_bytes:.2f}x",
                f"{numbers['cpu_s']:.3f}",
                f"{numbers['wall_s']:.3f}",
                f"{numbers['cpu_s'] / limit:.2f}x",
            )
        )
    minimum = f"{shape.minimum_bytes / 1e6:,.1f}"
    print_lines([*lines, ("the two gradients (minimum)", minimum, "1.00x", "", "", "")])
    less = best["full"]["bytes"] / best["ours"]["bytes"]
    faster = best["full"]["cpu_s"] / best["ours"]["cpu_s"]
    print(f"\n{less:.1f} times less memory than F.cross_entropy, {faster:.2f} times its speed", flush=True)


if __name__ == "__main__":
    main()
