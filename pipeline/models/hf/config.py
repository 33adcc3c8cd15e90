"""Their `config.json`: read into our settings, and made of them. Nothing here imports torch or transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import ArtifactError, ConfigError
from pipeline.models.config import AnyModel
from pipeline.models.files import CONFIG_FILE, read_object
from pipeline.models.hf.classes import LAYOUTS
from pipeline.models.hf.layout import Layout
from pipeline.models.hf.tensors import tensor_names
from pipeline.models.hf.translate import Theirs
from pipeline.settings import Settings, decode

WANTED = "wanted a model in Hugging Face's layout"
# More than any model has; a number above comes from a damaged file.
LARGEST = {"num_layers": 10_000, "num_decoder_layers": 10_000} | dict.fromkeys(
    ("d_model", "d_ff", "vocab_size", "max_seq_len", "num_heads", "num_kv_heads", "head_width"), 2**31
)


class _Model(Settings):
    model: AnyModel


def read_hf_config(directory: Path) -> AnyModel:
    """Return the settings of the model in a local directory of Hugging Face's, as `load.import_hf` would have them.

    Weights need not be there, and are not read.

    Raises:
        ArtifactError: If there is no such model, or one that our settings cannot describe exactly; it names every
            setting of theirs that we have none for.
    """
    return read_layout(directory)[1]


def read_layout(directory: Path) -> tuple[Layout, AnyModel]:
    """Return what `read_hf_config` does, and the layout of the directory."""
    path = directory / CONFIG_FILE
    try:
        return _read_layout(directory, path, read_object(path, WANTED, WANTED))
    except (TypeError, AttributeError, LookupError, ValueError, ArithmeticError, RuntimeError) as error:
        # what a setting of another type than theirs leads to, wherever it is used
        raise ArtifactError(
            f"{path}: a setting is not what it should be ({type(error).__name__}: {error}); copy the model again"
        ) from None


def _read_layout(directory: Path, path: Path, data: dict[str, Any]) -> tuple[Layout, AnyModel]:
    layout = _find_layout(path, data)
    theirs = Theirs(path, data, layout.defaults, tensor_names(directory))
    fields: dict[str, Any] = {"kind": layout.kind, "attention_scale": layout.attention_scale}
    fields |= {ours: allowed[0] for ours, allowed in layout.computes.items() if len(allowed) == 1 and "." not in ours}
    fields |= {ours: theirs[name] for ours, name in layout.same.items()}
    for part in layout.parts:
        fields |= part.read(theirs)
    if layout.kind == "encoder_decoder":
        fields["decoder_start_id"] = data.get("decoder_start_token_id", data.get("pad_token_id", 0))  # T5's own
    if layout.dropouts:
        fields["dropout"] = float(theirs[layout.dropouts[0]])
    for name, wanted in layout.fixed.items():
        theirs.want(name, wanted)
    if data.get("quantization_config"):
        theirs.refuse("quantization_config", "none", data["quantization_config"].get("quant_method", "one"))
    if theirs.problems:
        raise ArtifactError("\n".join(theirs.problems))
    for name, most in LARGEST.items():
        if isinstance(fields.get(name), int) and fields[name] > most:
            raise ArtifactError(f"{path}: in our settings: {name}: wanted at most {most:,}, found {fields[name]:,}")
    try:
        return layout, decode(_Model, {"model": _tidy(fields)}).model
    except ConfigError as error:
        problems = [problem.removeprefix("model.") for problem in error.problems]
        raise ArtifactError("\n".join(f"{path}: in our settings: {problem}" for problem in problems)) from None


def to_hf_config(config: AnyModel, layout: Layout, dtype: str, special_ids: Mapping[str, int | None]) -> dict[str, Any]:
    """Return their settings of a model.

    Args:
        dtype: Name of the weights' type, such as float32.
        special_ids: Ids of special tokens, by names such as eos; null is none.
    """
    ours = config.model_dump() | {"num_kv_heads": config.kv_heads, "d_ff": config.ff, "head_width": config.head_dim}
    fields: dict[str, Any] = {"architectures": [layout.architecture], "model_type": layout.model_type, "dtype": dtype}
    fields |= {name: ours[setting] for setting, name in layout.same.items()}
    fields |= dict.fromkeys(layout.dropouts, config.dropout)
    for part in layout.parts:
        fields |= part.write(config)
    fields |= {f"{name}_token_id": number for name, number in special_ids.items()}
    return {**fields, **layout.fixed}


def _find_layout(path: Path, data: Mapping[str, Any]) -> Layout:
    """Return the layout of the class that `data` names, or if it names none the first of its model type."""
    classes, model_type = data.get("architectures") or [], data.get("model_type")
    for layout in LAYOUTS:
        if layout.architecture in classes or (not classes and layout.model_type == model_type):
            return layout
    known = ", ".join(layout.architecture for layout in LAYOUTS)
    raise ArtifactError(f"{path}: architectures: wanted one of {known}; found {', '.join(classes) or model_type}")


def _tidy(fields: dict[str, Any]) -> dict[str, Any]:
    """Say everything in one way, so that a model that comes in, goes out and comes back has the same settings."""
    fields["d_ff"] = fields["d_ff"] or 4 * fields["d_model"]  # their null, for what has no gate
    if fields.get("num_kv_heads") == fields["num_heads"]:
        fields["num_kv_heads"] = None
    if fields.get("head_width") is not None and fields["head_width"] * fields["num_heads"] == fields["d_model"]:
        fields["head_width"] = None
    if fields.get("sliding_window") is None:
        fields["local_rope_theta"] = None
    if fields.get("num_decoder_layers") == fields["num_layers"]:
        fields["num_decoder_layers"] = None
    experts = fields.get("experts")
    if experts and experts.get("d_ff") == fields["d_ff"]:
        experts["d_ff"] = None
    return fields
