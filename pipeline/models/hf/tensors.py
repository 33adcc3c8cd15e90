"""The weights of a directory of Hugging Face's: one safetensors file, or several with an index. Imports no torch."""

import json
import struct
from pathlib import Path
from typing import Any

from pipeline.errors import ArtifactError
from pipeline.models.files import WEIGHTS_FILE

INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
LARGEST_HEADER = 100_000_000  # bytes; the format's own limit
OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # of the first BERT's files


def tensor_files(directory: Path) -> dict[str, tuple[Path, str]]:
    """Return where each tensor lies: its name today → its file, and its name there. Reads headers only.

    Raises:
        ArtifactError: If there are no weights, only pickled ones, or damaged ones.
    """
    if (directory / INDEX_FILE).is_file():
        files = [directory / name for name in sorted(_indexed(directory / INDEX_FILE))]
    elif (directory / WEIGHTS_FILE).is_file():
        files = [directory / WEIGHTS_FILE]
    elif any((directory / name).is_file() for name in PICKLES):
        raise ArtifactError(
            f"{directory}: the weights are in {PICKLES[0]}, a pickle, which can run any code when it is read; load it"
            f" with transformers where you trust it, and save it with save_pretrained, which writes {WEIGHTS_FILE}"
        )
    else:
        raise ArtifactError(f"{directory}: no {WEIGHTS_FILE}; wanted a model in Hugging Face's layout")
    return {_todays_name(name): (file, name) for file in files for name in _header(file) if name != "__metadata__"}


def tensor_names(directory: Path) -> frozenset[str]:
    """Return the names of the tensors in a directory; none if there are no weights yet."""
    if not any((directory / name).is_file() for name in (INDEX_FILE, WEIGHTS_FILE)):
        return frozenset()
    return frozenset(tensor_files(directory))


def _todays_name(name: str) -> str:
    for old, new in OLD_NAMES.items():
        name = name.replace(old, new)
    return name


def _indexed(path: Path) -> set[str]:
    """Return the names of the files that an index names."""
    try:
        names = set(map(str, json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{path}: not an index of weights ({error!r}); copy the model again") from None
    for name in sorted(names):
        if Path(name).name != name or not (path.parent / name).is_file():
            raise ArtifactError(f"{path}: names {name}, which is not there; copy the model again")
    return names


def _header(path: Path) -> dict[str, Any]:
    """Return the header of a safetensors file: a length in 8 bytes, and so many bytes of JSON."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(length) if length <= LARGEST_HEADER else b"")
            ends = [int(tensor["data_offsets"][1]) for name, tensor in header.items() if name != "__metadata__"]
    except (struct.error, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise ArtifactError(f"{path}: damaged, or not in safetensors' format; copy the model again") from None
    wanted, found = 8 + length + max(ends, default=0), path.stat().st_size
    if found != wanted:
        raise ArtifactError(f"{path}: damaged: wanted {wanted} bytes, found {found}; copy the model again")
    return header
