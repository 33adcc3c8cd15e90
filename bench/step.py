"""Speed and memory of a bare training step: our models against transformers' Llama and nanoGPT's recipe.

    python bench/step.py [--repeats 3] [--threads 1] [--quick]

No DeepSpeed and no loader: forward, backward, clipping and AdamW on the same random rows, in processes of their own
that take turns. nanoGPT's recipe is written from its description: GPT-2's block with one product for queries, keys and
values, GELU, learned positions, LayerNorm, no biases, tied embeddings, cross entropy over all logits at once, fused
AdamW with two groups. Tokens a second are those of the median step of all repeats; memory is how much the peak of a
process grows from before the model is made (Linux), the smallest of the repeats. About 3 minutes on an idle processor.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tables import print_lines
from torch import Tensor, nn

PROJECT = Path(__file__).parent.parent
sys.path.insert(0, str(PROJECT))

from pipeline.models.config import Decoder  # noqa: E402
from pipeline.models.initial import init_weights  # noqa: E402
from pipeline.models.transformer import Transformer  # noqa: E402
from pipeline.training.optim import AdamW  # noqa: E402

CLIP, RATE = 1.0, 1e-3


@dataclass(frozen=True)
class Shape:
    """What is trained."""

    d_model: int
    d_ff: int
    layers: int
    heads: int
    kv_heads: int
    vocab_size: int
    rows: int
    positions: int
    steps: int

    @property
    def words(self) -> str:
        """Say it."""
        return (
            f"d_model {self.d_model}, {self.layers} layers, {self.heads} heads, {self.vocab_size:,} ids, "
            f"{self.rows} rows of {self.positions} tokens"
        )


FULL = Shape(384, 1024, 6, 6, 2, 16384, 4, 256, 4)
QUICK = Shape(64, 176, 2, 2, 1, 512, 2, 64, 3)
Loss = Callable[[Tensor, Tensor], Tensor]  # ids and the labels of each → the mean cross entropy
Way = Callable[[Shape], tuple[nn.Module, Loss, torch.optim.Optimizer]]


def our_llama(shape: Shape) -> tuple[nn.Module, Loss, torch.optim.Optimizer]:
    """Return our decoder of Llama's architecture."""
    return _ours(shape, norm="rmsnorm", positions="rotary", mlp="swiglu", d_ff=shape.d_ff, num_kv_heads=shape.kv_heads)


def our_gpt2(shape: Shape) -> tuple[nn.Module, Loss, torch.optim.Optimizer]:
    """Return our decoder of GPT-2's architecture."""
    return _ours(shape, norm="layernorm", positions="learned", mlp="gelu_exact", d_ff=4 * shape.d_model)


def _ours(shape: Shape, **architecture: Any) -> tuple[nn.Module, Loss, torch.optim.Optimizer]:
    config = Decoder(
        vocab_size=shape.vocab_size,
        d_model=shape.d_model,
        num_layers=shape.layers,
        num_heads=shape.heads,
        max_seq_len=shape.positions,
        **architecture,
    )
    model = Transformer(config)
    init_weights(model, 0)
    return model, lambda ids, labels: model(ids, labels)["tokens"] / labels.numel(), AdamW(lr=RATE).build(model)


def their_llama(shape: Shape) -> tuple[nn.Module, Loss, torch.optim.Optimizer]:
    """Return transformers' Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    return model, lambda ids, labels: model(input_ids=ids, shift_labels=labels, labels=labels).loss, decayed(model)


class GPT2Block(nn.Module):
    """A layer of GPT-2, as nanoGPT describes it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, width = shape.heads, shape.d_model
        self.before_attention, self.before_mlp = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return (B, T, D)."""
        three = self.qkv(self.before_attention(x_BTD)).split(x_BTD.shape[-1], dim=-1)
        q_BHTK, k_BHTK, v_BHTK = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in three)
        mixed_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
        x_BTD = x_BTD + self.out(mixed_BHTK.transpose(1, 2).flatten(-2))
        made_BTD: Tensor = self.down(F.gelu(self.up(self.before_mlp(x_BTD))))
        return x_BTD + made_BTD


class GPT2(nn.Module):
    """GPT-2, as nanoGPT describes it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocab_size, shape.d_model)
        self.positions = nn.Embedding(shape.positions, shape.d_model)
        self.blocks = nn.Sequential(*(GPT2Block(shape) for _ in range(shape.layers)))
        self.norm = nn.LayerNorm(shape.d_model, bias=False)
        for weight in self.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02)

    def forward(self, ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """Return the mean cross entropy."""
        x_BTD = self.tokens(ids_BT) + self.positions(torch.arange(ids_BT.shape[1]))
        logits_BTV = F.linear(self.norm(self.blocks(x_BTD)), self.tokens.weight)
        return F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten())


def nanogpt(shape: Shape) -> tuple[nn.Module, Loss, torch.optim.Optimizer]:
    """Return nanoGPT's model and optimizer."""
    model = GPT2(shape)
    return model, model, decayed(model)


def decayed(model: nn.Module) -> torch.optim.Optimizer:
    """Return fused AdamW that decays matrices alone."""
    weights = [*model.parameters()]
    groups = [
        {"params": [weight for weight in weights if weight.ndim >= 2], "weight_decay": 0.1},
        {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), fused=True)


WAYS: dict[str, tuple[str, Way]] = {
    "our_llama": ("ours, Llama's shape", our_llama),
    "their_llama": ("transformers' Llama", their_llama),
    "our_gpt2": ("ours, GPT-2's shape", our_gpt2),
    "nanogpt": ("nanoGPT's recipe", nanogpt),
}
PAIRS = [("our_llama", "their_llama"), ("our_gpt2", "nanogpt")]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a small shape, in seconds")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what a process of its own is told
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape = QUICK if args.quick else FULL
    if args.one:
        print(json.dumps(measure(WAYS[args.one][1], shape)))
        return
    print(f"torch {torch.__version__}, {args.threads} thread(s), {args.repeats} repeats of {shape.steps} steps")
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(args.repeats):
        for way in WAYS:
            found[way].append(in_own_process(way, args))
    print_table(shape, found)


def in_own_process(way: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one way once."""
    command = [sys.executable, __file__, "--threads", str(args.threads), "--one", way, *["--quick"] * args.quick]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(way: Way, shape: Shape) -> dict[str, Any]:
    """Return the seconds of each step, wall and processor, the growth of the peak in bytes, and parameters."""
    way(QUICK)  # libraries are loaded and have their buffers
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    model, loss, optimizer = way(shape)
    model.train()
    generator = torch.Generator().manual_seed(0)
    walls, cpus, mean = [], [], torch.zeros(())
    for _ in range(1 + shape.steps):
        ids_BT = torch.randint(shape.vocab_size, (shape.rows, shape.positions + 1), generator=generator)
        wall, cpu = time.perf_counter(), time.process_time()
        mean = loss(ids_BT[:, :-1].contiguous(), ids_BT[:, 1:].contiguous())
        mean.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    params = sum(weight.numel() for weight in model.parameters())
    peak = memory("VmHWM") - before
    return {"wall_s": walls[1:], "cpu_s": cpus[1:], "bytes": peak, "params": params, "loss": mean.item()}


def memory(name: str) -> float:
    """Return a line of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def print_table(shape: Shape, found: dict[str, list[dict[str, Any]]]) -> None:
    """Print tokens a second and memory of all, and what ours has of its peer's."""
    tokens = shape.rows * shape.positions
    speed = {
        clock: {way: tokens / statistics.median(s for run in runs for s in run[clock]) for way, runs in found.items()}
        for clock in ("wall_s", "cpu_s")
    }
    peak = {way: min(run["bytes"] for run in runs) for way, runs in found.items()}
    print(f"{shape.words}\n")
    lines = [("", "parameters", "tokens/s", "tokens a CPU-s", "peak MB", "last loss")]
    for way, runs in found.items():
        cells = (f"{speed['wall_s'][way]:,.0f}", f"{speed['cpu_s'][way]:,.0f}", f"{peak[way] / 1e6:,.0f}")
        lines.append((WAYS[way][0], f"{runs[0]['params']:,}", *cells, f"{runs[0]['loss']:.3f}"))
    print_lines(lines)
    print()
    for ours, theirs in PAIRS:
        wall, cpu = (speed[clock][ours] / speed[clock][theirs] for clock in ("wall_s", "cpu_s"))
        print(
            f"{WAYS[ours][0]} has {wall:.2f} times the tokens/s of {WAYS[theirs][0]} ({cpu:.2f} a CPU-s), and "
            f"{peak[ours] / peak[theirs]:.2f} times its memory",
            flush=True,
        )


if __name__ == "__main__":
    main()
