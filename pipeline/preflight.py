"""Tries the nodes of a training before it starts: `python -m pipeline preflight DIR`, in a short SLURM job.

Every node has to start Python, import what a training needs in the same versions and from the same code, see its GPUs,
write where the others see it, and reach the others. `slurm/stage.sbatch preflight DIR` does this by hand.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pipeline.artifact import WORK, write_json
from pipeline.env import Share, reserved_port
from pipeline.errors import ConfigError, LaunchError
from pipeline.execute import needed_bytes
from pipeline.launch import scheduler
from pipeline.launch.failures import gigabytes
from pipeline.launch.slurm import Slurm
from pipeline.launch.srun import step_environment, step_words
from pipeline.perform import outcome
from pipeline.probe import MARKS, NEEDED, SAYS, SIZES, Facts
from pipeline.worker import FrozenTask, read_task

RESULT = "preflight.json"  # in work/
PATIENCE_S = 270.0  # for each of the two steps, so that the job comes to its end in time
CLOCKS_APART_S = 30.0
LABEL = re.compile(r"\s*(\d+): ")  # of srun: which process said the rest of the line
INSTALLED = "run.setup or run.python says where it is"


def preflight(arguments: Sequence[str]) -> int:
    """Try the nodes of this SLURM job for the training frozen in a directory; return the exit status.

    Prints a table, and a line for every problem; both are left in `work/preflight.json` too.

    Raises:
        ConfigError: If that is not one directory of a training for SLURM, or this is no SLURM job.
    """
    if len(arguments) != 1 or "SLURM_JOB_ID" not in os.environ:
        raise ConfigError("preflight: wanted the directory of one submitted training, in a job of SLURM")
    directory = Path(arguments[0]).resolve()
    task = read_task(directory / WORK / "task.json")
    if not isinstance(task.run, Slurm):
        raise ConfigError(f"{directory}: was frozen for run={task.run.kind}; run=slurm submits it")
    run = task.run.on(int(os.environ["SLURM_JOB_NUM_NODES"]))
    nodes = scheduler.nodes_of(os.environ["SLURM_JOB_NODELIST"])
    shutil.rmtree(directory / MARKS, ignore_errors=True)
    seen, problems = _look(directory, run, nodes)
    problems += _judge(task, run, seen)
    ranks: list[Facts] = []
    if not problems:
        ranks, problems = _reach(directory, run, nodes)
    shutil.rmtree(directory / MARKS, ignore_errors=True)
    _print_table(seen, ranks)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr, flush=True)
    _leave(directory, seen, ranks, problems)
    return LaunchError.exit_status if problems else 0


def _look(directory: Path, run: Slurm, nodes: Sequence[str]) -> tuple[list[Facts], list[str]]:
    """Return what every node says of itself, and a problem for each that says nothing."""
    alone = run.model_copy(update={"ranks": run.nodes, "ranks_per_node": 1})
    said, complaints = _step(alone, "look", str(directory))
    known = {facts["node"] for facts in said}
    problems = [
        f"{node}: Python did not start: {_why(number, nodes, 1, complaints)}; {INSTALLED}"
        for number, node in enumerate(nodes)
        if node not in known
    ]
    return sorted(said, key=lambda facts: nodes.index(facts["node"])), problems


def _reach(directory: Path, run: Slurm, nodes: Sequence[str]) -> tuple[list[Facts], list[str]]:
    """Return what every rank found when it met the others, and the problems."""
    said, complaints = _step(run, "reach", str(directory), *nodes)
    problems = []
    for number, node in enumerate(nodes):
        mine = [facts for facts in said if facts["node"] == node]
        failed = next((facts["error"] for facts in mine if "error" in facts), None)
        if failed:
            problems.append(f"{node}: cannot reach the other nodes: {failed}; see run.environment (NCCL_, GLOO_)")
        elif len(mine) < run.each:
            problems.append(f"{node}: a rank gave no answer: {_why(number, nodes, run.each, complaints)}")
        unseen = sorted({other for facts in mine for other in facts.get("unseen", [])})
        if unseen:
            problems.append(
                f"{node}: does not see what {', '.join(unseen)} wrote in {directory}; root=DIR has to be on a disk "
                "that all nodes share"
            )
    return said, problems


def _step(run: Slurm, *words: str) -> tuple[list[Facts], list[str]]:
    """Run a probe on the nodes; return what its processes say, and the other lines that came."""
    share = Share(world=run.ranks, first=0, count=run.ranks)
    with reserved_port() as port:
        environment = {**os.environ, **step_environment(run, share, (0, ""), port)}
        command = step_words(run, run.ranks, ["--label"], "probe.py", *words)
        try:
            done = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE_S
            )
            out, complaints = done.stdout, done.stderr
        except subprocess.TimeoutExpired as late:
            out = late.stdout or b""
            complaints = (late.stderr or b"") + f"no answer within {PATIENCE_S:.0f} s".encode()
    sys.stderr.buffer.write(complaints)
    said = []
    for line in out.decode(errors="replace").splitlines():
        _, found, text = line.partition(SAYS)
        if found:
            with suppress(ValueError):  # cut off, where there was no answer in time
                said.append(json.loads(text))
    return said, complaints.decode(errors="replace").splitlines()


def _why(number: int, nodes: Sequence[str], each: int, complaints: Sequence[str]) -> str:
    """Return what was said last of one of the nodes: by its processes, `each` many, or by srun of it."""
    node = nodes[number]
    labelled = [(found, line) for line in complaints if (found := LABEL.match(line))]
    of_process = [line[found.end() :] for found, line in labelled if int(found[1]) // each == number]
    of_node = [line for line in complaints if f"{node}:" in line or f" {node} " in line]
    return next((lines[-1].strip() for lines in (of_process, of_node, complaints) if lines), "it says nothing")


def _judge(task: FrozenTask, run: Slurm, seen: Sequence[Facts]) -> Iterator[str]:
    """Yield what is wrong with what the nodes say of themselves."""
    need, _ = needed_bytes(task)
    for facts in seen:
        node = facts["node"]
        for name, why in facts["missing"].items():
            yield f"{node}: cannot import {name}: {why}; {INSTALLED} ({facts['executable']} was taken)"
        if (found := facts.get("gpus", run.gpus_per_node)) < run.gpus_per_node:
            yield f"{node}: torch sees {found} GPUs, but run.gpus_per_node is {run.gpus_per_node}"
        memory = facts.get("gpu_bytes")
        if memory and task.memory_bytes and task.memory_bytes > memory and run.parallel.offload is None:
            yield (
                f"{node}: the model's states need about {gigabytes(task.memory_bytes)} a rank, but a GPU has "
                f"{gigabytes(memory)}; see run.parallel and run.nodes"
            )
        if "disk_error" in facts:
            yield f"{node}: cannot write the output ({facts['disk_error']})"
        elif facts["free_bytes"] < need:
            yield f"{node}: the output needs about {gigabytes(need)}, and {gigabytes(facts['free_bytes'])} are free"
    yield from _differences(seen)


def _differences(seen: Sequence[Facts]) -> Iterator[str]:
    """Yield what is not the same on all nodes."""
    for name in ("python", *NEEDED, "code"):
        having = [facts for facts in seen if name in facts]
        for facts in having[1:]:
            if facts[name] != having[0][name]:
                what = "the code of the pipeline" if name == "code" else name
                yield f"{facts['node']}: {what} is {facts[name]}, but {having[0]['node']} has {having[0][name]}"


def _print_table(seen: Sequence[Facts], ranks: Sequence[Facts]) -> None:
    clocks = {facts["node"]: facts["clock"] for facts in reversed(ranks) if "clock" in facts}
    first = clocks.get(seen[0]["node"]) if seen else None
    rows = [("node", "python", *NEEDED, "GPUs", "write MB/s", "read MB/s", "free GB", "clock")]
    for facts in seen:
        apart = clocks[facts["node"]] - first if first and facts["node"] in clocks else None
        speeds = [f"{facts[name]:,.0f}" if name in facts else "-" for name in ("write", "read")]
        free = f"{facts['free_bytes'] / 1e9:,.0f}" if "free_bytes" in facts else "-"
        clock = "-" if apart is None else f"{apart:+.1f} s"
        have = [str(facts.get(name, "-")) for name in ("python", *NEEDED, "gpus")]
        rows.append((facts["node"], *have, *speeds, free, clock))
        if apart is not None and abs(apart) > CLOCKS_APART_S:
            print(f"note: {facts['node']}: its clock is {apart:+.0f} s apart from that of {seen[0]['node']}")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if rates := _rates(ranks):
        said = ", ".join(f"{int(size) >> 20} MiB {rate:.2f} GB/s" for size, rate in rates.items())
        print(f"all-reduce over {len(ranks)} ranks ({ranks[0]['backend']}): {said}", flush=True)


def _rates(ranks: Sequence[Facts]) -> Mapping[str, float]:
    """Return the bandwidth of the slowest rank, by bytes that are summed."""
    if not ranks or any("rates" not in facts for facts in ranks):
        return {}
    return {str(size): min(facts["rates"][str(size)] for facts in ranks) for size in SIZES}


def _leave(directory: Path, seen: Sequence[Facts], ranks: Sequence[Facts], problems: Sequence[str]) -> None:
    ended = outcome(LaunchError.exit_status if problems else 0, problems)
    rates = dict(_rates(ranks))  # GB/s, by bytes
    write_json(directory / WORK / RESULT, {**ended, "nodes": list(seen), "all_reduce": rates})
