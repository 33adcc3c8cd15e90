"""Texts on a terminal while they are made."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.models.generation.text import Text


class Stream:
    """Writes texts in their order while they are made: the first that is not finished grows, the others wait.

    What it has written is never taken back: no half character, and no end that may belong to a stop string.
    """

    def __init__(self, openings: Sequence[str], texts: Sequence[Text], write: Callable[[str], None]) -> None:
        """Write nothing yet.

        Args:
            openings: What comes before each text.
            write: Takes a piece.
        """
        self.openings, self.texts, self.write = openings, texts, write
        self.number = 0  # of the text that grows
        self.written: int | None = None  # how many of its characters; null before its opening

    def __call__(self) -> None:
        """Write what is new."""
        while self.number < len(self.texts):
            text = self.texts[self.number]
            if self.written is None:
                self.write(self.openings[self.number])
                self.written = 0
            certain = text.certain
            if len(certain) > self.written:
                self.write(certain[self.written :])
                self.written = len(certain)
            if not text.closed:
                return
            self.write("\n\n")
            self.number, self.written = self.number + 1, None


def visible(text: str) -> str:
    """Return a text in which nothing can steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def write_terminal(piece: str) -> None:
    """Print a piece at once, whatever the terminal cannot show."""
    encoding = sys.stdout.encoding or "utf-8"
    print(visible(piece).encode(encoding, "replace").decode(encoding), end="", flush=True)


def write_nowhere(piece: str) -> None:
    """Drop a piece."""
