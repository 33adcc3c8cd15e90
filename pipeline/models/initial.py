"""The first weights of a model: each drawn by itself from a seed and its name."""

import hashlib
import math

import torch
from torch import nn

from pipeline.models.classifier import Classifier
from pipeline.models.config import AnyModel, EncoderDecoder
from pipeline.models.transfer import VOCABULARY
from pipeline.models.transformer import Transformer

RESIDUAL = ("attention.out.weight", "cross.out.weight", "mlp.down.weight", "mlp.experts.down", "mlp.shared.down.weight")


@torch.no_grad()
def init_weights(model: Transformer | Classifier, seed: int) -> None:
    """Draw every weight anew, each from a generator of its own, so that the order of construction changes nothing.

    Matrices are normal with `init_std`; those that write to the residual stream are divided by the square root of how
    many do: 2 a layer, 3 with cross attention (Radford et al. 2019, section 2.3). Norms start at one, biases and the
    rows that pad the vocabulary at zero. With `mup_base_width` the hidden matrices are also divided by
    sqrt(d_model / mup_base_width), and so stay as they are at that width (Yang et al. 2022, table 8).
    """
    config = (model.trunk if isinstance(model, Classifier) else model).config
    hidden = hidden_matrices(model)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        std = config.init_std / math.sqrt(config.width_ratio) if name in hidden else config.init_std
        if name.endswith(RESIDUAL):
            std /= math.sqrt(_residual_writes(config, name))
        generator = torch.Generator().manual_seed(_seed_of(seed, name))
        # Drawn in fp32 on the CPU, so that neither device nor precision changes the draw.
        parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
        if parameter.shape[0] == config.padded_vocab_size and name.removeprefix("trunk.") in VOCABULARY:
            parameter[config.real_vocab_size :] = 0.0


def hidden_matrices(model: nn.Module) -> set[str]:
    """Return the names of the matrices inside the blocks: what they read and write grows with the model."""
    inside = ("blocks.", "ahead.", "head_transform.", "pooler.")
    return {name for name, p in model.named_parameters() if p.ndim >= 2 and any(part in name for part in inside)}


def lr_scales(model: nn.Module, config: AnyModel) -> dict[str, float]:
    """Return what the learning rate of each weight is multiplied with: 1 but under μP.

    There the hidden matrices learn more slowly the wider the model is, with Adam and its kin (Yang et al.
    2022, table 8).
    """
    hidden = hidden_matrices(model)
    return {name: 1 / config.width_ratio if name in hidden else 1.0 for name, _ in model.named_parameters()}


def _residual_writes(config: AnyModel, name: str) -> int:
    """Return how many layers write to the residual stream that a weight writes to."""
    if isinstance(config, EncoderDecoder) and "decoder." in name:
        return 3 * config.decoder_layers
    return 2 * config.num_layers


def _seed_of(seed: int, name: str) -> int:
    """Return 63 bits that depend on both, because neighbouring seeds must not give neighbouring draws."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1
