"""Activation checkpointing (Chen et al. 2016, arXiv:1604.06174): layers compute again what the backward pass needs.

Applied to the layers of a plain model from outside. What is learned stays the same bit by bit: random numbers are drawn
again from the state that they were drawn from.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Kind = Literal["full", "selective"]

_COSTLY = {  # what "selective" keeps the results of, where this version of torch and this device have it
    "aten": (
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "_scaled_mm",
        "_grouped_mm",
        "_scaled_grouped_mm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    ),
    "_c10d_functional": ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "wait_tensor"),
}


def recompute(blocks: Iterable[nn.Module], kind: Kind | None) -> None:
    """Let layers keep less of their forward pass; to be called before they are compiled.

    Args:
        blocks: Layers that are called one after another. Each must do the same whenever it is called with the same.
        kind: "full" keeps what goes into a layer and computes all of it again; "selective" also keeps the results of
            matrix products, attention and exchanges between ranks, and computes the cheap rest again (Korthikanti et
            al. 2022, arXiv:2205.05198, section 5, have another choice of what is cheap). Null changes nothing.
    """
    if kind is None:
        return
    contexts: dict[str, Any] = {}
    if kind == "selective":
        contexts["context_fn"] = partial(create_selective_checkpoint_contexts, partial(_policy, _costly()))
    for block in blocks:
        block.forward = _Recomputed(block, contexts)


class _Recomputed:
    def __init__(self, block: nn.Module, contexts: dict[str, Any]) -> None:
        self._block, self._forward, self._contexts = block, block.forward, contexts

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if not self._block.training or not torch.is_grad_enabled():
            return self._forward(*arguments, **named)
        return checkpoint(self._forward, *arguments, use_reentrant=False, **self._contexts, **named)


def _costly() -> frozenset[Any]:
    found = ((getattr(torch.ops, family), name) for family, names in _COSTLY.items() for name in names)
    return frozenset(getattr(operators, name).default for operators, name in found if hasattr(operators, name))


def _policy(costly: frozenset[Any], context: Any, operator: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    if operator in costly and not _draws(operator, arguments, named):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _draws(operator: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Return whether a call draws random numbers: left out the second time, those after it would be others."""
    for number, argument in enumerate(operator._schema.arguments):
        if argument.name == "dropout_p":
            given = arguments[number] if number < len(arguments) else named.get("dropout_p", argument.default_value)
            return bool(given)
    return False
