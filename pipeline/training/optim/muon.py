"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), with AdamW for what is no hidden matrix."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from pipeline.parallel.partitions import Exchange
from pipeline.training.optim.flat import MatrixOptimizer
from pipeline.training.optim.groups import Group, have_fused

# Jordan's: the quintic whose slope at zero is steepest while it keeps singular values near one.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
RMS = 0.2  # of AdamW's updates, which a step is matched to (Liu et al. 2025, arXiv:2502.16982, section 2.2)
STACKED_ELEMENTS = 2**26  # of matrices of one shape that are made orthogonal at once


def orthogonalize(matrices: Tensor, steps: int) -> Tensor:
    """Return U V^T nearly, for each matrix U S V^T of a stack (..., rows, columns).

    Singular values end between about 0.7 and 1.2. In bf16 on an accelerator, as the authors do; in fp32 elsewhere.
    """
    x = matrices.to(torch.float32 if matrices.device.type == "cpu" else torch.bfloat16)
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    found: Tensor = x.mT if is_tall else x
    return found.to(matrices.dtype)


class MuonWithAdamW(MatrixOptimizer):
    """Muon for groups whose `rule` is "muon", AdamW for the others; the state of the first is `momentum`."""

    def __init__(
        self, groups: list[Group], lr: float, momentum: float, steps: int, betas: tuple[float, float], eps: float
    ) -> None:
        self._adamw = torch.optim.AdamW([torch.zeros(1)], lr=lr, betas=betas, eps=eps, fused=have_fused(groups))
        settings = {name: value for name, value in self._adamw.defaults.items() if name != "weight_decay"}
        super().__init__([settings | group for group in groups], lr)
        self.momentum, self.steps = momentum, steps
        self._exchanges: dict[Tensor, Exchange] = {}

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: Group) -> None:
        """Update one parameter, or one vector of them."""
        if group["rule"] == "adamw":
            self._adamw.state, self._adamw.param_groups = self.state, [{**group, "params": [parameter]}]
            self._adamw.step()
            return
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - self.momentum)
        direction = torch.lerp(gradient, state["momentum"], self.momentum).reshape(-1)
        if parameter not in self._exchanges:
            self._exchanges[parameter] = Exchange(self.layout(parameter))
        exchange = self._exchanges[parameter]
        exchange.scatter(self._directions(exchange.gather(direction)), direction)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(direction.view(parameter.shape), alpha=-group["lr"])

    def _directions(self, matrices: list[Tensor]) -> list[Tensor]:
        """Return what each matrix moves along, those of one shape made orthogonal together."""
        places: dict[torch.Size, list[int]] = defaultdict(list)
        for place, matrix in enumerate(matrices):
            places[matrix.shape].append(place)
        found = list(matrices)
        for shape, alike in places.items():
            at_once = max(STACKED_ELEMENTS // shape.numel(), 1)
            for start in range(0, len(alike), at_once):
                some = alike[start : start + at_once]
                stack = orthogonalize(torch.stack([matrices[place] for place in some]), self.steps)
                for place, matrix in zip(some, stack.mul_(RMS * max(shape) ** 0.5), strict=True):
                    found[place] = matrix
        return found
