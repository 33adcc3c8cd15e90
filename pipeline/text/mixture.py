"""Mixtures of several sources of samples: settings that say in which shares, and which sample is from which source.

Sample i of training is a function of i: which source it is from, and how many samples of that source come before it.
Every source has its share of the first n samples to within one, for every n of a phase; see `apportion`.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal, localcontext
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.errors import ConfigError
from pipeline.settings import Choice, Settings, nearest

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Integers = npt.NDArray[np.int64]

DIGITS = 30  # of a weight under a temperature; decimal arithmetic is the same on every machine

Share = Annotated[float, Field(ge=0)]


class Weights(Choice):
    """Every source has its weight: its share of the samples is that over the sum of all; 0 leaves it out."""

    kind: Literal["weights"] = "weights"
    weights: dict[str, Share] = Field(min_length=1)

    @model_validator(mode="after")
    def _any_weight(self) -> Self:
        _refuse_zeros(self.weights)
        return self

    def shares(self, sizes: Mapping[str, int]) -> list[Fraction]:
        """Return the weights of the sources, in the order of `sizes`."""
        return [Fraction(repr(self.weights[name])) for name in sizes]


class Epochs(Choice):
    """Every source is gone through so often as it says, all in the same time; 0 leaves one out."""

    kind: Literal["epochs"] = "epochs"
    epochs: dict[str, Share] = Field(min_length=1)

    @model_validator(mode="after")
    def _any_epoch(self) -> Self:
        _refuse_zeros(self.epochs)
        return self

    def shares(self, sizes: Mapping[str, int]) -> list[Fraction]:
        """Return epochs times size of the sources, in the order of `sizes`."""
        return [Fraction(repr(self.epochs[name])) * size for name, size in sizes.items()]


class Temperature(Choice):
    """Shares go by size ** (1 / temperature): 1 is by size, more evens them out (Devlin et al. 2019, multilingual)."""

    kind: Literal["temperature"] = "temperature"
    temperature: float = Field(default=1.0, ge=0.01)

    def shares(self, sizes: Mapping[str, int]) -> list[Fraction]:
        """Return the power of each size, in the order of `sizes`."""
        if self.temperature == 1:
            return [Fraction(size) for size in sizes.values()]
        with localcontext() as context:
            context.prec = DIGITS
            power = 1 / Decimal(repr(self.temperature))
            return [Fraction(Decimal(size) ** power) for size in sizes.values()]


AnyShares = Annotated[Weights | Epochs | Temperature, Field(discriminator="kind")]


class Phase(Settings):
    """A stretch of training with its own shares.

    Attributes:
        tokens: How long it is, in training tokens; null for the last one, which has no end.
    """

    tokens: int | None = Field(default=None, ge=1, le=10**18)
    mixture: AnyShares


class Phases(Choice):
    """One mixture after another. Every source goes on where it was: nothing is seen again before its epoch ends."""

    kind: Literal["phases"] = "phases"
    phases: tuple[Phase, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _only_the_last_has_no_end(self) -> Self:
        for number, phase in enumerate(self.phases[:-1]):
            if phase.tokens is None:
                raise ValueError(f"phase {number} has no tokens and is not the last; say how long it is")
        if self.phases[-1].tokens is not None:
            raise ValueError("the last phase lasts until training ends; leave its tokens null")
        return self


AnyMixture = Annotated[Weights | Epochs | Temperature | Phases, Field(discriminator="kind")]


def check_names(mixture: AnyMixture, known: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (path within the mixture, problem) for every source that it names and is not known, or does not name."""
    for path, _, shares in _stretches(mixture):
        named = getattr(shares, shares.kind)
        if not isinstance(named, dict):
            continue
        for name in named:
            if name not in known:
                yield f"{path}{shares.kind}.{name}", f"no tokens are called '{name}'{nearest(name, list(known))}"
        for name in known:
            if name not in named:
                yield f"{path}{shares.kind}", f"says nothing of '{name}'; add it, with 0 to leave it out"


def make_mixer(mixture: AnyMixture, sizes: Mapping[str, int], seq_len: int) -> "Mixer":
    """Return the mixer of sources with so many samples of `seq_len` tokens; a phase is rounded up to whole samples.

    Raises:
        ConfigError: If the mixture and the sources do not go together.
    """
    from pipeline.text.apportion import TooRareError

    problems = [f"mixture.{path}: {problem}" for path, problem in check_names(mixture, list(sizes))]
    if problems:
        raise ConfigError(*problems)
    tokens, stretches = 0, []
    for path, length, shares in _stretches(mixture):
        begin = -(-tokens // seq_len)
        weights = shares.shares(sizes)
        try:
            stretches.append((begin, _Mixing(weights)))
        except TooRareError as error:
            rare = error.source
            raise ConfigError(
                f"mixture.{path}{shares.kind}: '{list(sizes)[rare]}' would be one sample in "
                f"{int(sum(weights) / weights[rare]):,}, too few to be spread evenly; give it more, or leave it out"
            ) from None
        tokens += length or 0
    return Mixer(len(sizes), stretches)


class Mixer:
    """Which source every sample is from.

    Args:
        stretches: (first sample, how the samples from there on are shared out), in their order.
    """

    def __init__(self, num_sources: int, stretches: "Sequence[tuple[int, _Mixing]]") -> None:
        self.num_sources = num_sources
        self._begins = [begin for begin, _ in stretches]
        self._mixings = [mixing for _, mixing in stretches]
        self._bases = [[0] * num_sources]  # samples of each source before each stretch
        for number, (first, last) in enumerate(pairwise(self._begins)):
            counts = self._mixings[number].counts(last - first, num_sources)
            self._bases.append([base + count for base, count in zip(self._bases[-1], counts, strict=True)])

    def pick(self, samples: "Integers") -> "tuple[Integers, Integers]":
        """Return, for each sample, (its source, how many samples of that source come before it); int64 [samples]."""
        import numpy as np

        sources, numbers = np.empty_like(samples), np.empty_like(samples)
        stretches = np.searchsorted(self._begins, samples, side="right") - 1
        for stretch in np.unique(stretches).tolist():
            mine = slice(None) if len(self._begins) == 1 else np.flatnonzero(stretches == stretch)
            found, before = self._mixings[stretch].pick(samples[mine] - self._begins[stretch])
            sources[mine], numbers[mine] = found, before + np.array(self._bases[stretch])[found]
        return sources, numbers

    def place(self, source: int, number: int) -> int | None:
        """Return which sample is a source's sample `number` (from 0): the inverse of `pick`; None if there is none."""
        stretch = bisect_right([base[source] for base in self._bases], number) - 1
        place = self._mixings[stretch].place(source, number - self._bases[stretch][source])
        return None if place is None else self._begins[stretch] + place

    def counts(self, samples: int) -> list[int]:
        """Return how many of the first `samples` are from each source."""
        stretch = bisect_right(self._begins, samples) - 1
        counts = self._mixings[stretch].counts(samples - self._begins[stretch], self.num_sources)
        return [base + count for base, count in zip(self._bases[stretch], counts, strict=True)]


class _Mixing:
    """One stretch of samples, in which every source has its share; those with none take no part."""

    def __init__(self, shares: Sequence[Fraction]) -> None:
        from pipeline.text.apportion import Apportionment, TooRareError, whole

        self.sources = [source for source, share in enumerate(shares) if share > 0]
        try:
            self._order = Apportionment(whole([shares[source] for source in self.sources]))
        except TooRareError as error:
            raise TooRareError(self.sources[error.source]) from None

    def pick(self, samples: "Integers") -> "tuple[Integers, Integers]":
        import numpy as np

        if len(self.sources) == 1:
            return np.full_like(samples, self.sources[0]), samples
        found, before = self._order.pick(samples)
        return np.array(self.sources, np.int64)[found], before

    def place(self, source: int, number: int) -> int | None:
        if source not in self.sources:
            return None
        return number if len(self.sources) == 1 else self._order.place(self.sources.index(source), number)

    def counts(self, samples: int, num_sources: int) -> list[int]:
        counts = [0] * num_sources
        taken = [samples] if len(self.sources) == 1 else self._order.counts(samples)
        for source, count in zip(self.sources, taken, strict=True):
            counts[source] = count
        return counts


def _stretches(mixture: AnyMixture) -> Iterator[tuple[str, int | None, Weights | Epochs | Temperature]]:
    """Yield (path within the settings, tokens, shares) of each phase."""
    if not isinstance(mixture, Phases):
        yield "", None, mixture
        return
    for number, phase in enumerate(mixture.phases):
        yield f"phases.{number}.mixture.", phase.tokens, phase.mixture


def _refuse_zeros(shares: Mapping[str, float]) -> None:
    if not any(shares.values()):
        raise ValueError(f"wanted one that is not 0, found none among {', '.join(shares)}; give one more")
