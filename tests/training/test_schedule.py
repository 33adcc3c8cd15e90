import itertools
import math

import pytest

from pipeline.training.schedule import WSD, Constant, Cosine, InverseSqrt, Linear


def test_cosine_warms_up_then_falls_to_the_final_fraction():
    schedule = Cosine(warmup_fraction=0.1, final_fraction=0.2)
    factors = [schedule.factor(step, 100) for step in range(1, 101)]
    assert factors[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert factors[54] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 45 / 90)))
    assert factors[-1] == pytest.approx(0.2)
    assert all(a >= b for a, b in itertools.pairwise(factors[9:]))


def test_wsd_is_flat_until_the_decay():
    schedule = WSD(warmup_fraction=0.1, decay_fraction=0.2)
    factors = [schedule.factor(step, 100) for step in range(1, 101)]
    assert factors[9:80] == [1.0] * 71
    assert factors[80] == pytest.approx(1 - math.sqrt(1 / 21))
    assert 0 < factors[-1] < 0.03


def test_constant_stays_at_the_peak():
    factors = [Constant(warmup_fraction=0.1).factor(step, 50) for step in range(1, 51)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8] + [1.0] * 46)


def test_linear_falls_by_the_same_each_step():
    factors = [Linear(warmup_fraction=0.2, final_fraction=0.5).factor(step, 10) for step in range(1, 11)]
    assert factors == pytest.approx([0.5, 1.0] + [1 - 0.5 * i / 8 for i in range(1, 9)])
    to_zero = [Linear(warmup_fraction=0.2).factor(step, 10) for step in range(1, 11)]
    assert to_zero == pytest.approx([0.5, 1.0] + [1 - i / 9 for i in range(1, 9)])  # a step later it would be zero


def test_inverse_sqrt_halves_when_steps_are_four_times_the_warm_up():
    schedule = InverseSqrt(warmup_fraction=0.1)
    factors = [schedule.factor(step, 100) for step in range(1, 101)]
    assert factors[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert (factors[39], factors[89]) == (pytest.approx(1 / 2), pytest.approx(1 / 3))
    assert InverseSqrt(warmup_fraction=0.0).factor(16, 100) == pytest.approx(1 / 4)


ALL = [Constant(), Linear(), Cosine(), WSD(), InverseSqrt()]


@pytest.mark.parametrize("schedule", ALL, ids=lambda schedule: schedule.kind)
def test_warm_up_alone_ends_at_the_peak(schedule):
    only = schedule.model_copy(update={"warmup_fraction": 1.0})
    assert [only.factor(step, 4) for step in range(1, 5)] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    "schedule",
    [
        Cosine(warmup_fraction=0.0),
        WSD(warmup_fraction=0.0, decay_fraction=0.0),
        Constant(warmup_fraction=0.0),
        InverseSqrt(warmup_fraction=0.0),
    ],
)
def test_without_warm_up_the_first_step_learns_at_the_peak(schedule):
    assert schedule.factor(1, 1000) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("schedule", ALL, ids=lambda schedule: schedule.kind)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_very_short_runs_have_a_rate_at_every_step(schedule, steps):
    assert all(0 < schedule.factor(step, steps) <= 1 for step in range(1, steps + 1))
