"""Schedule-free AdamW (Defazio et al. 2024, arXiv:2405.15682), algorithm 1."""

from typing import Any

import torch
from torch import Tensor

from pipeline.training.optim.flat import PlainOptimizer
from pipeline.training.optim.groups import Group


class ScheduleFreeOptimizer(PlainOptimizer):
    """Keeps the fast weights z in the state; the parameter itself is y, and the average x lies on the line of both.

    With the model at y = (1 - beta1) z + beta1 x, a step moves z by the gradient at y, and x towards z with a share
    that is the squared rate of this step over the sum of those of all.
    """

    def __init__(self, groups: list[Group], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, lr)
        self.betas, self.eps = betas, eps

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: Group) -> None:
        """Update one parameter, or one vector of them."""
        (beta1, beta2), lr = self.betas, group["lr"]
        if not state.get("count"):
            state |= {"count": 0, "rates": 0.0, "z": parameter.detach().clone()}
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["count"] += 1
        state["rates"] += lr**2
        share = lr**2 / state["rates"] if state["rates"] else 0.0
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        divisor = (state["exp_avg_sq"] / (1 - beta2 ** state["count"])).sqrt_().add_(self.eps)
        direction = (gradient / divisor).add_(parameter, alpha=group["weight_decay"])
        # y as it becomes when x moves by `share` towards the new z, without ever making x
        parameter.lerp_(state["z"], share).add_(direction, alpha=lr * (beta1 * (1 - share) - 1))
        state["z"].add_(direction, alpha=-lr)

    def evaluation_point(self, parameter: Tensor) -> Tensor:
        """Return x, the weights to evaluate, for what is y."""
        state = self.state[parameter]
        if not state.get("count"):
            return parameter.detach().clone()
        return torch.lerp(state["z"], parameter.detach(), 1 / self.betas[0])
