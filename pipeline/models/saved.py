"""How models are saved and loaded: safetensors, and a `config.json` with all settings."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.errors import ArtifactError
from pipeline.models.classifier import Classifier
from pipeline.models.files import CONFIG_FILE, WEIGHTS_FILE, describe_model, read_config
from pipeline.models.transformer import Transformer


def save_model(
    directory: Path, model: Transformer | Classifier, state: Mapping[str, Tensor] | None = None
) -> list[str]:
    """Write `model.safetensors` and `config.json` into `directory` and return their names.

    Args:
        state: The weights, if the model itself holds only a share of them.
    """
    trunk, labels = (model.trunk, model.labels) if isinstance(model, Classifier) else (model, None)
    state = model.state_dict() if state is None else state
    weights = {name: weight.detach().cpu().contiguous() for name, weight in state.items()}
    save_file(weights, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    (directory / CONFIG_FILE).write_bytes(describe_model(trunk.config, labels))
    return [WEIGHTS_FILE, CONFIG_FILE]


def load_model(directory: Path) -> Transformer | Classifier:
    """Return a saved model on the CPU, in the precision it was saved in, ready to evaluate.

    Raises:
        ArtifactError: If a file is missing or damaged, or the weights are not those that `config.json` describes.
    """
    model, weights = open_model(directory)
    model.load_state_dict(dict(weights), assign=True)
    return model.eval()


def open_model(directory: Path) -> "tuple[Transformer | Classifier, SavedWeights]":
    """Return a saved model on the device "meta", and its weights, which are read when they are asked for.

    Raises:
        ArtifactError: If a file is missing or damaged, or the weights are not those that `config.json` describes.
    """
    saved = read_config(directory)
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
        trunk = Transformer(saved.model)
        model = trunk if saved.labels is None else Classifier(trunk, len(saved.labels), saved.labels)
    path = directory / WEIGHTS_FILE
    try:
        weights = SavedWeights(path)
    except FileNotFoundError:
        raise ArtifactError(f"{directory}: no {WEIGHTS_FILE}; wanted a saved model") from None
    except SafetensorError as error:
        raise ArtifactError(f"{path}: damaged ({error}); save the model again") from None
    _check_weights(path, model, weights)
    return model, weights


class SavedWeights(Mapping[str, Tensor]):
    """The weights in a file, each read when it is asked for.

    Attributes:
        shapes: Of all of them.
    """

    def __init__(self, path: Path) -> None:
        file: Any = safe_open
        self._file = file(path, framework="pt")
        names = list(self._file.keys())
        self.shapes = {name: tuple(self._file.get_slice(name).get_shape()) for name in names}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self.shapes  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _check_weights(path: Path, model: nn.Module, weights: SavedWeights) -> None:
    """Raise one ArtifactError that names every weight which is missing, unknown or of another shape."""
    wanted = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    found = weights.shapes
    problems = [f"{path}: no weight '{name}'" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"{path}: unknown weight '{name}'" for name in sorted(found.keys() - wanted.keys())]
    problems += [
        f"{path}: '{name}': wanted shape {wanted[name]}, found {found[name]}"
        for name in sorted(wanted.keys() & found.keys())
        if wanted[name] != found[name]
    ]
    if problems:
        raise ArtifactError("\n".join([*problems, f"{path}: the weights are not those of {CONFIG_FILE}"]))
