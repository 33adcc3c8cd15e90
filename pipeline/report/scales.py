"""The arithmetic under charts: round ticks, ranges that a spike does not ruin, thinning and smoothing."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from pipeline.report.numerals import THIN

Point = tuple[float, float]

MAX_POINTS = 600
WINDOW = 250  # points on each side that an average looks at; of more, only every other, every third, …
SPIKE = 8.0  # a range this many times wider than that of most values is one that outliers make


def ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """Return about `count` round numbers (steps of 1, 2 or 5 times a power of ten) from `low` to `high`.

    Args:
        whole: Give whole numbers only.
    """
    step = tick_step(low, high, count)
    if whole:
        step = max(1.0, step)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [_exact(number * step) for number in range(first, last + 1)]


def tick_step(low: float, high: float, count: int = 5) -> float:
    """Return the round step that cuts `low` to `high` into about `count` pieces."""
    rough = (high - low) / max(1, count) or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten from `low` to `high`, with 2 and 5 times each where there would be few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if math.log10(high / low) >= 3 else (1, 2, 5)
    return [f * 10.0**p for p in powers for f in factors if low * (1 - 1e-9) <= f * 10.0**p <= high * (1 + 1e-9)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """Return the labels of ticks, all with the same prefix or power and as many digits as tell them apart."""
    largest = max(map(abs, values), default=0.0)
    steps = [b - a for a, b in pairwise(values) if b > a]
    step = min(steps, default=largest) or 1.0
    if largest and largest < 2e-3:
        power = math.floor(math.log10(largest) + 1e-9)
        return [f"{_fixed(v / 10**power, step / 10**power)}e{power}" if v else "0" for v in values]
    for size, prefix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if largest >= size:
            size = min(size, 1e3) if prefix == "k" else size
            return [f"{_fixed(v / size, step / size)}{THIN}{prefix}" if v else "0" for v in values]
    return [_fixed(v, step) if v else "0" for v in values]


def value_ticks(values: Sequence[float], from_zero: bool = False) -> list[float]:
    """Return round ticks that span `values`, the first and the last being the ends of the axis.

    Where a few values are so far out that nothing could be seen of the others, they lie beyond the ends.
    """
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    near, far = quantile(ordered, 0.02), quantile(ordered, 0.98)
    most = far - near
    if most > 0 and high - low > SPIKE * most:
        low, high = max(low, near - most), min(high, far + most)
    if from_zero:
        low, high = min(0.0, low), max(0.0, high)
    if high == low:
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    step = tick_step(low, high)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [_exact(number * step) for number in range(first, last + 1)]


def quantile(ordered: Sequence[float], share: float) -> float:
    """Return the value below which `share` of some sorted values lie."""
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """Return at most `limit` of the points: both ends, and of each stretch between the lowest and the highest."""
    if len(points) <= limit:
        return list(points)
    inner, stretches = points[1:-1], limit // 2 - 1
    kept = [points[0]]
    for number in range(stretches):
        stretch = inner[number * len(inner) // stretches : (number + 1) * len(inner) // stretches]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return [*kept, points[-1]]


def smooth(points: Sequence[Point], share: float = 0.04, limit: int = MAX_POINTS // 2) -> list[Point]:
    """Return a moving average at no more than `limit` of the points.

    It is the mean of the middle half of the values in a centred window of `share` of all points, which one spike
    cannot move. At the start, where curves are steep, the window narrows; at the end it loses its second half.
    """
    last = len(points) - 1
    places = range(last + 1) if last < limit else sorted({round(n * last / (limit - 1)) for n in range(limit)})
    half = max(4, int(len(points) * share / 2))  # of fewer values, the middle half is not safe from a spike
    smoothed = []
    for place in places:
        reach = min(half, place)
        stride = 1 + reach // WINDOW
        window = sorted(y for _, y in points[place - reach : place + reach + 1 : stride])
        cut = len(window) // 4
        smoothed.append((points[place][0], math.fsum(window[cut : len(window) - cut]) / (len(window) - 2 * cut)))
    return smoothed


def log_bins(counts: Mapping[int, int], most: int = 36) -> list[tuple[int, int, int]]:
    """Sort things of whole sizes into at most about `most` bins whose edges grow by one factor.

    Args:
        counts: How many things there are of each size; sizes under 1 go into the first bin.

    Returns:
        (first size, size after the last, how many things) of each bin, with no gaps.
    """
    low, high = max(1, min(counts)), max(1, max(counts)) + 1
    bins = min(most, max(1, high - low))
    edges = sorted({round(low * (high / low) ** (number / bins)) for number in range(bins + 1)})
    sums = [0] * (len(edges) - 1)
    ordered, place = sorted(counts), 0
    for length in ordered:
        while place < len(sums) - 1 and length >= edges[place + 1]:
            place += 1
        sums[place] += counts[length]
    return list(zip(edges, edges[1:], sums, strict=False))


def _fixed(value: float, step: float) -> str:
    """Return a number with as many decimals as its tick step needs."""
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:,.{decimals}f}"


def _exact(value: float) -> float:
    """Return a number without the dust of binary fractions: 0.30000000000000004 becomes 0.3."""
    return float(f"{value:.12g}")
