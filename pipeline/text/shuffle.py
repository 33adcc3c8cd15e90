"""Shuffling as mathematics: a keyed pseudorandom permutation of range(size), with no table, and its inverse."""

from collections.abc import Callable, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

ROUNDS = 6
FEW = 16  # numbers: fewer are faster one by one than as an array
WORD = 2**64 - 1
FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


@overload
def permute(index: int, size: int, seed: int, epoch: int) -> int: ...
@overload
def permute(index: Indices, size: int, seed: int, epoch: int) -> Indices: ...
def permute(index: int | Indices, size: int, seed: int, epoch: int) -> int | Indices:
    """Return where `index` goes in a pseudorandom permutation of range(size), in constant memory.

    A balanced Feistel network of six rounds over the smallest even number of bits that holds `size`, with cycle
    walking (Black and Rogaway 2002): values that fall outside are sent round again.

    Args:
        index: A number, or an array of them, in [0, size).
        size: At most 2**62.
    """
    return _walk(_forward, index, size, _keys(seed, epoch))


@overload
def unpermute(place: int, size: int, seed: int, epoch: int) -> int: ...
@overload
def unpermute(place: Indices, size: int, seed: int, epoch: int) -> Indices: ...
def unpermute(place: int | Indices, size: int, seed: int, epoch: int) -> int | Indices:
    """Return which index `permute` sends to `place`: its inverse, for the same size, seed and epoch."""
    return _walk(_backward, place, size, _keys(seed, epoch)[::-1])


def _keys(seed: int, epoch: int) -> list[int]:
    key = 0x9E3779B97F4A7C15 * (1 + seed) + 0xD1342543DE82EF95 * (1 + epoch)
    return [(key + (number << 56)) & WORD for number in range(ROUNDS)]


def _walk(step: Callable[..., Any], index: int | Indices, size: int, keys: Sequence[int]) -> int | Indices:
    """Apply `step` until the result lies in range(size), and again only to those elements that do not."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    if not isinstance(index, np.ndarray):
        value: int = step(int(index), half, keys, _mix)
        while value >= size:
            value = step(value, half, keys, _mix)
        return value
    if len(index) < FEW:
        return np.array([_walk(step, value, size, keys) for value in index.tolist()], np.int64)
    values: npt.NDArray[np.uint64] = step(index.astype(np.uint64), half, keys, _mix_array)
    outside = np.flatnonzero(values >= size)
    while len(outside):
        values[outside] = step(values[outside], half, keys, _mix_array)
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def _forward(value: Any, half: int, keys: Sequence[int], mix: Callable[[Any, int], Any]) -> Any:
    mask = (1 << half) - 1
    left, right = value >> half, value & mask
    for key in keys:
        left, right = right, left ^ (mix(right, key) & mask)
    return (left << half) | right


def _backward(value: Any, half: int, keys: Sequence[int], mix: Callable[[Any, int], Any]) -> Any:
    mask = (1 << half) - 1
    left, right = value >> half, value & mask
    for key in keys:
        left, right = right ^ (mix(left, key) & mask), left
    return (left << half) | right


def _mix(value: int, key: int) -> int:
    """Mix 64 bits: the finalizer of SplitMix64 (Steele et al. 2014), twice, over the value and its key."""
    x = (value + key) & WORD
    for _ in range(2):
        x = ((x ^ (x >> 30)) * FACTORS[0]) & WORD
        x = ((x ^ (x >> 27)) * FACTORS[1]) & WORD
        x ^= x >> 31
    return x


def _mix_array(values: npt.NDArray[np.uint64], key: int) -> npt.NDArray[np.uint64]:
    """Mix as `_mix` does; numpy's unsigned arithmetic wraps around by itself."""
    x = values + np.uint64(key)
    shifted = np.empty_like(x)
    for _ in range(2):
        for shift, factor in ((30, FACTORS[0]), (27, FACTORS[1]), (31, None)):
            np.right_shift(x, np.uint64(shift), out=shifted)
            x ^= shifted
            if factor is not None:
                x *= np.uint64(factor)
    return x
