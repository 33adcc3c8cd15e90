"""The order of samples is a permutation, never changes, and passes for a random one."""

import itertools
import math

import numpy as np
import pytest

from pipeline.text.shuffle import permute, unpermute

# A random order fails a test with this probability; the tests' seeds are fixed, so they fail always or never.
CHANCE = 1e-4
# Quantiles of the standard normal distribution at 1 - CHANCE and 1 - CHANCE / 2
ONE_SIDED, TWO_SIDED = 3.719, 3.891


@pytest.mark.parametrize("size", [*range(1, 301), 4096, 10_007])
def test_permute_is_a_permutation_and_unpermute_its_inverse(size):
    index = np.arange(size)
    for seed, epoch in itertools.product((0, 1), (0, 1)):
        order = permute(index, size, seed, epoch)
        assert (np.sort(order) == index).all()
        assert (unpermute(order, size, seed, epoch) == index).all()
        assert (permute(unpermute(index, size, seed, epoch), size, seed, epoch) == index).all()


@pytest.mark.parametrize("size", [1, 2, 3, 300, 10**12, 2**40 + 1, 2**62])
def test_numbers_and_arrays_agree(size):
    index = np.array(sorted({i * (size - 1) // 49 for i in range(50)}))
    order = permute(index, size, 7, 3)
    assert order.dtype == np.int64
    assert [permute(int(i), size, 7, 3) for i in index] == order.tolist()
    assert [unpermute(int(i), size, 7, 3) for i in index] == unpermute(index, size, 7, 3).tolist()
    assert (unpermute(order, size, 7, 3) == index).all()
    assert order.min() >= 0
    assert order.max() < size


def test_the_argument_is_left_as_it_was():
    index = np.arange(10)
    permute(index, 10, 0, 0)
    assert (index == np.arange(10)).all()


def test_permute_never_changes_between_versions():
    # a run that is continued with a newer version must see the same data
    assert [permute(i, 10, 0, 0) for i in range(10)] == [2, 4, 0, 7, 3, 5, 9, 1, 6, 8]
    assert [permute(i, 10**12, 7, 3) for i in range(3)] == [689430165984, 231694968750, 318747310980]


def chi_square_limit(freedom: int) -> float:
    """The quantile at 1 - CHANCE of the chi-square distribution (Wilson and Hilferty 1931)."""
    step = 2 / (9 * freedom)
    return freedom * (1 - step + ONE_SIDED * math.sqrt(step)) ** 3


def evenness(place, value, size, bins=16, repeats=False):
    """Chi-square of (bucket of the place, bucket of the value), over the limit that a random order stays under.

    `repeats` says that the values were drawn with replacement, so that a bucket may hold any number of them.
    """
    counts = np.zeros((bins, bins))
    np.add.at(counts, (place * bins // size, value * bins // size), 1)
    width = np.bincount(np.arange(size) * bins // size) / size
    expected = counts.sum(1, keepdims=True) * width
    freedom = bins * (bins - 1) if repeats else (bins - 1) ** 2
    return float(((counts - expected) ** 2 / expected).sum()) / chi_square_limit(freedom)


def correlation(first, second):
    """Correlation of two rows of numbers, over the limit that independent ones stay under."""
    return abs(float(np.corrcoef(first, second)[0, 1])) * math.sqrt(len(first)) / TWO_SIDED


def flaws(order, size):
    """All tests of one order, each over its limit: 1 or less passes."""
    place = np.arange(size)
    found = {"evenness": evenness(place, order, size), "correlation": correlation(place, order)}
    for lag in (1, 2, 3, 8, 64):
        found[f"lag {lag}"] = correlation(order[:-lag], order[lag:])
        found[f"pairs {lag}"] = evenness(order[:-lag], order[lag:], size)
    steps = np.diff(order) % size  # of a random order every step but 0 is equally likely
    found["steps"] = evenness(np.arange(size - 1), steps, size, repeats=True)
    found["low bits"] = evenness(place % 16, order % 16, 16)
    return found


def relations(first, second, size):
    """Tests of two orders that ought to have nothing to do with one another."""
    shift = (first - second) % size
    met = int((first == second).sum())  # Poisson with mean 1
    return {
        "correlation": correlation(first, second),
        "evenness": evenness(first, second, size),
        "shift": evenness(np.arange(len(shift)), shift, size, repeats=True),
        "met": met / 8,  # more than 8 happens with probability 1e-6
        "inverse": evenness(first, np.argsort(second)[: len(first)], size),
    }


SIZES = [4096, 4097, 16_384, 50_021, 131_072]


def order_of(size, seed=0, epoch=0):
    return permute(np.arange(size), size, seed, epoch)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", [0, 1, 12_345])
@pytest.mark.parametrize("epoch", [0, 1])
def test_an_order_passes_for_random(size, seed, epoch):
    found = flaws(order_of(size, seed, epoch), size)
    assert max(found.values()) < 1, found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", [0, 1, 12_345])
def test_neighbouring_epochs_and_seeds_have_nothing_in_common(size, seed):
    order = order_of(size, seed, 0)
    for other in (order_of(size, seed, 1), order_of(size, seed + 1, 0), order_of(size, seed + 1, 1)):
        found = relations(order, other, size)
        assert max(found.values()) < 1, found


BAD = {
    "identity": lambda i, size: i,
    "reversed": lambda i, size: size - 1 - i,
    "rotation": lambda i, size: (i + size // 3) % size,
    "affine": lambda i, size: (i * 2_654_435_761 + 12_345) % size,  # Knuth's multiplicative hash: looks shuffled
    "blocks": lambda i, size: i // 64 * 64 + np.argsort(order_of(64))[i % 64],  # shuffled within a buffer only
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_order_fails(name):
    size = 16_384
    order = BAD[name](np.arange(size), size)
    assert (np.sort(order) == np.arange(size)).all()
    assert max(flaws(order, size).values()) > 1


def test_orders_that_have_something_in_common_fail():
    size = 16_384
    order = order_of(size)
    for other in (order, (order + 5) % size, np.roll(order, 1), np.argsort(order)):
        found = [relations(order, other, size), relations(order[:-1], other[1:], size)]
        assert max(max(values.values()) for values in found) > 1


def test_one_round_less_than_needed_is_noticed(monkeypatch):
    """The tests see a network that is too short: two rounds leave the halves of neighbours related."""
    import pipeline.text.shuffle as shuffle

    monkeypatch.setattr(shuffle, "ROUNDS", 2)
    found = flaws(order_of(16_384), 16_384)
    assert max(found.values()) > 1
