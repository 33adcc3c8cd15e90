import itertools
import math

import pytest

from pipeline.training.schedule import WSD, Cosine


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


@pytest.mark.parametrize("schedule", [Cosine(warmup_fraction=0.0), WSD(warmup_fraction=0.0, decay_fraction=0.0)])
def test_without_warm_up_the_first_step_learns_at_the_peak(schedule):
    assert schedule.factor(1, 1000) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("schedule", [Cosine(), WSD()])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_very_short_runs_have_a_rate_at_every_step(schedule, steps):
    assert all(0 < schedule.factor(step, steps) <= 1 for step in range(1, steps + 1))
