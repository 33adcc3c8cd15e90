"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), with AdamW for what is no hidden matrix."""

from collections import defaultdict

import torch
from torch import Tensor

from pipeline.parallel.exchange import WholeMatrices
from pipeline.parallel.partitions import join
from pipeline.training.optim.flat import MatrixOptimizer
from pipeline.training.optim.groups import Group, have_fused

# Jordan's: the quintic whose slope at zero is steepest while it keeps singular values near one.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
RMS = 0.2  # of AdamW's updates, which a step is matched to (Liu et al. 2025, arXiv:2502.16982, section 2.2)
STACKED_ELEMENTS = 2**26  # of matrices of one shape that are made orthogonal at once


def orthogonalize(matrices: Tensor, steps: int) -> Tensor:
    """Return U V^T nearly, for each matrix U S V^T of a stack (..., rows, columns).

    Singular values end between about 0.7 and 1.2. In bf16 on an accelerator, as the authors do; elsewhere in fp32, or
    fp64 where the matrices are.
    """
    is_fast = matrices.device.type != "cpu"
    x = matrices.to(torch.bfloat16 if is_fast else torch.promote_types(matrices.dtype, torch.float32))
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
        self._exchanges: dict[tuple[Tensor, ...], WholeMatrices] = {}

    def update_group(self, parameters: list[Tensor], group: Group) -> None:
        """Update parameters of one group that have a gradient."""
        if not parameters:
            return
        if group["rule"] == "adamw":
            self._adamw.state, self._adamw.param_groups = self.state, [{**group, "params": parameters}]
            self._adamw.step()
            return
        pushes = [self._push(parameter).reshape(-1) for parameter in parameters]
        direction = torch.cat(pushes) if len(pushes) > 1 else pushes[0]
        del pushes  # each as long as the weights
        exchange = self._exchange(parameters)
        alone, alike = exchange.gather(direction)
        exchange.scatter(self._directions(alone), self._directions(alike), direction)
        parts = torch.split(direction, [parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(part.view(parameter.shape), alpha=-group["lr"])

    def _push(self, parameter: Tensor) -> Tensor:
        """Take the gradient into the momentum; return a new tensor: the gradient and the momentum, mixed."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum: Tensor = state["momentum"].lerp_(gradient, 1 - self.momentum)
        return torch.lerp(gradient, momentum, self.momentum)

    def _exchange(self, parameters: list[Tensor]) -> WholeMatrices:
        """Return what brings the matrices of parameters together: of all at once, so that ranks share the work."""
        if (key := tuple(parameters)) not in self._exchanges:
            layouts = [self.layout(parameter) for parameter in parameters]
            self._exchanges[key] = WholeMatrices(join(layouts, [p.numel() for p in parameters]))
        return self._exchanges[key]

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
