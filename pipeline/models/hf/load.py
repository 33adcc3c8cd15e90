"""A model in Hugging Face's layout becomes ours. transformers is not needed for it, and nothing is fetched."""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.errors import ArtifactError
from pipeline.models.config import AnyModel
from pipeline.models.hf.config import read_layout
from pipeline.models.hf.layout import Layout, Pair
from pipeline.models.hf.tensors import tensor_files
from pipeline.models.transformer import Transformer
from pipeline.models.weights import weights

# Weights that have a row for each id; ours have rows after the last id, which are padding.
ROWS_OF_IDS = ("embedding.weight", "head.weight", "head_bias")


def import_hf(directory: Path) -> Transformer:
    """Return the model of a local directory in one of Hugging Face's layouts, in its precision, ready to evaluate.

    Raises:
        ArtifactError: If there is no model, or one that our settings cannot describe exactly.
    """
    layout, config = read_layout(directory)
    stored = _Stored(directory, layout)
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
        model = Transformer(config)
    state = _from_hf(config, layout, stored)
    stored.check_rest()
    model.load_state_dict(state, assign=True)
    return model.eval()


class _Stored:
    """The tensors of a directory, each read when it is taken."""

    def __init__(self, directory: Path, layout: Layout) -> None:
        self.directory, self.layout = directory, layout
        self.where = tensor_files(directory)
        self.taken: set[str] = set()
        self.fused = any(name.endswith("experts.gate_up_proj") for name in self.where)

    def take(self, name: str) -> Tensor:
        """Return a tensor by the name that it has in the layout."""
        here = name if name in self.where else name.removeprefix(self.layout.prefix)
        if here not in self.where:
            raise ArtifactError(f"{self.directory}: no weight '{name}', which {self.layout.architecture} needs")
        self.taken.add(here)
        path, key = self.where[here]
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(key)
        except SafetensorError as error:
            raise ArtifactError(f"{path}: damaged ({error}); copy the model again") from None
        return tensor

    def check_rest(self) -> None:
        """Raise ArtifactError if a tensor is left that is neither a second copy of another nor no weight at all."""
        problems = []
        for name in sorted(self.where.keys() - self.taken):
            if (same := self.layout.copies.get(name)) is not None:
                if not torch.equal(self.take(name), self.take(same)):
                    problems.append(f"'{name}' is not the same as '{same}', to which it is tied")
            elif not any(re.search(pattern, name) for pattern in self.layout.ignored):
                problems.append(f"unknown weight '{name}'")
        if problems:
            raise ArtifactError("\n".join(f"{self.directory}: {problem}" for problem in problems))


def _from_hf(config: AnyModel, layout: Layout, stored: _Stored) -> dict[str, Tensor]:
    """Return our weights, all of the type that the embedding has."""
    state = dict(_ours(config, layout, stored))
    dtype = state["embedding.weight"].dtype
    if odd := [name for name, tensor in state.items() if not tensor.is_floating_point()]:
        raise ArtifactError(
            f"{stored.directory}: '{odd[0]}': wanted numbers with a fraction, found {state[odd[0]].dtype}"
        )
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def _ours(config: AnyModel, layout: Layout, stored: _Stored) -> Iterator[tuple[str, Tensor]]:
    shapes = {weight.name: weight.shape for weight in weights(config)}
    for pair in layout.pairs(config, stored.fused):
        tensor = _joined(pair, [stored.take(name) for name in pair.theirs])
        wanted = [_without_padding(name, shapes[name], config) for name in pair.ours]
        whole = list(wanted[0])
        whole[pair.dim] = sum(shape[pair.dim] for shape in wanted)
        if list(tensor.shape) != whole:
            found = tuple(tensor.shape)
            raise ArtifactError(f"{stored.directory}: '{pair.theirs[0]}': wanted shape {tuple(whole)}, found {found}")
        parts = torch.split(tensor, [shape[pair.dim] for shape in wanted], dim=pair.dim)
        for name, part in zip(pair.ours, parts, strict=True):
            ours = part.new_zeros(shapes[name])  # its own memory; rows that pad the vocabulary are zero
            ours[: len(part)] = part
            yield name, ours


def _joined(pair: Pair, tensors: list[Tensor]) -> Tensor:
    tensor = torch.stack(tensors) if pair.stacked else tensors[0]
    return tensor.T if pair.transposed else tensor


def _without_padding(name: str, shape: tuple[int, ...], config: AnyModel) -> tuple[int, ...]:
    return (config.real_vocab_size, *shape[1:]) if name in ROWS_OF_IDS else shape
