"""Lion (Chen et al. 2023, arXiv:2302.06675), algorithm 2."""

from typing import Any

import torch
from torch import Tensor

from pipeline.training.optim.flat import PlainOptimizer
from pipeline.training.optim.groups import Group


class LionOptimizer(PlainOptimizer):
    """Steps of one size in each element, along the sign of a momentum; the state is `momentum`."""

    def __init__(self, groups: list[Group], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, lr)
        self.betas = betas

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: Group) -> None:
        """Update one parameter, or one vector of them."""
        beta1, beta2 = self.betas
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        direction = torch.lerp(gradient, state["momentum"], beta1).sign_()
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
        state["momentum"].lerp_(gradient, 1 - beta2)
