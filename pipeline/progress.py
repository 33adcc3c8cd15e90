"""What people are told of work under way: how far it is, with a note of the same for `status`."""

import json
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TextIO

LINE_S = 15.0  # between two lines, where there is no terminal
NOTE_S = 5.0  # between two notes


class Progress:
    """How far a long piece of work is, its rate and the time left.

    Redrawn in place on a terminal (the launcher passes on whether there is one), else a line every `LINE_S`.
    Several threads may advance it.
    """

    def __init__(
        self, task: str, total: float, noun: str, start: float = 0, show: bool = True, note: Path | None = None
    ) -> None:
        """Begin to count.

        Args:
            start: What was done before.
            show: Whether there is a line.
            note: The file in which `status` finds the same: {"done", "total", "noun", "left_s", "time"}, the last in
                seconds since the epoch.
        """
        self.task, self.total, self.noun, self.show, self.note = task, total, noun, show, note
        self.done, self.start, self.began = start, start, time.monotonic()
        self.redraw = terminal_width() is not None
        self.shown = self.began if not self.redraw else 0.0
        self.lock = threading.Lock()
        self._leave(self.began)

    def advance(self, count: float = 1, note: str = "") -> None:
        """Count `count` more done; `note` follows the rate."""
        with self.lock:
            self.done += count
            now = time.monotonic()
            if self.show and now - self.shown >= (0.2 if self.redraw else LINE_S):
                self.shown = now
                self._draw(now - self.began, note)
            if now - self.noted >= NOTE_S:
                self._leave(now)

    def close(self) -> None:
        """Take the line off the terminal."""
        self._leave(time.monotonic())
        if self.show and self.redraw:
            print("\r\x1b[2K", end="", flush=True)

    def _left_s(self, rate: float) -> float | None:
        return (self.total - self.done) / rate if rate else None

    def _leave(self, now: float) -> None:
        """Write the note; where it cannot be written the work goes on."""
        self.noted = now
        if self.note is None:
            return
        left_s = self._left_s((self.done - self.start) / max(now - self.began, 1e-9))
        told = {"done": self.done, "total": self.total, "noun": self.noun, "left_s": left_s, "time": time.time()}
        with suppress(OSError):
            self.note.parent.mkdir(parents=True, exist_ok=True)
            self.note.write_text(json.dumps(told), "ascii")

    def _draw(self, elapsed_s: float, note: str) -> None:
        rate = (self.done - self.start) / max(elapsed_s, 1e-9)
        left = "?" if (left_s := self._left_s(rate)) is None else clock(left_s)
        share = f"{100 * self.done / self.total:.0f} %" if self.total else ""
        amount = f"{self.done:,.0f}/{self.total:,.0f} {self.noun}"
        line = f"{self.task}  {amount}  {share}  {rate:,.1f}/s  {left} left  {note}"
        if self.redraw:
            print(f"\r\x1b[2K{line[: (terminal_width() or 80) - 1]}", end="", flush=True)
        else:
            print(line, flush=True)


def tell(text: str, stream: TextIO | None = None, end: str = "\n") -> None:
    """Print to standard output, or to `stream`; what cannot be written (a full disk) is lost, and the work goes on."""
    stream = stream or sys.stdout
    try:
        print(text, end=end, file=stream, flush=True)
    except (OSError, ValueError):
        drop_unwritten(stream)


def drop_unwritten(stream: TextIO) -> None:
    """Forget what a stream could not write: at the end of the process it would change its exit status."""
    with suppress(OSError, ValueError, AttributeError):
        kept, nowhere = os.dup(stream.fileno()), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        with suppress(OSError, ValueError):
            stream.flush()
        os.dup2(kept, stream.fileno())
        os.close(kept)
        os.close(nowhere)


def clock(seconds: float) -> str:
    """Return seconds as 1:05 or 2:03:04."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def terminal_width() -> int | None:
    """Return the width of the terminal that this process, or its launcher, writes to, or null where it is none."""
    width = os.environ.get("PIPELINE_TERMINAL_WIDTH")
    if width:
        return int(width)
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError):
        return None
