"""One line that says how far a long piece of work is."""

import os
import sys
import threading
import time


class Progress:
    """How far a long piece of work is, its rate and the time left.

    Redrawn in place on a terminal (the launcher passes on whether there is one), else a line every 15 seconds.
    Several threads may advance it.
    """

    def __init__(self, task: str, total: float, noun: str, start: float = 0, show: bool = True) -> None:
        self.task, self.total, self.noun, self.show = task, total, noun, show
        self.done, self.start, self.began = start, start, time.monotonic()
        self.redraw = terminal_width() is not None
        self.shown = self.began if not self.redraw else 0.0
        self.lock = threading.Lock()

    def advance(self, count: float = 1, note: str = "") -> None:
        """Count `count` more done; `note` follows the rate."""
        with self.lock:
            self.done += count
            now = time.monotonic()
            if self.show and now - self.shown >= (0.2 if self.redraw else 15.0):
                self.shown = now
                self._draw(now - self.began, note)

    def close(self) -> None:
        """Take the line off the terminal."""
        if self.show and self.redraw:
            print("\r\x1b[2K", end="", flush=True)

    def _draw(self, elapsed_s: float, note: str) -> None:
        rate = (self.done - self.start) / max(elapsed_s, 1e-9)
        left = clock((self.total - self.done) / rate) if rate else "?"
        share = f"{100 * self.done / self.total:.0f} %" if self.total else ""
        amount = f"{self.done:,.0f}/{self.total:,.0f} {self.noun}"
        line = f"{self.task}  {amount}  {share}  {rate:,.1f}/s  {left} left  {note}"
        if self.redraw:
            print(f"\r\x1b[2K{line[: (terminal_width() or 80) - 1]}", end="", flush=True)
        else:
            print(line, flush=True)


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
