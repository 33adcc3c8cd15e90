"""What ranks print: a log for each, in which a line parts every try from the one before."""

import os
import re
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

TRY = "--- try "  # how that line begins
TAIL_BYTES = 64 * 1024
ERROR = re.compile(r"^(?:\S+: )?(?:error: .*|\w*(?:Error|Exception): .*|slurmstepd: .*)$")
NODE_FAILED = re.compile(r"^srun: error: Node failure on (\S+)$")


def rank_log(directory: Path, rank: int) -> Path:
    """Return the file with the output of a rank."""
    return directory / "logs" / f"rank-{rank:05d}.log"


def heading(number: int, where: str = "") -> str:
    """Return the line with which a try begins in a log; `where` is "SLURM job 12 on n1"."""
    words = [str(number), where, f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"]
    return f"{TRY}{', '.join(filter(None, words))} ---"


def begin_try(log: Path, line: str) -> None:
    """Part what comes from what earlier tries have printed; on a full disk they run into one another."""
    with suppress(OSError), open(log, "ab+") as file:
        if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
            file.write(b"\n")
        file.write(f"{line}\n".encode())


def newest_try(log: Path, num_bytes: int = TAIL_BYTES) -> list[str]:
    """Return the lines of the newest try, as far as they are in the last bytes of a log."""
    lines = tail(log, num_bytes).splitlines()
    begins = max((number for number, line in enumerate(lines, 1) if line.startswith(TRY)), default=0)
    return lines[begins:]


def tail(path: Path, num_bytes: int = TAIL_BYTES) -> str:
    """Return the end of a file, if it can be from the beginning of a line on; nothing if there is none."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - num_bytes))
            text = file.read(num_bytes)
    except OSError:
        return ""
    if size > num_bytes:
        text = text.partition(b"\n")[2] or text
    return text.decode("utf-8", errors="replace")


def last_error(log: Path) -> str:
    """Return the last line of a log that tells of an error of the newest try; a node that failed before all else."""
    lines = [line.strip() for line in newest_try(log, 8192)]
    if nodes := [found[1] for line in lines if (found := NODE_FAILED.match(line))]:
        return f"node {', '.join(dict.fromkeys(nodes))} failed"
    return next((line.removeprefix("error: ") for line in reversed(lines) if ERROR.match(line)), "")
