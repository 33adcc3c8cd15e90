"""Parameter groups: what decays, what learns at another rate, and which parameters are tables."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

Group = dict[str, Any]

# Layers of which a row belongs to an id, a position or a class. Muon's authors leave such layers to AdamW (Jordan et
# al. 2024), since a row is looked up or scored by itself and is not part of a map between hidden states.
TABLES = frozenset(
    {"embedding", "position_embedding", "token_type_embedding", "relative", "head", "sentence_head", "router"}
)
FUSED_DEVICES = frozenset({"cpu", "cuda", "xpu", "mps"})


def make_groups(
    model: nn.Module, weight_decay: float, lr_scales: Mapping[str, float], rule: Callable[[str, Tensor], str]
) -> list[Group]:
    """Return the parameters that learn, in groups of one rule, one weight decay and one rate; matrices come first.

    A group has `rule`, `lr_scale`, `weight_decay` (zero for anything not at least 2-D: norms and biases) and `params`.

    Raises:
        KeyError: If `lr_scales` names a parameter that the model has not.
    """
    learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if unknown := lr_scales.keys() - {name for name, _ in model.named_parameters()}:
        raise KeyError(f"lr_scales: the model has no parameter '{min(unknown)}'")
    groups: dict[tuple[bool, str, float], Group] = {}
    for name, parameter in sorted(learning, key=lambda found: dimensions(found[1]) < 2):  # else in the model's order
        decays, scale, what = dimensions(parameter) >= 2, lr_scales.get(name, 1.0), rule(name, parameter)
        group = groups.setdefault((decays, what, scale), {"params": [], "rule": what, "lr_scale": scale})
        group["weight_decay"] = weight_decay if decays else 0.0
        group["params"].append(parameter)
    return list(groups.values())


def dimensions(parameter: Tensor) -> int:
    """Return how many dimensions a parameter has, also where ZeRO stage 3 has left only a piece of it here."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def is_table(name: str) -> bool:
    """Return whether a parameter belongs to an embedding, a table of positions or an output layer, by its name."""
    return not TABLES.isdisjoint(name.split(".")[-2:-1])


def have_fused(groups: Sequence[Group]) -> bool:
    """Return whether torch has fused kernels on the device of every parameter."""
    return all(p.device.type in FUSED_DEVICES for group in groups for p in group["params"])
