"""μP's coordinate check: what the first steps of training change in the activations of ever wider models.

    python bench/mup.py [--svg mup.svg] [--optimizer adamw] [--transfer] [--quick]

Under the maximal update parametrization (`mup_base_width`; Yang et al. 2022, arXiv:2203.03466, appendix D.1) what a
step changes in the output of each layer must be of one size when only the width grows. Without it, though the first
weights are made smaller for wider models (1 / sqrt(d_model)), it grows with it: a step of one learning rate moves the
output of a wider layer by more. All models learn the bytes of the quickstart's text with one rate, and are watched on
the same rows. Then, with --transfer, the loss after some steps for several rates: the best rate should be the same at
all widths. The whole takes about 3 minutes of one processor, with --transfer 10; --quick seconds.
"""

import argparse
import gzip
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tables import print_lines
from torch import Tensor, nn

PROJECT = Path(__file__).parent.parent
sys.path.insert(0, str(PROJECT))

from pipeline.models.config import Decoder  # noqa: E402
from pipeline.models.initial import init_weights, lr_scales  # noqa: E402
from pipeline.models.transformer import Transformer  # noqa: E402
from pipeline.training.optim import AdamW, Muon, Optimizer  # noqa: E402

TEXT = PROJECT / "conf" / "job" / "quickstart" / "text.jsonl.gz"
HEAD, LAYERS, SEQ_LEN, ROWS, BYTES = 16, 2, 64, 16, 256
BASE = 64  # the width at which both parametrizations are the same
RATES = {"adamw": 2**-6, "muon": 2**-5}  # high enough that ten steps show what grows
SHOWN = {
    "residual": "residual stream",
    "attention": "attention's output",
    "mlp": "feed-forward's output",
    "logits": "logits",
}
PLOT, GAP, TOP = 190, 46, 40  # of the drawing: the side of a plot, and what lies between and above
FLAT = 1.5  # what changes may differ by, over all widths, and still be called flat
Sizes = dict[str, list[float]]  # name of an activation → its mean size before, then its mean change after each step


@dataclass(frozen=True)
class Plan:
    """What is run."""

    widths: list[int]
    seeds: int
    steps: int
    rates: list[float]
    transfer_widths: list[int]
    transfer_steps: int


FULL = Plan([64, 128, 256, 512, 1024], 3, 10, [2.0**-n for n in range(10, 3, -1)], [64, 128, 256], 100)
QUICK = Plan([64, 128, 256], 1, 5, [2.0**-8, 2.0**-6], [64, 128], 10)


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--svg", type=Path, help="where to draw the curves")
    parser.add_argument("--optimizer", choices=sorted(RATES), default="adamw")
    parser.add_argument("--transfer", action="store_true", help="also look for the best learning rate at each width")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="fewer widths, seeds and steps")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    plan, data = QUICK if args.quick else FULL, read_text()
    found: dict[str, dict[int, Sizes]] = {}
    for title, base in (("with μP", BASE), ("without", None)):
        found[title] = {width: mean_sizes(plan, width, base, args.optimizer, data) for width in plan.widths}
        print_sizes(title, args.optimizer, plan, found[title])
    if args.svg:
        args.svg.write_text(drawing(found))
    if args.transfer:
        for title, base in (("with μP", BASE), ("without", None)):
            print_transfer(title, args.optimizer, plan, base, data)


def read_text() -> Tensor:
    """Return the bytes of the quickstart's text, one id each."""
    with gzip.open(TEXT, "rt") as lines:
        text = "\n".join(json.loads(line)["text"] for line in lines)
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def make_model(width: int, base: int | None, seed: int) -> tuple[Transformer, Decoder]:
    """Return a decoder whose heads have one size, so that only their number and the width grow."""
    config = Decoder(
        vocab_size=BYTES,
        d_model=width,
        num_layers=LAYERS,
        num_heads=width // HEAD,
        d_ff=3 * width,
        max_seq_len=SEQ_LEN,
        tie_embeddings=True,
        init_std=(base or width) ** -0.5,
        mup_base_width=base,
    )
    model = Transformer(config)
    init_weights(model, seed)
    return model, config


def optimizer_of(kind: str, rate: float) -> Optimizer:
    """Return the settings of an optimizer without weight decay."""
    if kind == "muon":
        return Muon(lr=rate, weight_decay=0.0)
    return AdamW(lr=rate, weight_decay=0.0)


def train(
    model: Transformer, config: Decoder, kind: str, rate: float, steps: int, data: Tensor, warmup: int
) -> Iterator[float]:
    """Yield the loss of every step after it is made."""
    optimizer = optimizer_of(kind, rate).build(model, lr_scales(model, config))
    generator = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        rows = draw(data, generator)
        loss = model(rows[:, :-1], rows[:, 1:])["tokens"] / (ROWS * SEQ_LEN)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"] * min(step / max(warmup, 1), 1.0)
        optimizer.step()
        yield loss.item()


def draw(data: Tensor, generator: torch.Generator) -> Tensor:
    """Return rows of the text, with one id more than a model reads."""
    starts = torch.randint(len(data) - SEQ_LEN - 1, (ROWS,), generator=generator)
    return data[starts.unsqueeze(1) + torch.arange(SEQ_LEN + 1)]


def mean_sizes(plan: Plan, width: int, base: int | None, kind: str, data: Tensor) -> Sizes:
    """Return how large activations are before the first step and how far from that after each; a mean over seeds."""
    runs = []
    for seed in range(plan.seeds):
        model, config = make_model(width, base, seed)
        watched = draw(data, torch.Generator().manual_seed(1))[:, :-1]
        before = activations(model, watched)
        sizes = {name: [size(x)] for name, x in before.items()}
        for _ in train(model, config, kind, RATES[kind], plan.steps, data, warmup=0):
            for name, x in activations(model, watched).items():
                sizes[name].append(size(x - before[name]))
        runs.append(sizes)
    return {name: [sum(at) / len(runs) for at in zip(*(run[name] for run in runs), strict=True)] for name in SHOWN}


@torch.no_grad()
def activations(model: Transformer, ids: Tensor) -> dict[str, Tensor]:
    """Return what the parts of the last layer give, and the logits."""
    found: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, arguments: Any, output: Any) -> None:
        found[name] = output[0] if isinstance(output, tuple) else output

    assert model.decoder is not None
    last = model.decoder.blocks[-1]
    hooks = []
    for name, module in {"residual": last, "attention": last.attention, "mlp": last.mlp}.items():
        assert isinstance(module, nn.Module)
        hooks.append(module.register_forward_hook(partial(note, name)))
    found["logits"] = model(ids)
    for hook in hooks:
        hook.remove()
    return found


def size(x: Tensor) -> float:
    """Return the mean absolute value."""
    return x.abs().mean().item()


def print_sizes(title: str, kind: str, plan: Plan, found: dict[int, Sizes]) -> None:
    """Print each activation's size before the first step and its change after the first and the last, by width."""
    print(f"\n{title}, {kind} at rate {RATES[kind]:.4g}: mean |activation|, then its mean |change|, by d_model\n")
    lines = [("", "after step", *(f"{width:,}" for width in plan.widths), "widest / narrowest", "change")]
    for name, words in SHOWN.items():
        for step in (0, 1, plan.steps):
            at = [found[width][name][step] for width in plan.widths]
            verdict = "flat" if max(at) / min(at) <= FLAT else "larger" if at[-1] > at[0] else "smaller"
            first = "" if step else words
            ratio = f"{at[-1] / at[0]:.2f}x"
            lines.append((first, str(step), *(f"{value:.3g}" for value in at), ratio, verdict if step else ""))
    print_lines(lines)


def print_transfer(title: str, kind: str, plan: Plan, base: int | None, data: Tensor) -> None:
    """Print the loss at the end for each learning rate, by width, and the best rate of each."""
    steps = plan.transfer_steps
    print(f"\n{title}, {kind}: loss after {steps} steps (mean of the last tenth) by learning rate\n")
    lines = [("d_model", *(f"2^{math.log2(rate):.0f}" for rate in plan.rates), "best")]
    for width in plan.transfer_widths:
        ends = []
        for rate in plan.rates:
            model, config = make_model(width, base, seed=0)
            losses = list(train(model, config, kind, rate, steps, data, warmup=steps // 10))
            last = losses[-max(steps // 10, 1) :]
            ends.append(sum(last) / len(last))
        best = plan.rates[min(range(len(ends)), key=ends.__getitem__)]
        lines.append((f"{width:,}", *(f"{end:.3f}" for end in ends), f"2^{math.log2(best):.0f}"))
    print_lines(lines)


def drawing(found: dict[str, dict[int, Sizes]]) -> str:
    """Return an SVG: a row for each parametrization, a plot for each activation, a line for each step, on log axes."""
    parts = []
    for column, (name, words) in enumerate(SHOWN.items()):
        values = [value for sizes in found.values() for by in sizes.values() for value in by[name][1:]]
        decades = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        for row, (title, sizes) in enumerate(found.items()):
            corner = GAP + column * (PLOT + GAP), TOP + row * (PLOT + GAP + 14)
            lines = {width: by[name][1:] for width, by in sizes.items()}
            parts += [*plot(lines, decades, *corner), text(corner[0], corner[1] - 8, f"{words}, {title}")]
    width, height = GAP + len(SHOWN) * (PLOT + GAP), TOP + len(found) * (PLOT + GAP + 14)
    style = (
        "text{font:11px sans-serif;fill:#333}.right{text-anchor:end}.middle{text-anchor:middle}"
        ".frame{fill:none;stroke:#ccc}polyline{fill:none;stroke-width:1.5}"
    )
    note = "mean |change of the activation| by d_model; a line for each step, the first light, the last dark"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    rest = f'<rect width="100%" height="100%" fill="white"/>{text(GAP, 16, note)}'
    return "\n".join([head, f"<style>{style}</style>", rest, *parts, "</svg>", ""])


def plot(lines: dict[int, list[float]], decades: tuple[int, int], left: float, top: float) -> Iterator[str]:
    """Yield one plot: for each width the values at every step, between two powers of ten."""
    (low, high), widths = decades, sorted(lines)
    scale = math.log(widths[-1] / widths[0])

    def across(width: int) -> float:
        return round(left + PLOT * math.log(width / widths[0]) / scale, 1)

    def down(value: float) -> float:
        return round(top + PLOT - PLOT * (math.log10(value) - low) / max(high - low, 1), 1)

    yield f'<rect x="{left}" y="{top}" width="{PLOT}" height="{PLOT}" class="frame"/>'
    yield from (text(left - 4, down(10.0**power) + 4, f"1e{power}", "right") for power in range(low, high + 1))
    yield from (text(across(width), top + PLOT + 14, f"{width:,}", "middle") for width in widths)
    steps = len(lines[widths[0]])
    for step in range(steps):
        points = " ".join(f"{across(width)},{down(lines[width][step])}" for width in widths)
        shade = 210 - round(190 * (step + 1) / steps)
        yield f'<polyline points="{points}" stroke="rgb({shade},{shade},255)"/>'


def text(x: float, y: float, words: str, where: str = "") -> str:
    """Return words at a place."""
    return f'<text x="{x}" y="{y}" class="{where}">{words}</text>'


if __name__ == "__main__":
    main()
