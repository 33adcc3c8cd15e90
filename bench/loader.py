"""Loading side by side: random sequences a second and start-up, of the loader, a bare memory map, and what others use.

    python bench/loader.py --peers VENV [--megatron CHECKOUT] [--mtokens 128] [--rows 512 8]

VENV is an environment with bench/requirements.txt, and then bench/requirements-loading.txt with --no-deps. Every way
is a process of its own that reads the same tokens as sequences of 1,024, in random order, as int64; the repeats take
turns and the best counts. The page cache is warm. Then the loader's start-up over ever larger artifacts: as many names
as it takes for one real part.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tables import print_lines

PROJECT = Path(__file__).parent.parent
LOADING = Path(__file__).parent / "peers" / "loading.py"
END, VOCABULARY, SEQ_LEN = 50256, 50257, 1024
PARTS, BATCH_TOKENS = 4, 1 << 20
SAMPLES = (10**6, 10**8, 10**11)
LARGE_PART = 1 << 28  # tokens of the part that stands for all of a large artifact

WAYS = {  # name: (how it is called in the table, whether it is one of the frameworks)
    "ours": ("this loader", False),
    "ours_documents": ("this loader, documents numbered", False),
    "ours_best_fit": ("this loader, best fit", False),
    "gather": ("bare memmap, one copy a batch (limit)", False),
    "fixed": ("bare memmap, rows of fixed length", False),
    "index": ("bare memmap, indexed by token", False),
    "slices": ("bare memmap, a slice a row (nanoGPT)", False),
    "datasets": ("datasets, numpy", True),
    "mosaicml": ("mosaicml-streaming", True),
    "litdata": ("litdata", True),
    "megatron": ("Megatron-LM's GPTDataset", True),
}
Result = dict[str, float]


def main() -> None:
    """Measure and print."""
    args = arguments()
    work = args.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_tokens(work, args.mtokens * 10**6)
    ways = list(prepared(args, work))
    for rows in args.rows:
        results: dict[str, list[Result]] = {name: [] for name in ways}
        for _ in range(args.repeats):
            for name in ways:
                results[name].append(measure(args, work, name, rows))
        print_table(results, rows)
    print_starts(work)


def write_tokens(work: Path, num_tokens: int) -> None:
    """Write documents of random ids, their lengths like those of web pages, as parts and as a flat file."""
    from pipeline.text.token_parts import TokenWriter

    rng = np.random.default_rng(0)
    sizes, all_lengths = {}, []
    with open(work / "flat.bin", "wb") as flat:
        for part in range(PARTS):
            name = f"part-{part:05d}.arrow"
            sizes[name] = 0
            with TokenWriter(work / name, "uint16") as writer:
                while sizes[name] < num_tokens // PARTS:
                    lengths, values = documents(rng)
                    names = [str(number) for number in range(len(lengths))]
                    writer.add(names, names, values, lengths, lengths, lengths.astype(np.uint64))
                    values.tofile(flat)
                    all_lengths.append(lengths)
                    sizes[name] += len(values)
    np.save(work / "lengths.npy", np.concatenate(all_lengths))
    (work / "parts.json").write_text(json.dumps(sizes))


def documents(rng: np.random.Generator) -> tuple[Any, Any]:
    """Return (lengths, ids) of a batch of documents."""
    lengths = np.clip(rng.lognormal(6.2, 1.1, BATCH_TOKENS // 900), 2, 30_000).astype(np.int64)
    values = rng.integers(0, END, int(lengths.sum()), dtype=np.uint16)
    values[np.cumsum(lengths) - 1] = END
    return lengths, values


def prepared(args: argparse.Namespace, work: Path) -> Iterator[str]:
    """Yield the ways that can be measured here, after each has written its own copy of the tokens."""
    for name, (title, framework) in WAYS.items():
        if framework and args.peers is None:
            print(f"left out: {title}: no --peers")
        elif name == "megatron" and args.megatron is None:
            print(f"left out: {title}: no --megatron")
        else:
            began = time.monotonic()
            run(args, work, name, rows=0)
            if framework:
                print(f"{title}: {time.monotonic() - began:.0f} s to write its copy of the tokens", flush=True)
            yield name


def measure(args: argparse.Namespace, work: Path, name: str, rows: int) -> Result:
    """Run a way once."""
    result: Result = json.loads(run(args, work, name, rows).splitlines()[-1])
    return result


def run(args: argparse.Namespace, work: Path, name: str, rows: int) -> str:
    """Run a way in a process of its own and return what it prints."""
    python = args.peers / "bin" / "python" if WAYS[name][1] else Path(sys.executable)
    words = [python, LOADING, name, work, SEQ_LEN, rows, args.seconds, args.megatron or ""]
    path = os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=environment, cwd=work)
    if done.returncode:
        sys.exit(f"{WAYS[name][0]} failed: {' '.join(map(str, words))}\n{done.stderr[-3000:]}")
    return done.stdout


def print_table(results: dict[str, list[Result]], rows: int) -> None:
    """Print the best of all repeats of each way, and how the loader compares with it."""
    print(f"\nsequences of {SEQ_LEN:,} tokens in random order, batches of {rows}, one process\n")
    best = {name: max(found["per_cpu_s"] for found in runs) for name, runs in results.items()}
    head = ("", "a CPU-s", "a second", "start-up s", "peak MB", "this loader is", "of the limit")
    lines = [head]
    for name, runs in results.items():
        lines.append(
            (
                WAYS[name][0],
                f"{best[name]:,.0f}",
                f"{max(found['per_s'] for found in runs):,.0f}",
                f"{min(found['start_s'] for found in runs):.3f}",
                f"{max(found['peak_mb'] for found in runs):,.0f}",
                f"{best['ours'] / best[name]:.2f}x",
                f"{best[name] / best['gather']:.2f}",
            )
        )
    print_lines(lines)
    frameworks = {name: rate for name, rate in best.items() if WAYS[name][1]}
    if frameworks:
        fastest = max(frameworks, key=lambda name: frameworks[name])
        ratio = best["ours"] / frameworks[fastest]
        print(f"\n{ratio:.1f} times the fastest framework ({WAYS[fastest][0]})", flush=True)


def print_starts(work: Path) -> None:
    """Print how long it takes from nothing to the first batch of 64, for artifacts of any size."""
    from pipeline.text.token_parts import TokenWriter

    part, size, rng = work / "large.arrow", 0, np.random.default_rng(1)
    lengths, values = documents(rng)
    names = [str(number) for number in range(len(lengths))]
    with TokenWriter(part, "uint16") as writer:
        while size < LARGE_PART:
            writer.add(names, names, values, lengths, lengths, lengths.astype(np.uint64))
            size += len(values)
    lines: list[Sequence[str]] = [
        ("sequences", "parts", "loader made, s", "first batch, s", "second batch, s", "peak MB")
    ]
    for samples in SAMPLES:
        words = [sys.executable, "-c", START, part, size, -(-samples * SEQ_LEN // size)]
        environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
        runs = [
            json.loads(subprocess.run(list(map(str, words)), capture_output=True, check=True, env=environment).stdout)
            for _ in range(3)
        ]
        times = [f"{min(found[column] for found in runs):.3f}" for column in range(3)]
        lines.append((f"{samples:,}", f"{words[-1]:,}", *times, f"{max(found[3] for found in runs):,.0f}"))
    print("\nstart-up of this loader\n")
    print_lines(lines)


START = f"""
import json, resource, sys, time
from pathlib import Path
from pipeline.text.loader import Loader, Order
from pipeline.text.mixture import Temperature
from pipeline.text.packing import Contiguous
from pipeline.text.stream import TokenStream
part, size, count = Path(sys.argv[1]), *map(int, sys.argv[2:])
names, sizes = [f"part-{{number:08d}}" for number in range(count)], [size] * count  # read from the manifest
began = time.perf_counter()
stream = TokenStream(names, sizes, {END}, {VOCABULARY}, find_part=lambda name: part)
loader = Loader({{"tokens": stream}}, Order(Temperature(), Contiguous(), {SEQ_LEN}, 64, steps=1000, seed=0))
made = time.perf_counter()
loader.read(1)
first = time.perf_counter()
loader.read(2)
ended = time.perf_counter()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
print(json.dumps([made - began, first - began, ended - first, peak]))
"""


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="virtual environment of the frameworks")
    parser.add_argument("--megatron", type=Path, help="checkout of Megatron-LM")
    parser.add_argument("--mtokens", type=int, default=128, help="million tokens to read from")
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 8], help="sequences of a batch")
    parser.add_argument("--seconds", type=int, default=5, help="how long each measurement lasts")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("bench-loader"), help="folder for the data; emptied first")
    args = parser.parse_args()
    args.peers = args.peers and args.peers.absolute()
    args.megatron = args.megatron and args.megatron.resolve()
    return args


if __name__ == "__main__":
    main()
