"""The first weights of a model: each drawn by itself from a seed and its name."""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.models.classifier import Classifier
from pipeline.models.config import AnyModel, EncoderDecoder
from pipeline.models.transfer import VOCABULARY
from pipeline.models.transformer import Transformer
from pipeline.models.weights import weights

RESIDUAL = ("attention.out.weight", "cross.out.weight", "mlp.down.weight", "mlp.experts.down", "mlp.shared.down.weight")


@torch.no_grad()
def init_weights(model: Transformer | Classifier, seed: int) -> None:
    """Give every parameter of a whole model its `first_weight`."""
    config = (model.trunk if isinstance(model, Classifier) else model).config
    for name, parameter in model.named_parameters():
        parameter.copy_(first_weight(config, name, parameter.shape, seed))


def first_weight(config: AnyModel, name: str, shape: Sequence[int], seed: int) -> Tensor:
    """Draw a parameter, in fp32 on the CPU, from a generator of its own: neither order nor device change the draw.

    Matrices are normal with `init_std`; those that write to the residual stream are divided by the square root of how
    many do: 2 a layer, 3 with cross attention (Radford et al. 2019, section 2.3). Norms start at one, biases and the
    rows that pad the vocabulary at zero. With `mup_base_width` the hidden matrices are also divided by
    sqrt(d_model / mup_base_width), and so stay as they are at that width (Yang et al. 2022, table 8).

    Args:
        name: Of the parameter in the model, which may be a classifier.
        shape: Of the whole parameter, whoever shares it.
    """
    if len(shape) == 1:
        return torch.full(tuple(shape), 0.0 if name.endswith("bias") else 1.0)
    std = config.init_std / math.sqrt(config.width_ratio) if _is_inside(name) else config.init_std
    if name.endswith(RESIDUAL):
        std /= math.sqrt(_residual_writes(config, name))
    generator = torch.Generator().manual_seed(_seed_of(seed, name))
    weight = torch.empty(tuple(shape)).normal_(0.0, std, generator=generator)
    if shape[0] == config.padded_vocab_size and name.removeprefix("trunk.") in VOCABULARY:
        weight[config.real_vocab_size :] = 0.0
    return weight


def hidden_matrices(config: AnyModel) -> set[str]:
    """Return the names of the matrices inside the blocks: what they read and write grows with the model."""
    return {weight.name for weight in weights(config) if len(weight.shape) >= 2 and _is_inside(weight.name)}


def lr_scales(model: nn.Module, config: AnyModel) -> dict[str, float]:
    """Return what the learning rate of each weight is multiplied with: 1 but under μP.

    There the hidden matrices learn more slowly the wider the model is, with Adam and its kin (Yang et al.
    2022, table 8).
    """
    hidden = hidden_matrices(config)
    names = [name for name, _ in model.named_parameters()]
    return {name: 1 / config.width_ratio if name.removeprefix("trunk.") in hidden else 1.0 for name in names}


def _is_inside(name: str) -> bool:
    return any(part in name for part in ("blocks.", "ahead.", "head_transform.", "pooler."))


def _residual_writes(config: AnyModel, name: str) -> int:
    """Return how many layers write to the residual stream that a weight writes to."""
    if isinstance(config, EncoderDecoder) and "decoder." in name:
        return 3 * config.decoder_layers
    return 2 * config.num_layers


def _seed_of(seed: int, name: str) -> int:
    """Return 63 bits that depend on both, because neighbouring seeds must not give neighbouring draws."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1
