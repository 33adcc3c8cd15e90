"""Random numbers for one example, from its seed alone.

Note: only the raw bits of numpy's Philox are used. numpy promises that these never change (NEP 19), but not what its
generators make of them, and an example must be the same on every machine and in every year.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

MANTISSA = 53  # bits of a float64


class Draws:
    """A stream of random numbers: Philox, a counter with a key (Salmon et al. 2011).

    Args:
        seed: The key, below 2**64.
    """

    def __init__(self, seed: int) -> None:
        self._bits = np.random.Philox(key=seed)

    def uniform(self, count: int) -> npt.NDArray[Any]:
        """Return numbers of [0, 1)."""
        return (self._raw(count) >> np.uint64(64 - MANTISSA)) * 2.0**-MANTISSA

    def below(self, bound: int, count: int) -> npt.NDArray[np.int64]:
        """Return whole numbers of [0, bound), `bound` below 2**32."""
        return (self.uniform(count) * bound).astype(np.int64)

    def one_below(self, bound: int) -> int:
        """Return one whole number of [0, bound)."""
        return int(self.below(bound, 1)[0])

    def chance(self, probability: float) -> bool:
        """Return true with a probability."""
        return bool(self.uniform(1)[0] < probability)

    def order(self, count: int) -> npt.NDArray[np.int64]:
        """Return range(count) in random order."""
        return np.argsort(self._raw(count), kind="stable")

    def _raw(self, count: int) -> npt.NDArray[Any]:
        return self._bits.random_raw(count)
