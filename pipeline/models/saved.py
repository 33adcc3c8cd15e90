"""How models are saved and loaded: safetensors, and a `config.json` with all settings."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.errors import ArtifactError
from pipeline.models.classifier import Classifier
from pipeline.models.files import CONFIG_FILE, WEIGHTS_FILE, ModelFile, read_config
from pipeline.models.transformer import Transformer
from pipeline.settings import encode


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
    config = encode(ModelFile(model=trunk.config, labels=labels))
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return [WEIGHTS_FILE, CONFIG_FILE]


def load_model(directory: Path) -> Transformer | Classifier:
    """Return a saved model on the CPU, in the precision it was saved in, ready to evaluate.

    Raises:
        ArtifactError: If a file is missing or damaged, or the weights are not those that `config.json` describes.
    """
    saved = read_config(directory)
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
        trunk = Transformer(saved.model)
        model = trunk if saved.labels is None else Classifier(trunk, len(saved.labels), saved.labels)
    path = directory / WEIGHTS_FILE
    try:
        weights = load_file(path)
    except FileNotFoundError:
        raise ArtifactError(f"{directory}: no {WEIGHTS_FILE}; wanted a saved model") from None
    except SafetensorError as error:
        raise ArtifactError(f"{path}: damaged ({error}); save the model again") from None
    _check_weights(path, model, weights)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _check_weights(path: Path, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Raise one ArtifactError that names every weight which is missing, unknown or of another shape."""
    wanted = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    problems = [f"{path}: no weight '{name}'" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"{path}: unknown weight '{name}'" for name in sorted(found.keys() - wanted.keys())]
    problems += [
        f"{path}: '{name}': wanted shape {wanted[name]}, found {found[name]}"
        for name in sorted(wanted.keys() & found.keys())
        if wanted[name] != found[name]
    ]
    if problems:
        raise ArtifactError("\n".join([*problems, f"{path}: the weights are not those of {CONFIG_FILE}"]))
