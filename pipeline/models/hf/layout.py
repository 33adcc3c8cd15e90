"""What a layout is made of: which of their tensors are which of ours, and which settings it can express.

The layouts themselves are data in `decoders` and `encoders`. Nothing here imports torch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from pipeline.models.config import AnyModel
from pipeline.models.hf.translate import Part
from pipeline.models.weights import weights

ANYTHING: tuple[Any, ...] = ()
# What a layout computes if it does not say otherwise in `computes`; names of nested settings are dotted. Settings that
# are not here can have any value: sizes, what concerns training alone, and scales, which weights take up on export.
PLAIN: Mapping[str, tuple[Any, ...]] = {
    "num_kv_heads": (None,),
    "head_width": (None,),
    "norm_placement": ("pre",),
    "rope_scaling": (None,),
    "local_rope_theta": (None,),
    "sliding_window": (None,),
    "global_every": (None,),
    "qk_norm": (False,),
    "experts": (None,),
    "bias": (False,),
    "embedding_norm": (False,),
    "logit_softcap": (None,),
    "token_types": (0,),
    "pooler": (False,),
}


@dataclass(frozen=True)
class Rule:
    """A tensor there and the tensors here of which it is made; both names without `.weight` and `.bias`.

    `{i}` stands for the number of a layer and `{e}` for that of an expert, of which ours hold all in one tensor.

    Attributes:
        transposed: Whether they store the weight as (inputs, outputs).
        gated: If given, the rule is for feed-forward layers that have a gate, or that have none.
        fused: If given, the rule is for files with all experts in one tensor, or with one tensor for each.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False
    gated: bool | None = None
    fused: bool | None = None


@dataclass(frozen=True)
class Pair:
    """Tensors that are the same numbers: `theirs`, one below the other, and `ours`, joined along a dimension."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    transposed: bool = False
    stacked: bool = False
    dim: int = 0


@dataclass(frozen=True)
class Layout:
    """One of their classes.

    Attributes:
        kind: Our family.
        computes: The values of our settings that it computes, where they are not those of `PLAIN`.
        same: Our settings that have but another name there: ours → theirs.
        parts: Translations of the others.
        fixed: The values of their settings that we compute.
        defaults: What their settings are where `config.json` does not say.
        dropouts: Their settings that get our dropout; the first is ours when a model comes in.
        prefix: What the names of their tensors begin with, unless a file holds them without it.
        copies: Tensors that a file may hold twice: name → the name it must equal.
        ignored: Patterns of tensors that a file may hold and that are no weights of this model.
        absent: Tensors that are zero if we do not have the one that they would be: theirs → ours.
        attention_scale: What scores are multiplied with; null is 1 / sqrt(head width).
    """

    architecture: str
    model_type: str
    kind: str
    rules: tuple[Rule, ...]
    same: Mapping[str, str]
    computes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    dropouts: tuple[str, ...] = ()
    prefix: str = "model."
    copies: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    absent: Mapping[str, str] = field(default_factory=dict)
    attention_scale: float | None = None

    def pairs(self, config: AnyModel, fused: bool = False) -> Iterator[Pair]:
        """Yield all tensors of a model, but for heads that are for training alone."""
        names = {weight.name for weight in weights(config)}
        layers = range(max(config.num_layers, getattr(config, "decoder_layers", 0)))
        count = config.experts.count if config.experts is not None else 0
        for rule in self.rules:
            if rule.gated in (None, config.gated) and rule.fused in (None, fused):
                for layer in layers if "{i}" in rule.ours[0] else (0,):
                    yield from _pairs_of(rule, layer, count, names)

    def differences(self, config: AnyModel) -> list[str]:
        """Return the settings that would have to be otherwise for this layout to compute the model."""
        needs, found = {**PLAIN, **self.computes}, facts(config)
        return [
            f"{name}={' or '.join(map(_show, allowed))}"
            for name, allowed in needs.items()
            if name in found and allowed and found[name] not in allowed
        ]


def facts(config: AnyModel) -> dict[str, Any]:
    """Return a model's settings under dotted names, with null for what is set but says the same as null."""
    found = dict(_flat(config))
    if config.kv_heads == config.num_heads:
        found["num_kv_heads"] = None
    if config.d_model == config.num_heads * config.head_dim:
        found["head_width"] = None
    if config.local_rope_theta == config.rope_theta:
        found["local_rope_theta"] = None
    return found


def _flat(settings: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            yield prefix + name, getattr(value, "kind", "set")
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _pairs_of(rule: Rule, layer: int, num_experts: int, names: set[str]) -> Iterator[Pair]:
    for suffix in (".weight", ".bias", ""):
        ours = tuple(name.format(i=layer) + suffix for name in rule.ours)
        if ours[0] not in names:
            continue
        stacked = "{e}" in rule.theirs
        numbers = range(num_experts) if stacked else (0,)
        theirs = tuple(rule.theirs.format(i=layer, e=number) + suffix for number in numbers)
        yield Pair(theirs, ours, rule.transposed and suffix == ".weight", stacked, 1 if rule.fused else 0)


def _show(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
