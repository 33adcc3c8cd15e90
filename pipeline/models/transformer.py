"""The Transformer, a classifier on top of it, their first weights, and how both are saved and loaded.

Letters of the shape suffixes as in `layers`: B rows, T positions, D d_model, V ids of the vocabulary, C classes.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.errors import ArtifactError, ConfigError
from pipeline.models.config import CONFIG_FILE, WEIGHTS_FILE, Decoder, ModelFile, read_config
from pipeline.models.layers import (
    IGNORED_LABEL,
    Block,
    Cache,
    document_mask,
    document_positions,
    make_norm,
    make_rotary,
    summed_cross_entropy,
)
from pipeline.settings import encode


class Transformer(nn.Module):
    """A causal language model. `init_weights` gives it weights that depend on a seed alone."""

    def __init__(self, config: Decoder) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model)
        learned = config.positions == "learned"
        self.position_embedding = nn.Embedding(config.max_seq_len, config.d_model) if learned else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = make_norm(config)
        tied = config.tie_embeddings
        self.head = None if tied else nn.Linear(config.d_model, config.padded_vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """Return the weight of the output layer, one row for each row of the embedding."""
        return self.embedding.weight if self.head is None else self.head.weight

    def hidden(self, ids_BT: Tensor, cache: Cache | None = None, documents_BT: Tensor | None = None) -> Tensor:
        """Return what the last layer knows at each position, (B, T, D), the final norm applied.

        Args:
            cache: If given, `ids_BT` continues what it holds, and is added to it.
            documents_BT: If given (and no cache), numbers the documents of each row: no position sees another
                document, and positions count from the beginning of each.

        Raises:
            ConfigError: If there are more positions than `max_seq_len`.
        """
        num_new = ids_BT.shape[1]
        if num_new > self.config.max_seq_len and cache is None:
            raise ConfigError(
                f"max_seq_len: the model reads {self.config.max_seq_len} positions, found {num_new};"
                " cut the text, or train a model with a larger max_seq_len"
            )
        positions, mask = self._visible(ids_BT, cache, documents_BT)
        x_BTD = self.embedding(ids_BT)
        if self.position_embedding is not None:
            x_BTD = x_BTD + self.position_embedding(positions)
        x_BTD = self.dropout(x_BTD)
        rotary = make_rotary(positions, self.config, x_BTD.dtype) if self.config.positions == "rotary" else None
        for layer, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, rotary, mask, None if cache is None else cache.layers[layer])
        normed_BTD: Tensor = self.norm(x_BTD)
        return normed_BTD

    def _visible(
        self, ids_BT: Tensor, cache: Cache | None, documents_BT: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the positions, (T) or (B, T), and which keys each may see; null is all that are not later."""
        num_new = ids_BT.shape[1]
        if cache is not None:
            return cache.positions(num_new), cache.mask(num_new)
        if documents_BT is not None:
            return document_positions(documents_BT), document_mask(documents_BT)
        return torch.arange(num_new, device=ids_BT.device), None

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Return a score for each id of the vocabulary, (..., V), from what `hidden` returns.

        The rows that pad the embedding are cut off, so nobody can ever sample them.
        """
        return F.linear(x_BTD, self.head_weight)[..., : self.config.real_vocab_size]

    def loss(self, x_BTD: Tensor, labels_BT: Tensor) -> Tensor:
        """Return the sum of the cross entropies over the real vocabulary, a scalar in fp32; -100 is left out."""
        return summed_cross_entropy(
            x_BTD.flatten(0, 1), self.head_weight, labels_BT.flatten(), self.config.real_vocab_size
        )

    def forward(
        self,
        ids_BT: Tensor,
        labels_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return the summed loss of `labels_BT`, or without labels the logits (B, T, V).

        Note: labels are not shifted here. `labels_BT[b, t]` is the id that follows `ids_BT[b, t]`, or -100.
        """
        x_BTD = self.hidden(ids_BT, cache, documents_BT)
        return self.logits(x_BTD) if labels_BT is None else self.loss(x_BTD, labels_BT)


class Classifier(nn.Module):
    """A linear layer on the mean of a Transformer's last layer, taken over the positions that are not padding."""

    def __init__(self, trunk: Transformer, num_classes: int, labels: Sequence[str] | None = None) -> None:
        """Put a classifier on `trunk`; `labels` names the classes, by default "0", "1" and so on."""
        super().__init__()
        self.labels = [str(c) for c in range(num_classes)] if labels is None else list(labels)
        if len(self.labels) != num_classes:
            raise ConfigError(f"labels: wanted {num_classes} names, one for each class, found {len(self.labels)}")
        self.trunk = trunk
        self.head = nn.Linear(trunk.config.d_model, num_classes)

    def forward(self, ids_BT: Tensor, mask_BT: Tensor, labels_B: Tensor | None = None) -> Tensor:
        """Return logits (B, C), or the summed loss of `labels_B`, a scalar in fp32.

        Args:
            mask_BT: True at real positions. Padding must come after them: then no real position sees it.
        """
        x_BTD = self.trunk.hidden(ids_BT)
        weight_BT1 = mask_BT.unsqueeze(-1).to(x_BTD.dtype)
        mean_BD = (x_BTD * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1)
        logits_BC: Tensor = self.head(mean_BD)
        if labels_B is None:
            return logits_BC
        return F.cross_entropy(logits_BC.float(), labels_B, reduction="sum", ignore_index=IGNORED_LABEL)


@torch.no_grad()
def init_weights(model: Transformer | Classifier, seed: int) -> None:
    """Draw every weight anew, each from a generator of its own, so that the order of construction changes nothing.

    Matrices are normal with `init_std`; those that write to the residual stream are divided by sqrt(2 * num_layers)
    (Radford et al. 2019, section 2.3). Norms start at one, biases and the rows that pad the vocabulary at zero.
    """
    config = (model.trunk if isinstance(model, Classifier) else model).config
    residual_std = config.init_std / math.sqrt(2 * config.num_layers)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        generator = torch.Generator().manual_seed(_seed_of(seed, name))
        writes_residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
        std = residual_std if writes_residual else config.init_std
        # Drawn in fp32 on the CPU, so that neither device nor precision changes the draw.
        parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
        if parameter.shape[0] == config.padded_vocab_size and name.endswith(("embedding.weight", "head.weight")):
            parameter[config.real_vocab_size :] = 0.0


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


def _seed_of(seed: int, name: str) -> int:
    """Return 63 bits that depend on both, because neighbouring seeds must not give neighbouring draws."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1
