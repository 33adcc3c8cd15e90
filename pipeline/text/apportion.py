"""Which of several sources each sample of an endless row is from, so that each has its share to within one, always.

After n samples a source of share w has been taken c times with |c - n w| < 1, for every n, every number of sources and
all shares. The j-th sample of a source (j from 1) must lie in its window of places
[floor((j - 1) / w), ceil(j / w)), and any order with every sample in its window has the property (P-fairness; Baruah,
Cohen, Plaxton and Varvel 1996). Such an order exists: the samples whose whole windows lie in [a, b) are at most
sum(floor(w b) - ceil(w a)) <= b - a, which is Hall's condition for windows; and handing each place to the open window
that closes first (earliest deadline first) finds one.

That order is made anew for any block of places, with nothing stored between blocks:

* The state at a block's border says of each source whether it is one ahead: floor(w s) or that plus one were taken.
  Going by deadlines, as many are ahead as the windows that follow demand, always those whose window opened first; then
  others are, in that order, until the sum is s. If any state can be gone on from and come to, this one can: exchanging
  a source that is ahead for one with an earlier opening mends no less of what follows and allows more before.
* A block is long enough for every source to have a sample due in it, so states of neighbouring borders fit together:
  Hall's condition within the block is then that of its two borders.
* Sources that are too rare for that (under 1 in `LONGEST_BLOCK`) form a group of their own, which takes the places
  where round(share * n) steps. The steps are so even that any stretch [a, b) has more than share * (b - a) - 1 of them,
  and as many left for the others: Hall's condition holds for both groups, in windows of true places.

Everything is exact integer arithmetic. A block depends on its first place modulo the sum of the weights only.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]

SHORTEST_BLOCK = 1 << 12  # places; a shorter one costs more per place
LONGEST_BLOCK = 1 << 17
RARE_BLOCK = 1 << 18  # places of the rare sources' group
LARGEST_SUM = 1 << 40  # of the weights: 2**40 * 2**18 still fits 64 bits
KEPT_BLOCKS = 4


@dataclass(frozen=True)
class _Block:
    """A block of a group's places.

    Attributes:
        times: Places after the block's first one.
        sources: Who has each, by number within the group.
        ranks: Which sample of that source it is, counted from floor(w * first place).
        starts, order: `order[starts[k]:starts[k + 1]]` are the indices at which source k is.
        ahead: Samples that each source is ahead at the block's beginning, 0 or 1.
    """

    times: Integers
    sources: Integers
    ranks: Integers
    starts: Integers
    order: Integers
    ahead: Integers


class _Group:
    """Sources that share places: all of them, or those that `slots` counts.

    Args:
        weights: Of the group's sources.
        total: Sum of all weights, in the group or not.
        slots: How many of the first n places are the group's.
        times: The group's places in [start, stop), less start.
    """

    def __init__(
        self,
        weights: Sequence[int],
        total: int,
        block: int,
        slots: Callable[[int], int],
        times: Callable[[int, int], Integers],
    ) -> None:
        self.weights, self.total, self.block, self.slots, self._times = list(weights), total, block, slots, times
        self._array = np.array(weights, np.int64)
        self._cached = lru_cache(KEPT_BLOCKS)(self._make)
        self._state = lru_cache(2 * KEPT_BLOCKS)(self._ahead)

    def at(self, start: int) -> tuple[_Block, Integers]:
        """Return the block that begins at `start`, and floor(w * start) of each source."""
        return self._cached(start % self.total), np.array([start * w // self.total for w in self.weights], np.int64)

    def place(self, source: int, rank: int) -> int:
        """Return the place of a source's sample number `rank` (from 0)."""
        weight = self.weights[source]
        opens = rank * self.total // weight
        start = opens - opens % self.block
        while True:
            block, done = self.at(start)
            mine = block.order[block.starts[source] : block.starts[source + 1]]
            number = rank - int(done[source] + block.ahead[source])
            if 0 <= number < len(mine):
                return start + int(block.times[mine[number]])
            start += self.block  # a window may reach into the next block

    def _windows(self, rest: int) -> tuple[Integers, Integers, Integers, Integers]:
        """Return (source, number from 1, opening, end) of all windows that open in the block; times from its start.

        `rest` is the block's first place modulo the sum of the weights.
        """
        over = np.array([rest * w % self.total for w in self.weights], np.int64)  # numerators of the fractions of w s
        counts = (self.block * self._array + over) // self.total + 1
        sources = np.repeat(np.arange(len(counts)), counts)
        numbers = np.arange(1, len(sources) + 1) - np.repeat(np.cumsum(counts) - counts, counts)
        ends = numbers * self.total - over[sources]
        weights = self._array[sources]
        return sources, numbers, (ends - self.total) // weights, -(-ends // weights)

    def _ahead(self, rest: int) -> Integers:
        """Return which sources are one ahead at a border, as zeros and ones."""
        sources, numbers, opens, ends = self._windows(rest)
        lacking = self.slots(rest) - sum(rest * w // self.total for w in self.weights)
        ahead = np.zeros(len(self.weights), np.int64)
        if not lacking:
            return ahead
        begun = np.flatnonzero((numbers == 1) & (opens < 0))  # who may be ahead: its window is open at the border
        due = np.sort(ends[ends <= self.block])
        demand = np.arange(1, len(due) + 1) - np.searchsorted(self._times(rest, rest + self.block), due)
        waiting = sorted((int(ends[i]), int(opens[i]), int(sources[i])) for i in begun)
        ready: list[tuple[int, int]] = []
        for number, (end, opened, source) in enumerate(waiting):
            heapq.heappush(ready, (opened, source))
            until = waiting[number + 1][0] if number + 1 < len(waiting) else self.block + 1
            span = demand[np.searchsorted(due, end) : np.searchsorted(due, until)]
            for _ in range(int(span.max(initial=0)) - int(ahead.sum())):
                ahead[heapq.heappop(ready)[1]] = 1
        while ahead.sum() < lacking:
            ahead[heapq.heappop(ready)[1]] = 1
        return ahead

    def _make(self, rest: int) -> _Block:
        sources, numbers, opens, ends = self._windows(rest)
        ahead, after = self._state(rest), self._state((rest + self.block) % self.total)
        until = (self.block * self._array + np.array([rest * w % self.total for w in self.weights])) // self.total
        chosen = (numbers > ahead[sources]) & (numbers <= (until + after)[sources])
        times = self._times(rest, rest + self.block)
        taken = _earliest_deadline(np.searchsorted(times, opens[chosen]), ends[chosen], sources[chosen], len(times))
        order = np.argsort(taken, kind="stable")
        counts = np.bincount(taken, minlength=len(self.weights))
        starts = np.concatenate([[0], np.cumsum(counts)])
        ranks = np.empty(len(taken), np.int64)
        ranks[order] = np.arange(len(taken)) - np.repeat(starts[:-1] - ahead, counts)
        return _Block(times, taken, ranks, starts, order, ahead)


def _earliest_deadline(opens: Integers, ends: Integers, sources: Integers, num_slots: int) -> Integers:
    """Return the source of each slot: of the windows that are open, the one that ends first."""
    by_opening = np.argsort(opens, kind="stable")
    width = int(sources.max(initial=0)) + 1
    keys = (ends * width + sources)[by_opening].tolist()
    bounds = np.searchsorted(opens[by_opening], np.arange(num_slots), side="right").tolist()
    taken: list[int] = []
    ready: list[int] = []
    begin = 0
    push, pop = heapq.heappush, heapq.heappop
    for bound in bounds:
        while begin < bound:
            push(ready, keys[begin])
            begin += 1
        taken.append(pop(ready))
    return np.array(taken, np.int64) % width


class TooRareError(Exception):
    """A source, by number, is so rare that its block would be too long."""

    def __init__(self, source: int) -> None:
        super().__init__(source)
        self.source = source


class Apportionment:
    """The order described above, of sources with given weights.

    Args:
        weights: Whole numbers from 1, with a sum of at most `LARGEST_SUM`; see `whole`.

    Raises:
        TooRareError: If a source is under 1 in 2**18 of the rare ones, taken together.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        self.total = total = sum(weights)
        self._rare_weight = 0
        rare = [k for k, weight in enumerate(weights) if weight * LONGEST_BLOCK < total]
        often = [k for k in range(len(weights)) if k not in set(rare)]
        self._members = [np.array(often, np.int64), np.array(rare, np.int64)]
        self._groups = [self._group([weights[k] for k in often], lambda n: n - self._rare(n), self._often_times)]
        if rare:
            self._rare_weight = sum(weights[k] for k in rare)
            self._groups.append(self._group([weights[k] for k in rare], self._rare, self._rare_times))
            if self._groups[1].block * self._rare_weight > RARE_BLOCK * total:
                raise TooRareError(min(rare, key=lambda k: weights[k]))

    def _group(self, weights: list[int], slots: Callable[[int], int], times: Callable[[int, int], Integers]) -> _Group:
        shortest = -(-self.total // min(weights))
        block = max(SHORTEST_BLOCK, 1 << (shortest - 1).bit_length())
        if self.total <= LONGEST_BLOCK:
            block = self.total * -(-SHORTEST_BLOCK // self.total)  # then all blocks are alike
        return _Group(weights, self.total, block, slots, times)

    def pick(self, samples: Integers) -> tuple[Integers, Integers]:
        """Return, for each sample, (its source, how many samples of that source come before it)."""
        sources, ranks = np.empty(len(samples), np.int64), np.empty(len(samples), np.int64)
        group = self._groups[0]
        blocks = samples // group.block
        for number in np.unique(blocks):
            mine = np.flatnonzero(blocks == number)
            start = int(number) * group.block
            block, done = group.at(start)
            times = samples[mine] - start
            slots = np.minimum(np.searchsorted(block.times, times), len(block.times) - 1)
            found = block.sources[slots]
            sources[mine], ranks[mine] = self._members[0][found], done[found] + block.ranks[slots]
            for i in mine[block.times[slots] != times].tolist():
                sources[i], ranks[i] = self._pick_rare(int(samples[i]))
        return sources, ranks

    def _pick_rare(self, sample: int) -> tuple[int, int]:
        group = self._groups[1]
        start = sample - sample % group.block
        block, done = group.at(start)
        slot = self._rare(sample) - self._rare(start)
        source = int(block.sources[slot])
        return int(self._members[1][source]), int(done[source] + block.ranks[slot])

    def place(self, source: int, rank: int) -> int:
        """Return which sample is a source's number `rank` (from 0): the inverse of `pick`."""
        for members, group in zip(self._members, self._groups, strict=False):
            found = np.flatnonzero(members == source)
            if len(found):
                return group.place(int(found[0]), rank)
        raise IndexError(source)

    def counts(self, samples: int) -> list[int]:
        """Return how many of the first `samples` are from each source."""
        counts = [0] * sum(map(len, self._members))
        for members, group in zip(self._members, self._groups, strict=False):
            start = samples - samples % group.block
            block, done = group.at(start)
            before = np.searchsorted(block.times, samples - start)
            taken = np.bincount(block.sources[:before], minlength=len(members))
            for source, count in zip(members, done + block.ahead + taken, strict=True):
                counts[source] = int(count)
        return counts

    def _rare(self, samples: int) -> int:
        """Return how many of the first `samples` are from rare sources: their share of it, rounded."""
        return (2 * samples * self._rare_weight + self.total) // (2 * self.total)

    def _rare_times(self, start: int, stop: int) -> Integers:
        """Return at which places after `start`, before `stop`, that number steps."""
        if not self._rare_weight:
            return np.empty(0, np.int64)
        first, last = self._rare(start), self._rare(stop)
        whole = 2 * self._rare_weight  # step q is at ceil((2 q + 1) total / whole) - 1
        base = (2 * first + 1) * self.total
        rest = base % whole + 2 * self.total * np.arange(last - first)
        return base // whole - start + -(-rest // whole) - 1

    def _often_times(self, start: int, stop: int) -> Integers:
        return np.delete(np.arange(stop - start), self._rare_times(start, stop))


def whole(weights: Sequence[Fraction]) -> list[int]:
    """Return whole numbers in the same ratios: exactly if their sum stays within `LARGEST_SUM`, else the nearest."""
    scale = math.lcm(*(weight.denominator for weight in weights))
    numbers = [int(weight * scale) for weight in weights]
    numbers = [number // math.gcd(*numbers) for number in numbers]
    total = sum(numbers)
    if total <= LARGEST_SUM:
        return numbers
    room = LARGEST_SUM - len(numbers)
    return [max(1, number * room // total) for number in numbers]
