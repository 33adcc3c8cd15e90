"""Translations of rotary positions and of windows; see `translate`."""

from collections.abc import Mapping
from typing import Any

from pipeline.models.config import AnyModel
from pipeline.models.hf.translate import Fields, Part, Theirs
from pipeline.models.parts import Llama3Scaling, YarnScaling

ROPE_SETTINGS = ("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings")
ROPE_DETAILS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": (),
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_fast", "beta_slow"),
}


def _write_rope(config: AnyModel) -> Fields:
    """Give the new setting and, for readers that do not know it and would leave the scaling out, the old ones."""
    rope = _rope(config, config.rope_theta)
    return {
        "rope_parameters": rope,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else rope,
    }


def _rope(config: AnyModel, theta: float) -> Fields:
    rope = {"rope_type": "default", "rope_theta": theta}
    scaling = config.rope_scaling
    if scaling is None:
        return rope
    rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if isinstance(scaling, Llama3Scaling | YarnScaling):
        rope["original_max_position_embeddings"] = scaling.original_max_seq_len
        rope |= scaling.model_dump(exclude={"kind", "factor", "original_max_seq_len"})
    return rope


def _read_rope(theirs: Theirs) -> Fields:
    given = theirs.data.get("rope_scaling") or theirs.data.get("rope_parameters") or {}
    rope = {"rope_theta": theirs["rope_theta"]} | given
    return {"rope_theta": float(rope["rope_theta"]), "rope_scaling": _scaling(theirs, "rope_parameters", rope)}


def _scaling(theirs: Theirs, name: str, rope: Mapping[str, Any]) -> Fields | None:
    """Return our setting of rotary positions that are stretched; problems for every detail that we have not."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_DETAILS:
        theirs.refuse(f"{name}.rope_type", "default, linear, llama3 or yarn", kind)
        return None
    partial = rope.get("partial_rotary_factor") or theirs.data.get("partial_rotary_factor") or 1.0
    neutral = {"partial_rotary_factor": 1.0, "truncate": True}
    for key, value in {**rope, "partial_rotary_factor": partial}.items():
        if key not in (*ROPE_SETTINGS, *ROPE_DETAILS[kind]) and value not in (None, neutral.get(key)):
            theirs.refuse(f"{name}.{key}", neutral.get(key, "none"), value)
    if kind == "default":
        return None
    length = theirs.data.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    length = length or theirs["max_position_embeddings"]
    factor = rope.get("factor") or theirs["max_position_embeddings"] / length
    scaling: Fields = {key: float(rope[key]) for key in ROPE_DETAILS[kind] if rope.get(key) is not None}
    scaling |= {} if kind == "linear" else {"original_max_seq_len": length}
    return scaling | {"kind": kind, "factor": float(factor)}


ROPE = Part(_write_rope, _read_rope)


def _write_pair_rope(config: AnyModel) -> Fields:
    local = config.local_rope_theta or config.rope_theta
    return {
        "rope_parameters": {
            "full_attention": _rope(config, config.rope_theta),
            "sliding_attention": _rope(config, local),
        },
        "global_rope_theta": config.rope_theta,
        "local_rope_theta": local,
    }


def _read_pair_rope(theirs: Theirs) -> Fields:
    """Read one setting for layers that see all and another for those with a window; both are stretched alike or not."""
    given = theirs.data.get("rope_parameters") or {}
    old = theirs.data.get("rope_scaling") or {}
    kinds = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}
    ropes = {kind: {"rope_theta": theirs[name]} | (given.get(kind) or {}) | old for kind, name in kinds.items()}
    scalings = [_scaling(theirs, f"rope_parameters.{kind}", rope) for kind, rope in ropes.items()]
    if scalings[0] != scalings[1]:
        theirs.refuse("rope_parameters.sliding_attention", f"scaled as full_attention ({scalings[0]})", scalings[1])
    full, local = (float(rope["rope_theta"]) for rope in ropes.values())
    return {"rope_theta": full, "local_rope_theta": None if local == full else local, "rope_scaling": scalings[0]}


PAIR_ROPE = Part(_write_pair_rope, _read_pair_rope)

# A window in all layers or none.
WINDOW = Part(
    lambda config: {"sliding_window": config.sliding_window},
    lambda theirs: {"sliding_window": theirs["sliding_window"]},
)


def _write_switched(config: AnyModel) -> Fields:
    return {"sliding_window": config.sliding_window, "use_sliding_window": config.sliding_window is not None}


def _read_switched(theirs: Theirs) -> Fields:
    return {"sliding_window": theirs["sliding_window"] if theirs["use_sliding_window"] else None}


SWITCHED_WINDOW = Part(_write_switched, _read_switched)


def _write_types(config: AnyModel) -> Fields:
    layers = range(config.num_layers)
    types = ["sliding_attention" if config.is_local(layer) else "full_attention" for layer in layers]
    return _write_switched(config) | {"layer_types": types}


def _read_types(theirs: Theirs) -> Fields:
    window = _read_switched(theirs)["sliding_window"]
    first, layers = theirs["max_window_layers"], range(theirs["num_hidden_layers"])
    local = [window is not None and layer >= first for layer in layers]
    return _window_by_layer(theirs, local, window)


TYPED_WINDOW = Part(_write_types, _read_types)


def _write_half(config: AnyModel) -> Fields:
    """Give the two sides of the window together; without one, all layers are of the kind that sees all."""
    fields = {"layer_types": _write_types(config)["layer_types"]}
    return fields if config.sliding_window is None else fields | {"local_attention": config.sliding_window}


def _read_half(theirs: Theirs) -> Fields:
    every = theirs["global_attn_every_n_layers"]
    local = [layer % every != 0 for layer in range(theirs["num_hidden_layers"])]
    return _window_by_layer(theirs, local, theirs["local_attention"])


HALF_WINDOW = Part(_write_half, _read_half)


def _window_by_layer(theirs: Theirs, local: list[bool], window: int | None) -> Fields:
    """Return our two settings of windows; a problem if they have another pattern than all, or all but 0, n, 2n, …."""
    if (types := theirs.data.get("layer_types")) is not None:
        if unknown := set(types) - {"sliding_attention", "full_attention"}:
            theirs.refuse("layer_types", "sliding_attention or full_attention", ", ".join(sorted(unknown)))
        local = [kind == "sliding_attention" for kind in types]
    if not any(local):
        return {}
    for every in (None, *range(2, len(local) + 1)):
        if local == [every is None or layer % every != 0 for layer in range(len(local))]:
            return {"sliding_window": window, "global_every": every}
    theirs.refuse("layer_types", "sliding_attention in all layers, or in all but 0, n, 2n, …", types or local)
    return {}
