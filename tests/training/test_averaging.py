"""Averages of the weights against plain formulas, on a parameter that moves by one a step."""

import pytest
import torch

from pipeline.training.averaging import EMA, Last
from pipeline.training.optim import AdamW, ScheduleFreeAdamW


def averages(average, steps: int, group_by_group: bool = False) -> list[float]:
    """Return the average after each step; after step t the weight is t, and a second one is -t."""
    up, down = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [up]}, {"params": [down]}], lr=1.0)
    average.attach(optimizer)
    found = []
    for _ in range(steps):
        up.grad, down.grad = -torch.ones(2), torch.ones(2)
        if group_by_group:  # as DeepSpeed does
            groups = optimizer.param_groups
            for group in groups:
                optimizer.param_groups = [group]
                optimizer.step()
            optimizer.param_groups = groups
        else:
            optimizer.step()
        point = average.point(up, optimizer.state[up])
        assert torch.equal(average.point(down, optimizer.state[down]), -point)
        assert point[0] == point[1]
        found.append(point[0].item())
    assert torch.equal(up.detach(), torch.full((2,), float(steps)))  # nothing changes what is learned
    return found


@pytest.mark.parametrize("group_by_group", [False, True])
def test_ema(group_by_group):
    wanted, average = [], 1.0
    for n in range(1, 31):
        decay = min(0.5, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * n
        wanted.append(average)
    assert averages(EMA(decay=0.5), 30, group_by_group) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("group_by_group", [False, True])
def test_last(group_by_group):
    found = averages(Last(count=3, every_steps=2), 11, group_by_group)
    points = [[], [2], [2], [2, 4], [2, 4], [2, 4, 6], [2, 4, 6], [4, 6, 8], [4, 6, 8], [6, 8, 10], [6, 8, 10]]
    assert found == pytest.approx([sum(kept) / len(kept) if kept else 1.0 for kept in points])


@pytest.mark.parametrize("average", [EMA(), Last(count=2, every_steps=1)])
def test_the_average_is_a_copy(average):
    weight = torch.nn.Parameter(torch.zeros(1))
    assert average.point(weight, {}).data_ptr() != weight.data_ptr()
    assert not average.point(weight, {}).requires_grad


@pytest.mark.parametrize(("average", "copies"), [(EMA(), 1), (Last(count=4, every_steps=1), 4)])
def test_it_says_what_it_keeps(average, copies):
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    average.attach(optimizer)
    for _ in range(9):
        weight.grad = torch.ones(3)
        optimizer.step()
    kept = sum(v.numel() for v in optimizer.state[weight].values() if torch.is_tensor(v))
    assert kept == copies * 3 == average.state_copies * 3


def test_an_average_of_averages_is_refused():
    assert list(EMA().check(ScheduleFreeAdamW())) == [
        ("average", "'schedule_free_adamw' keeps an average itself and evaluates that; leave average null")
    ]
    assert not list(EMA().check(AdamW()))
