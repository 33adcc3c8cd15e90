"""Tokenizing side by side: the stage, its engine alone, and what others use, in one table from one run.

    python bench/tokenizing.py --corpus DIR --tokenizer FILE --mb 400 1000 --peers DIR [--megatron CHECKOUT]

DIR of the corpus has JSONL files with the field `text`; FILE is GPT-2's tokenizer.json. Every row is a process of its
own, and the repeats take turns. CPU time is user and system of the whole process tree; net of start-up, which is the
same command on 40 documents. Memory is the peak of the tree's proportional set size (/proc/*/smaps_rollup).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tables import print_lines

PROJECT = Path(__file__).parent.parent
PEERS = Path(__file__).parent / "peers"
FEW = 40
SAMPLE_S = 0.1
TOKENIZER_CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
Command = Callable[[Path, Path], list[str]]  # input, directory for output → words


@dataclass
class Text:
    """A slice of the corpus, as JSONL and as a corpus artifact."""

    jsonl: Path
    artifact: Path
    num_bytes: int


@dataclass
class Run:
    """One process and all below it."""

    wall_s: float
    cpu_s: float
    peak_mb: float
    tokens: int


@dataclass
class Row:
    """A line of the table."""

    name: str
    command: Command
    slow: bool = False
    takes_artifact: bool = False
    times_itself: bool = False
    few: list[Run] = field(default_factory=list)
    full: list[Run] = field(default_factory=list)


def main() -> None:
    """Measure and print."""
    args = _arguments()
    work = args.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    tokenizer = _tokenizer(args.tokenizer, work)
    rows = list(_rows(args, tokenizer))
    few = _text(args.corpus, work, "few", documents=FEW)
    slow = _text(args.corpus, work, "slow", num_bytes=args.slow_mb * 10**6)
    for row in rows:
        measure(row, few, work)  # once for nothing: files and byte code are warm afterwards
        row.few.clear()
    for size in args.mb:
        text = _text(args.corpus, work, f"{size}mb", num_bytes=size * 10**6)
        for row in rows:
            row.full.clear()
        for _ in range(args.repeats):
            for row in rows:
                row.few.append(measure(row, few, work))
                row.full.append(measure(row, slow if row.slow else text, work))
        print_table(rows, text, slow)
        shutil.rmtree(text.artifact.parent)


def measure(row: Row, text: Text, work: Path) -> Run:
    """Run a row once."""
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    command = row.command(text.artifact if row.takes_artifact else text.jsonl, out)
    with open(out / "stdout", "w+") as stdout, open(out / "stderr", "w") as stderr:
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, cwd=out, env=_environment())
        peak, (pid, status, usage) = 0, os.wait4(process.pid, os.WNOHANG)
        while pid == 0:
            time.sleep(SAMPLE_S)
            peak = max(peak, sum(map(_pss, _tree(process.pid))))
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        wall = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        stdout.seek(0)
        lines = stdout.read().splitlines()
    if process.returncode:
        sys.exit(f"{row.name} failed: {' '.join(command)}\n{(out / 'stderr').read_text()[-2000:]}\n{lines[-5:]}")
    if row.takes_artifact and not row.times_itself:
        (manifest,) = out.glob("root/tokens/*/manifest.json")
        said = {"tokens": json.loads(manifest.read_text())["stats"]["tokens"]}
    else:
        said = json.loads(lines[-1])
    if row.times_itself:
        return Run(said["wall_s"], said["cpu_s"], peak / 1e6, said["tokens"])
    return Run(wall, usage.ru_utime + usage.ru_stime, peak / 1e6, said["tokens"])


def print_table(rows: Sequence[Row], text: Text, slow: Text) -> None:
    """Print the best of all repeats of each row, and how it compares with the first."""
    print(f"\n{text.num_bytes / 1e6:.0f} MB of text; rows with * got {slow.num_bytes / 1e6:.0f} MB\n")
    head = ("", "MB per CPU-s, net", "net CPU s", "start-up CPU s", "wall s", "peak MB", "bytes a token", "stage is")
    lines = [head]
    ours = _rate(rows[0], text)
    for row in rows:
        size = slow if row.slow else text
        rate = _rate(row, size)
        start = 0.0 if row.times_itself else min(run.cpu_s for run in row.few)
        lines.append(
            (
                row.name + ("*" if row.slow else ""),
                f"{rate:.1f}",
                f"{size.num_bytes / 1e6 / rate:.1f}",
                f"{start:.1f}",
                f"{min(run.wall_s for run in row.full):.1f}",
                "-" if row.times_itself else f"{max(run.peak_mb for run in row.full):.0f}",
                f"{size.num_bytes / row.full[0].tokens:.4f}",
                f"{ours / rate:.2f}x",
            )
        )
    print_lines(lines)


def _rate(row: Row, text: Text) -> float:
    """Return MB of text per CPU second, net of start-up."""
    start = 0.0 if row.times_itself else min(run.cpu_s for run in row.few)
    return text.num_bytes / 1e6 / max(1e-3, min(run.cpu_s for run in row.full) - start)


def _rows(args: argparse.Namespace, tokenizer: Path) -> Iterator[Row]:
    for ranks in (1, 2):
        yield Row(f"stage, {ranks} rank{'s' * (ranks > 1)}", _stage(tokenizer, ranks), takes_artifact=True)
    alone = _script(sys.executable, "engine_alone.py", tokenizer)
    yield Row("its engine in memory", alone, takes_artifact=True, times_itself=True)
    if args.megatron:
        checkout = str(args.megatron.resolve())
        yield Row("Megatron-LM, fast path", _script(sys.executable, "megatron_fast.py", tokenizer, checkout))
    else:
        print("Megatron-LM is left out: no --megatron CHECKOUT")
    if not args.peers:
        print("datasets, nanoGPT and datatrove are left out: no --peers DIR")
        return
    python = _environment_of_peers(args.peers.resolve())
    yield Row("tiktoken, nanoGPT's recipe", _script(python, "nanogpt_prepare.py", tokenizer), slow=True)
    yield Row("datasets.map", _script(python, "datasets_map.py", tokenizer), slow=True)
    yield Row("datatrove", _script(python, "datatrove_tokenizer.py", tokenizer), slow=True)


def _stage(tokenizer: Path, ranks: int) -> Command:
    def command(source: Path, out: Path) -> list[str]:
        inputs = (f"stage.corpus={source}", f"stage.tokenizer={tokenizer}")
        return _pipeline("stage=tokenize", *inputs, f"run.ranks={ranks}", root=out)

    return command


def _script(python: str, name: str, tokenizer: Path, *first: str) -> Command:
    return lambda source, out: [python, str(PEERS / name), *first, str(source), str(out), str(tokenizer)]


def _pipeline(*words: str, root: Path) -> list[str]:
    return [sys.executable, "-m", "pipeline", *words, f"root={root / 'root'}", "tracker=none"]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(PROJECT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _environment_of_peers(directory: Path) -> str:
    """Return the Python of the peers' environment, made if it is not there."""
    python = directory / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
        requirements = str(Path(__file__).parent / "requirements.txt")
        subprocess.run([str(python), "-m", "pip", "install", "-q", "-r", requirements], check=True)
    return str(python)


def _tokenizer(source: Path, work: Path) -> Path:
    """Make an artifact of a tokenizer.json."""
    sys.path.insert(0, str(PROJECT))
    from pipeline.artifact import Made, Manifest, record_file, write_manifest

    directory = work / "tokenizer" / "gpt2-0000000000000000"
    directory.mkdir(parents=True)
    shutil.copyfile(source, directory / "tokenizer.json")
    (directory / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))  # for the peers
    made = Made(version="0", commit=None, python="3", host="", time="", seconds=0, ranks=1)
    files = {"tokenizer.json": record_file(directory / "tokenizer.json")}
    write_manifest(
        directory,
        Manifest(
            kind="tokenizer",
            name="gpt2",
            fingerprint="0" * 16,
            stage={"kind": "train_tokenizer", "corpus": "none"},
            inputs={},
            files=files,
            stats={},
            made=made,
        ),
    )
    return directory


def _text(corpus: Path, work: Path, name: str, num_bytes: int = 0, documents: int = 0) -> Text:
    """Take the beginning of every file of the corpus, in all so many bytes of text, and make an artifact of it."""
    directory = work / name
    directory.mkdir(parents=True)
    jsonl = directory / "text.jsonl"
    files = sorted(corpus.glob("*.jsonl"))
    total = 0
    with open(jsonl, "wb") as out:
        for number, path in enumerate(files, 1):
            with open(path, "rb") as lines:
                for taken, line in enumerate(lines):
                    if taken * len(files) >= documents if documents else total >= num_bytes * number // len(files):
                        break
                    total += len(json.loads(line)["text"].encode())
                    out.write(line)
    source = f"stage.sources=[{{path: {jsonl}, reader: {{kind: jsonl, source: bench}}}}]"
    done = subprocess.run(_pipeline("stage=shard", source, root=directory), env=_environment(), cwd=directory)
    if done.returncode:
        sys.exit(done.returncode)
    (artifact,) = directory.glob("root/corpus/*")
    return Text(jsonl, artifact, total)


def _tree(pid: int) -> list[int]:
    """Return a process and all below it."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            parents.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found


def _pss(pid: int) -> int:
    """Return the proportional set size of a process in bytes; 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="directory of JSONL files")
    parser.add_argument("--tokenizer", type=Path, required=True, help="GPT-2's tokenizer.json")
    parser.add_argument("--mb", type=int, nargs="+", default=[100], help="sizes of the text")
    parser.add_argument("--slow-mb", type=int, default=20, help="size of the text for peers of 1 MB/s")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", type=Path, help="virtual environment of the peers, made if it is not there")
    parser.add_argument("--megatron", type=Path, help="checkout of Megatron-LM")
    parser.add_argument("--work", type=Path, default=Path("bench-work"), help="scratch; emptied first")
    return parser.parse_args()


if __name__ == "__main__":
    main()
