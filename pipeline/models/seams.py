"""Seams: where a tensor passes between what all tensor-parallel ranks have and what each has of its own.

A model has them as attributes of its layers, and in them nothing happens until `parallel.tensor` puts something there.
"""

from collections.abc import Callable

from torch import Tensor

Seam = Callable[[Tensor], Tensor]


def nothing(x: Tensor) -> Tensor:
    """Return a tensor as it is: what is in a seam of a model that is not shared."""
    return x
