"""Many texts in one buffer, as Arrow holds them, so that no text needs an object of its own."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Texts:
    """Texts one behind another.

    Attributes:
        data: Their UTF-8; uint8.
        starts: Where each begins in `data`, from 0, and where the last one ends; int64 [texts + 1].
    """

    data: npt.NDArray[np.uint8]
    starts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, texts: Sequence[str] | Sequence[bytes]) -> Self:
        """Put texts into one buffer."""
        raw = [text.encode() if isinstance(text, str) else text for text in texts]
        return cls(np.frombuffer(b"".join(raw), np.uint8), np.cumsum([0, *map(len, raw)], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __iter__(self) -> Iterator[memoryview]:
        """Yield each text as a view of the buffer."""
        view = self.data.data
        return (view[start:stop] for start, stop in pairwise(self.starts.tolist()))

    def text(self, number: int) -> str:
        """Return one text."""
        return self.data[self.starts[number] : self.starts[number + 1]].tobytes().decode()

    def part(self, first: int, last: int) -> "Texts":
        """Return texts [first, last)."""
        starts = self.starts[first : last + 1]
        return Texts(self.data[starts[0] : starts[-1]], starts - starts[0])

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """UTF-8 bytes of each text."""
        return np.diff(self.starts)
