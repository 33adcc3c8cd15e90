"""The files of a saved model that say what it is; imports no torch."""

import json
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import ArtifactError, ConfigError
from pipeline.models.config import AnyModel
from pipeline.settings import Settings, decode, encode

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


class ModelFile(Settings):
    """What a saved model's `config.json` holds.

    Attributes:
        labels: The names of a classifier's classes, in the order of its outputs; null is a language model.
    """

    format: Literal[2] = 2
    model: AnyModel
    labels: list[str] | None = None


def read_config(directory: Path) -> ModelFile:
    """Read the `config.json` of a saved model.

    Raises:
        ArtifactError: If there is none, or it is not one of ours.
    """
    path = directory / CONFIG_FILE
    data = read_object(path, "wanted a saved model", "save the model again")
    if data.get("format") == 1:
        raise ArtifactError(f"{directory}: made by an earlier version, whose models had other weights; make it again")
    try:
        return decode(ModelFile, data)
    except ConfigError as error:
        raise ArtifactError("\n".join(f"{path}: {problem}" for problem in error.problems)) from None


def describe_model(model: AnyModel, labels: list[str] | None = None) -> bytes:
    """Return the content of the `config.json` of a model; `labels` names a classifier's classes."""
    return (json.dumps(encode(ModelFile(model=model, labels=labels)), indent=2) + "\n").encode()


def read_object(path: Path, wanted: str, way_out: str) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        wanted: What is said where there is no such file; `way_out` where it is damaged.

    Raises:
        ArtifactError: If it is not there, or not a JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path.parent}: no {path.name}; {wanted}") from None
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror}); wanted a file of JSON") from None
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not JSON ({error}); {way_out}") from None
    if not isinstance(data, dict):
        raise ArtifactError(f"{path}: wanted a JSON object, found {type(data).__name__}")
    return data


def is_theirs(directory: Path) -> bool:
    """Return whether the model in a directory is in Hugging Face's layout: its `config.json` has their settings.

    One that cannot be read is taken for theirs, so that reading it says what is wrong.
    """
    try:
        data = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (ValueError, RecursionError, OSError):
        return True
    return isinstance(data, dict) and not data.keys().isdisjoint(("model_type", "architectures"))
