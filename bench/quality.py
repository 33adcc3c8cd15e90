"""Quality per unit of compute: the quickstart's recipe against nanoGPT's, in one trainer, on the quickstart's corpus.

    python bench/quality.py [--work DIR] [--seeds 3] [--threads 1] [--no-ladder] [--quick]

Tokenizer, tokens, order of the rows, number of threads and of processes are the same; d_model, layers and heads too.
nanoGPT's recipe is written from its description: GPT-2's architecture without biases, AdamW with beta2 0.99 as for its
small models, weight decay 0.1 on matrices, gradients clipped at 1, GPT-2's first weights, no dropout, a linear warm-up
and a cosine down to a tenth. It gets the best of three learning rates. Each schedule ends where its own budget ends;
the question is which share of the other's budget ours needs for a final loss as low.

Wall time is that of the steps, by the trainer's own clock. Processor time is the whole command's, net of a run of as
many validations and as many steps; both are means over the seeds. The measured runs take turns, one at a time; those of
the ladder run two at a time. What an earlier run of the bench has done in the work directory is not done again.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from tables import print_lines

PROJECT = Path(__file__).parent.parent
JOBS = PROJECT / "conf" / "job"
DATA_TASKS = ("shard", "clean", "dedup", "train_tokenizer", "tokenize")
VALIDATION_SEQUENCES, VALIDATIONS = 128, 5
SEQ_LEN = 256
Recipe = dict[str, Any]  # settings of the stage pretrain, without tokens, steps and seed


@dataclass(frozen=True)
class Plan:
    """How much is run.

    Attributes:
        baseline_tokens: Budget of nanoGPT's recipe.
        our_tokens: Budget of ours, and of each rung of the ladder.
        rates: Learning rates that nanoGPT's recipe may choose from.
        minutes: What it takes on two idle processors.
    """

    baseline_tokens: int
    our_tokens: int
    rates: list[float]
    minutes: int


FULL = Plan(500_000, 200_704, [5e-4, 1e-3, 2e-3], 30)
QUICK = Plan(30_720, 20_480, [1e-3], 4)


@dataclass
class Result:
    """What came of one run.

    Attributes:
        curve: Validation losses by the tokens seen until then.
        wall_s: Of the steps alone.
        cpu_s: Of the whole command.
    """

    curve: dict[int, float]
    wall_s: float
    cpu_s: float
    tokens: int
    steps: int

    @classmethod
    def of(cls, kept: Mapping[str, Any], batch_tokens: int) -> "Result":
        """Read it from what a run has logged."""
        rows = kept["steps"]
        curve = {row["step"] * batch_tokens: row["validation_loss"] for row in rows if "validation_loss" in row}
        wall_s = sum(batch_tokens / row["tokens_per_s"] for row in rows)
        return cls(curve, wall_s, kept["cpu_s"], len(rows) * batch_tokens, len(rows))

    @property
    def loss(self) -> float:
        """The final validation loss."""
        return self.curve[max(self.curve)]


@dataclass
class Bench:
    """Where runs are made, and what their names are."""

    work: Path
    threads: int
    tokens: Path = field(default_factory=Path)

    def prepare(self) -> None:
        """Make the tokens, with the quickstart's own stages and settings."""
        job = yaml.safe_load((JOBS / "quickstart.yaml").read_text())
        tasks = {name: job["tasks"][name] for name in DATA_TASKS}
        self._command(self.work, {"tasks": tasks}, "corpus")
        self.tokens = (self.work / "jobs" / "corpus" / "tokenize").resolve()

    def train(self, name: str, recipe: Recipe, tokens: int, seed: int, validations: int = VALIDATIONS) -> Result:
        """Train from nothing, unless an earlier run of this bench left the result of the very same in `work`."""
        steps = tokens // recipe["batch_tokens"]
        return self._run(name, recipe, seed, steps, max(steps // validations, 1))

    def start(self, name: str, recipe: Recipe, tokens: int, seed: int) -> Result:
        """Do as `train`, but only as many steps as there are validations, and one after each."""
        steps = tokens // recipe["batch_tokens"]
        every = max(steps // VALIDATIONS, 1)
        return self._run(f"{name}-start", recipe, seed, math.ceil(steps / every), 1)

    def _run(self, name: str, recipe: Recipe, seed: int, steps: int, every: int) -> Result:
        task = {**recipe, "tokens": str(self.tokens), "steps": steps, "seed": seed}
        task |= {"validate_every_steps": every, "validation_sequences": VALIDATION_SEQUENCES}
        name = f"{name}-{hashlib.sha256(json.dumps([task, self.threads]).encode()).hexdigest()[:8]}"
        kept = self.work / "runs" / name / "metrics.json"
        if not kept.exists():
            root = self.work / "runs" / name
            shutil.rmtree(root, ignore_errors=True)
            cpu_s = self._command(root, {"tasks": {"pretrain": task}}, name)
            lines = (root / "jobs" / name / "pretrain" / "metrics.jsonl").read_text().splitlines()
            kept.write_text(json.dumps({"cpu_s": cpu_s, "steps": [json.loads(line) for line in lines]}))
            for big in ("model", "jobs"):
                shutil.rmtree(root / big)
        return Result.of(json.loads(kept.read_text()), recipe["batch_tokens"])

    def _command(self, root: Path, job: Mapping[str, Any], name: str) -> float:
        """Run a job and return the seconds of processor time that it took, all its processes together."""
        path = self.work / f"{name}.yaml"
        path.write_text("# @package _global_\n" + yaml.safe_dump(job, sort_keys=False))
        words = [f"job={path}", f"root={root}", f"run.threads={self.threads}", "run.checkpoints.every_steps=1000000"]
        paths = os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(self.threads)}
        log = path.with_suffix(".log")
        with log.open("w") as output:
            command = [sys.executable, "-m", "pipeline", *words]
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
        return usage.ru_utime + usage.ru_stime


def our_recipe() -> Recipe:
    """Return the quickstart's recipe."""
    job = yaml.safe_load((JOBS / "quickstart.yaml").read_text())
    (preset,) = (name for default in job["defaults"] for key, name in default.items() if "pretrain.model" in key)
    recipe = {key: value for key, value in job["tasks"]["pretrain"].items() if key != "tokens"}
    recipe["model"] = yaml.safe_load((PROJECT / "conf" / "model" / f"{preset}.yaml").read_text())
    return recipe


def nanogpt_recipe(ours: Recipe, rate: float) -> Recipe:
    """Return nanoGPT's recipe at the size of ours."""
    sizes = {key: ours["model"][key] for key in ("kind", "vocab_size", "d_model", "num_layers", "num_heads")}
    gpt2 = {"norm": "layernorm", "positions": "learned", "mlp": "gelu_exact", "bias": False, "tie_embeddings": True}
    return {
        "kind": "pretrain",
        "seq_len": SEQ_LEN,
        "batch_tokens": 512,
        "clip_norm": 1.0,
        "model": {**sizes, **gpt2, "max_seq_len": SEQ_LEN, "init_std": 0.02},
        "optimizer": {"kind": "adamw", "lr": rate, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1},
        "schedule": {"kind": "cosine", "warmup_fraction": 0.05, "final_fraction": 0.1},
    }


def ladder(baseline: Recipe, ours: Recipe) -> Iterator[tuple[str, Recipe]]:
    """Yield the recipes between nanoGPT's and ours; each has one part more."""
    yield "nanoGPT's recipe, this budget", baseline
    recipe = {**baseline, "model": {**ours["model"], "init_std": 0.02, "qk_norm": False}}
    yield "+ RMSNorm, rotary, SwiGLU, grouped queries", recipe
    recipe = {**recipe, "model": {**recipe["model"], "init_std": ours["model"]["init_std"]}}
    yield f"+ first weights of {ours['model']['init_std']}", recipe
    recipe = {**recipe, "model": ours["model"]}
    if ours["model"].get("qk_norm"):
        yield "+ normed queries and keys", recipe
    recipe = {**recipe, "optimizer": ours["optimizer"]}
    yield f"+ {ours['optimizer']['kind']}, lr {ours['optimizer']['lr']}", recipe
    recipe = {**recipe, "schedule": ours["schedule"]}
    yield f"+ {ours['schedule']['kind']} schedule", recipe
    if ours["batch_tokens"] != baseline["batch_tokens"]:
        yield f"+ batches of {ours['batch_tokens']:,} tokens = ours", ours


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("quality"), help="directory for everything that is made")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-ladder", action="store_true", help="leave the ablation out")
    parser.add_argument("--quick", action="store_true", help="one seed and few tokens: does it run?")
    args = parser.parse_args()
    plan, seeds = (QUICK, 1) if args.quick else (FULL, args.seeds)
    print(
        f"about {plan.minutes} minutes on two idle processors with 3 seeds; {args.threads} thread(s) a run", flush=True
    )
    bench = Bench(args.work.resolve(), args.threads)
    bench.work.mkdir(parents=True, exist_ok=True)
    bench.prepare()
    ours = our_recipe()
    rate = best_rate(bench, plan, ours)
    baseline = nanogpt_recipe(ours, rate)
    found = compare(bench, plan, baseline, ours, seeds)
    print_curves(found)
    print_comparison(found, starts(bench, plan, baseline, ours))
    if not args.no_ladder:
        print_ladder(bench, plan, list(ladder(baseline, ours)), seeds)


def best_rate(bench: Bench, plan: Plan, ours: Recipe) -> float:
    """Return the learning rate that nanoGPT's recipe ends lowest with, of the plan's."""
    ends = {}
    for rate in plan.rates:
        ends[rate] = bench.train("nanogpt", nanogpt_recipe(ours, rate), plan.baseline_tokens, seed=0).loss
        print(f"nanoGPT's recipe with learning rate {rate:g}: final validation loss {ends[rate]:.4f}", flush=True)
    return min(ends, key=lambda rate: ends[rate])


def compare(bench: Bench, plan: Plan, baseline: Recipe, ours: Recipe, seeds: int) -> dict[str, list[Result]]:
    """Train both recipes with every seed, in turns."""
    found: dict[str, list[Result]] = {"nanoGPT's": [], "ours": []}
    for seed in range(seeds):
        found["nanoGPT's"].append(bench.train("nanogpt", baseline, plan.baseline_tokens, seed))
        found["ours"].append(bench.train("ours", ours, plan.our_tokens, seed))
    return found


def starts(bench: Bench, plan: Plan, baseline: Recipe, ours: Recipe) -> dict[str, Result]:
    """Run both without most of their steps, so that start-up and validations can be taken off."""
    return {
        "nanoGPT's": bench.start("nanogpt", baseline, plan.baseline_tokens, 0),
        "ours": bench.start("ours", ours, plan.our_tokens, 0),
    }


def print_curves(found: Mapping[str, Sequence[Result]]) -> None:
    """Print the validation loss of both by tokens seen, mean over seeds."""
    means = {
        name: {tokens: statistics.mean(run.curve[tokens] for run in runs) for tokens in runs[0].curve}
        for name, runs in found.items()
    }
    print(f"\nvalidation loss by tokens seen, mean of {len(found['ours'])} seed(s)\n")
    lines = [("tokens", *means)]
    for tokens in sorted({tokens for curve in means.values() for tokens in curve}):
        cells = [f"{curve[tokens]:.4f}" if tokens in curve else "" for curve in means.values()]
        lines.append((f"{tokens:,}", *cells))
    print_lines(lines)


def print_comparison(found: Mapping[str, Sequence[Result]], start: Mapping[str, Result]) -> None:
    """Print final losses and costs, and what share of nanoGPT's cost ours has."""
    print("\nfinal\n")
    lines = [("", "tokens", "steps", "validation loss", "spread", "wall s", "CPU s, net")]
    costs = {}
    for name, runs in found.items():
        first, less = runs[0], start[name]
        net = (statistics.mean(run.cpu_s for run in runs) - less.cpu_s) * first.steps / (first.steps - less.steps)
        wall = statistics.mean(run.wall_s for run in runs)
        costs[name] = (first.tokens, wall, net)
        loss = f"{statistics.mean(run.loss for run in runs):.4f}"
        lines.append((name, f"{first.tokens:,}", str(first.steps), loss, spread(runs), f"{wall:.1f}", f"{net:.1f}"))
    shares = [mine / theirs for mine, theirs in zip(costs["ours"], costs["nanoGPT's"], strict=True)]
    lines.append(("share", f"{shares[0]:.2f}", "", "", "", f"{shares[1]:.2f}", f"{shares[2]:.2f}"))
    print_lines(lines)
    gap = statistics.mean(r.loss for r in found["nanoGPT's"]) - statistics.mean(r.loss for r in found["ours"])
    reached = "reached" if gap >= 0 else "NOT reached"
    print(f"\nnanoGPT's final loss is {reached}: ours is {gap:.4f} nats lower, with {shares[0]:.0%} of its tokens,")
    print(f"{shares[1]:.0%} of its wall time and {shares[2]:.0%} of its processor time", flush=True)


def print_ladder(bench: Bench, plan: Plan, rungs: Sequence[tuple[str, Recipe]], seeds: int) -> None:
    """Print what each part buys: from nanoGPT's recipe to ours, all with our budget of tokens."""
    jobs = [(recipe, seed) for _, recipe in rungs for seed in range(seeds)]
    with ThreadPoolExecutor(max(2 // bench.threads, 1)) as pool:
        runs = list(pool.map(lambda job: bench.train("rung", job[0], plan.our_tokens, job[1], validations=1), jobs))
    print(f"\nladder: each part added to those above it, {plan.our_tokens:,} tokens\n")
    lines = [("", "validation loss", "spread", "bought", "CPU s, whole command")]
    before = None
    for number, (title, _) in enumerate(rungs):
        some = runs[number * seeds : (number + 1) * seeds]
        loss = statistics.mean(run.loss for run in some)
        bought = "" if before is None else f"{before - loss:+.4f}"
        cpu = f"{statistics.mean(run.cpu_s for run in some):.0f}"
        lines.append((title, f"{loss:.4f}", spread(some), bought, cpu))
        before = loss
    print_lines(lines)


def spread(runs: Sequence[Result]) -> str:
    """Return the standard deviation of the final losses over the seeds."""
    return f"±{statistics.stdev(run.loss for run in runs):.4f}" if len(runs) > 1 else ""


if __name__ == "__main__":
    main()
