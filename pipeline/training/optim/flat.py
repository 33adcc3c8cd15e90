"""What the optimizers share that torch lacks: where each matrix lies, when ZeRO hands over flat vectors.

The state of a vector holds numbers for each of its elements, laid out like the vector; plain numbers; and tensors that
belong to one parameter and not to its elements, which `whole_parameter` tells by their names.
"""

from typing import Any

import torch
from torch import Tensor

from pipeline.parallel.partitions import Layout
from pipeline.training.optim.groups import Group


def whole_parameter(name: str) -> str | None:
    """Return whose whole a state describes, "squares/<parameter>", or null for what is laid out like the vector.

    Every rank has such a state of every parameter in a vector, with the same bits, and in coordinates of the whole
    parameter: so it fits any ZeRO stage and any number of ranks.
    """
    _, slash, parameter = name.partition("/")
    return parameter if slash else None


class PlainOptimizer(torch.optim.Optimizer):
    """An optimizer without closures, whose step goes through the parameters that have a gradient."""

    def __init__(self, groups: list[Group], lr: float) -> None:
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter once."""
        assert closure is None
        for group in self.param_groups:
            self.update_group([p for p in group["params"] if p.grad is not None], group)

    def update_group(self, parameters: list[Tensor], group: Group) -> None:
        """Update parameters of one group that have a gradient."""
        for parameter in parameters:
            assert parameter.grad is not None
            self.update(parameter, parameter.grad, self.state[parameter], group)

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: Group) -> None:
        """Update one parameter, or one vector of them."""
        raise NotImplementedError


class MatrixOptimizer(PlainOptimizer):
    """An optimizer that looks at whole matrices.

    Attributes:
        layouts: What lies in the vectors that it is given in place of parameters; whoever cuts them fills it.
    """

    def __init__(self, groups: list[Group], lr: float) -> None:
        super().__init__(groups, lr)
        self.layouts: dict[Tensor, Layout] = {}

    def layout(self, parameter: Tensor) -> Layout:
        """Return what lies in a vector, or of a parameter that is none, itself."""
        return self.layouts.get(parameter) or Layout.whole(parameter.shape)
