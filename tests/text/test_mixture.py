"""Mixtures: refusals, and every source's share to within one sample at every point."""

import random
from fractions import Fraction

import numpy as np
import pytest
from pydantic import Field

import pipeline.text.apportion as apportion
from pipeline.errors import ConfigError
from pipeline.settings import Settings, decode
from pipeline.text.apportion import Apportionment, TooRareError, whole
from pipeline.text.mixture import AnyMixture, Phases, Temperature, Weights, check_names, make_mixer


class Holder(Settings):
    mixture: AnyMixture = Field(discriminator="kind")


def mixture(**data):
    return decode(Holder, {"mixture": data}).mixture


def weights_of(family, rng):
    """Weights of the kinds that are hard to share out: many alike, of two sizes, geometric, one huge one."""
    count = rng.choice([2, 3, 5, 8, 13, 26, 40, 64])
    small = 10 ** rng.uniform(-4, 0)
    return {
        "equal": lambda: [1] * count,
        "random": lambda: [rng.random() for _ in range(count)],
        "skewed": lambda: [rng.random() ** 4 for _ in range(count)],
        "geometric": lambda: [rng.uniform(0.6, 0.99) ** k for k in range(count)],
        "one huge": lambda: [1000, *(rng.random() for _ in range(count - 1))],
        "scales": lambda: [10 ** rng.uniform(-6, 0) for _ in range(count)],
        "two sizes": lambda: [rng.choice([1, small]) for _ in range(count)],
        "nearly two sizes": lambda: [rng.choice([1, small]) * rng.uniform(0.95, 1.05) for _ in range(count)],
        "decimals": lambda: [Fraction(rng.randrange(1, 100), 100) for _ in range(count)],
    }[family]()


FAMILIES = [
    "equal", "random", "skewed", "geometric", "one huge", "scales", "two sizes", "nearly two sizes", "decimals",
]  # fmt: skip


FROZEN_SHORT, FROZEN_LONG = "01020101020102010102", (2_248_384, 15_000_819_359_352)


def largest_error(weights, first, count):
    """The largest |taken - wanted|, over all sources and all n in (first, first + count]; and that ranks run on."""
    order, total = Apportionment(weights), sum(weights)
    sources, ranks = order.pick(np.arange(first, first + count))
    before = order.counts(first)
    largest = 0
    for source, weight in enumerate(weights):
        taken = np.cumsum(sources == source)
        start = before[source] * total - first * weight  # exact: times the sum of all weights
        errors = taken * total - np.arange(1, count + 1) * weight + start
        largest = max(largest, int(np.abs(errors).max()), abs(start))
        assert ranks[sources == source].tolist() == list(range(before[source], before[source] + int(taken[-1])))
    assert order.counts(first + count) == (np.bincount(sources, minlength=len(weights)) + before).tolist()
    return Fraction(largest, total)


def without_the_rarest(weights):
    """Leave out what is refused."""
    weights = list(weights)
    while True:
        try:
            Apportionment(weights)
        except TooRareError as error:
            del weights[error.source]
        else:
            return weights


@pytest.mark.parametrize("family", FAMILIES)
def test_every_share_is_right_to_within_one_at_every_point(family, monkeypatch):
    rng = random.Random(family)
    # short blocks have many borders; sources under 1 in 512 are then a group of their own
    for shortest, longest in ((1 << 12, 1 << 17), (16, 512), (1, 64)):
        monkeypatch.setattr(apportion, "SHORTEST_BLOCK", shortest)
        monkeypatch.setattr(apportion, "LONGEST_BLOCK", longest)
        for _ in range(6):
            weights = whole([Fraction(weight) for weight in weights_of(family, rng)])
            first = rng.choice([0, rng.randrange(10**4), rng.randrange(10**11)])
            assert largest_error(without_the_rarest(weights), first, 2000) < 1


def test_the_error_of_equal_weights_is_as_large_as_it_must_be():
    # of K equal sources one must be 1 - 1/K ahead after one sample: the bound of one is not slack
    assert largest_error([1] * 64, 0, 640) == Fraction(63, 64)


@pytest.mark.parametrize("family", FAMILIES)
def test_place_is_the_inverse_of_pick(family):
    rng = random.Random(family)
    order = Apportionment(whole([Fraction(weight) for weight in weights_of(family, rng)]))
    samples = np.array([*range(50), *(rng.randrange(10**10) for _ in range(10))])
    sources, ranks = order.pick(samples)
    found = [order.place(int(source), int(rank)) for source, rank in zip(sources, ranks, strict=True)]
    assert found == samples.tolist()


def test_rare_sources_are_spread_as_evenly_and_found_again():
    weights = [10**9, 10**9, 3, 2, 1]
    order = Apportionment(weights)
    for rank in (0, 1, 7, 1000):
        for source in (2, 3, 4):
            place = order.place(source, rank)
            total, weight = sum(weights), weights[source]
            assert rank * total // weight <= place < -(-(rank + 1) * total // weight)
            found = order.pick(np.array([place - 1, place, place + 1]))
            assert (found[0][1], found[1][1]) == (source, rank)
            assert order.counts(place + 1)[source] == rank + 1


def test_picking_is_the_same_whatever_is_picked_with_it():
    order = Apportionment([30, 20, 7])
    whole_row = order.pick(np.arange(20_000))
    chosen = np.random.default_rng(0).permutation(20_000)[:500]
    assert (order.pick(chosen)[0] == whole_row[0][chosen]).all()
    assert (order.pick(chosen)[1] == whole_row[1][chosen]).all()


def test_the_order_never_changes_between_versions():
    # a run that is continued with a newer version must see the same data
    assert "".join(map(str, Apportionment([5, 3, 2]).pick(np.arange(20))[0])) == FROZEN_SHORT
    irregular = Apportionment(whole([Fraction(1, 3**k) + Fraction(1, 7**9) for k in range(11)] + [Fraction(1, 10**7)]))
    sources, ranks = irregular.pick(10**10 + np.arange(3000))
    assert (int((sources * np.arange(3000)).sum()), int(ranks.sum())) == FROZEN_LONG


def test_whole_numbers_are_exact_where_they_fit():
    assert whole([Fraction("0.7"), Fraction("0.2"), Fraction("0.1")]) == [7, 2, 1]
    assert whole([Fraction(6), Fraction(4)]) == [3, 2]
    shares = [Fraction(1, 3**40), Fraction(0.3), Fraction(0.6)]
    numbers = whole(shares)
    assert sum(numbers) <= 2**40
    assert numbers[0] == 1
    assert abs(Fraction(numbers[1], sum(numbers)) - shares[1] / sum(shares)) < Fraction(1, 2**39)


def test_a_source_that_is_rare_beyond_measure_is_refused_by_name():
    with pytest.raises(TooRareError) as error:
        Apportionment([1, 10**6, 2**39])
    assert error.value.source == 0
    asked = Weights(weights={"web": 1.0, "books": 1e-6, "note": 1e-12})
    with pytest.raises(ConfigError, match="mixture.weights: 'note' would be one sample in 1,000,001,000,001, too few"):
        make_mixer(asked, {"web": 10, "books": 10, "note": 10}, 8)


def counts_of(settings, sizes, samples, seq_len=8):
    return make_mixer(settings, sizes, seq_len).counts(samples)


def test_weights_epochs_and_temperatures_give_their_shares():
    sizes = {"a": 100, "b": 300, "c": 600}
    assert counts_of(Weights(weights={"a": 5.0, "b": 3.0, "c": 0.0}), sizes, 80) == [50, 30, 0]
    assert counts_of(mixture(kind="epochs", epochs={"a": 2, "b": 1, "c": 0.5}), sizes, 800) == [200, 300, 300]
    assert counts_of(Temperature(), sizes, 1000) == [100, 300, 600]
    halves = counts_of(Temperature(temperature=2.0), {"a": 100, "b": 400}, 300)
    assert halves == [100, 200]
    even = counts_of(Temperature(temperature=1e9), sizes, 3000)
    assert max(even) - min(even) <= 1


def test_mappings_in_another_order_say_the_same():
    sizes = {"a": 100, "b": 300}
    first = make_mixer(Weights(weights={"a": 0.3, "b": 0.7}), sizes, 8).pick(np.arange(100))
    other = make_mixer(Weights(weights={"b": 0.7, "a": 0.3}), sizes, 8).pick(np.arange(100))
    assert (first[0] == other[0]).all()


def test_phases_follow_one_another_and_sources_go_on_where_they_were():
    settings = mixture(
        kind="phases",
        phases=[
            {"tokens": 801, "mixture": {"kind": "weights", "weights": {"a": 1, "b": 0, "c": 3}}},  # 101 samples of 8
            {"tokens": 160, "mixture": {"kind": "weights", "weights": {"a": 1, "b": 0, "c": 0}}},  # 20 more, or 19
            {"mixture": {"kind": "weights", "weights": {"a": 1, "b": 1, "c": 0}}},
        ],
    )
    mixer = make_mixer(settings, {"a": 9, "b": 9, "c": 9}, 8)
    samples = np.arange(400)
    sources, numbers = mixer.pick(samples)
    assert set(sources[:101].tolist()) == {0, 2}
    assert set(sources[101:121].tolist()) == {0}
    assert set(sources[121:].tolist()) == {0, 1}
    for source in range(3):
        mine = numbers[sources == source]
        assert mine.tolist() == list(range(len(mine)))
        assert [mixer.place(source, int(n)) for n in mine] == samples[sources == source].tolist()
        assert mixer.counts(400)[source] == len(mine)
    assert mixer.place(2, len(numbers[sources == 2])) is None
    for boundary in (101, 121):
        assert mixer.counts(boundary) == [int((sources[:boundary] == source).sum()) for source in range(3)]


def test_one_source_is_just_counted():
    mixer = make_mixer(Temperature(), {"only": 5}, 8)
    sources, numbers = mixer.pick(np.array([7, 3]))
    assert (sources.tolist(), numbers.tolist(), mixer.place(0, 7), mixer.counts(7)) == ([0, 0], [7, 3], 7, [7])


ONE = {"kind": "weights", "weights": {"a": 1}}
REFUSED = {
    "negative": ({"kind": "weights", "weights": {"a": 1, "b": -0.5}}, "mixture.weights.b: wanted greater than"),
    "all zero": ({"kind": "weights", "weights": {"a": 0, "b": 0}}, "mixture: wanted one that is not 0, found none"),
    "no epochs": ({"kind": "epochs", "epochs": {"a": 0}}, "mixture: wanted one that is not 0, found none among a"),
    "not a number": ({"kind": "weights", "weights": {"a": float("nan")}}, "mixture.weights.a: wanted a finite number"),
    "empty": ({"kind": "weights", "weights": {}}, "mixture.weights: "),
    "cold": ({"kind": "temperature", "temperature": 0}, "mixture.temperature: wanted greater than or equal"),
    "no phases": ({"kind": "phases", "phases": []}, "mixture.phases: "),
    "endless phase": (
        {"kind": "phases", "phases": [{"mixture": ONE}, {"mixture": ONE}]},
        "mixture: phase 0 has no tokens and is not the last; say how long it is",
    ),
    "last phase ends": (
        {"kind": "phases", "phases": [{"tokens": 5, "mixture": ONE}]},
        "mixture: the last phase lasts until training ends; leave its tokens null",
    ),
    "phase of no tokens": (
        {"kind": "phases", "phases": [{"tokens": 0, "mixture": ONE}, {"mixture": ONE}]},
        "mixture.phases.0.tokens: wanted greater than or equal to 1",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_mixture_is_refused(name):
    data, message = REFUSED[name]
    with pytest.raises(ConfigError) as error:
        mixture(**data)
    assert message in str(error.value)


def test_names_that_are_not_there_and_names_left_out_are_refused():
    asked = mixture(kind="weights", weights={"web": 1, "wkii": 1})
    assert list(check_names(asked, ["web", "wiki"])) == [
        ("weights.wkii", "no tokens are called 'wkii'; did you mean 'wiki'?"),
        ("weights", "says nothing of 'wiki'; add it, with 0 to leave it out"),
    ]
    with pytest.raises(ConfigError, match="mixture.weights.wkii: no tokens are called 'wkii'"):
        make_mixer(asked, {"web": 5, "wiki": 5}, 8)
    phases = mixture(kind="phases", phases=[{"mixture": {"kind": "epochs", "epochs": {"wiki": 2}}}])
    assert isinstance(phases, Phases)
    assert list(check_names(phases, ["web", "wiki"])) == [
        ("phases.0.mixture.epochs", "says nothing of 'web'; add it, with 0 to leave it out")
    ]
    assert not list(check_names(Temperature(), ["web"]))
