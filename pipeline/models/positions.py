"""Where tokens are: positions within documents, rotary angles, sinusoids, and biases for distances.

Letters of the shape suffixes: B rows, T positions that look (queries), S positions that are seen (keys), K size of a
head, H heads, D d_model.
"""

import math

import torch
from torch import Tensor, nn

from pipeline.models.config import Shape
from pipeline.models.parts import LinearScaling, Llama3Scaling, YarnScaling

Rotary = tuple[Tensor, Tensor]


def make_rotary(positions: Tensor, config: Shape, dtype: torch.dtype, theta: float | None = None) -> Rotary:
    """Return the cosines and the signed sines that `rotate` takes, each (*positions.shape, 1, K).

    Rotary positions (Su et al. 2021, arXiv:2104.09864) in Llama's convention: dimension i is paired with i + K/2.
    The angles are computed in fp32 and rounded to `dtype` at the end, as Hugging Face's Llama does. They are no buffer,
    so that converting the model to bf16 cannot round them before.

    Args:
        theta: Null is the model's `rope_theta`.
    """
    theta = theta or config.rope_theta
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim
    frequencies, sharpness = _scaled(1.0 / theta**exponents, config, theta)
    angles = positions[..., None].float() * frequencies
    cos, sin = angles.cos() * sharpness, angles.sin() * sharpness
    pair = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
    return pair[0].unsqueeze(-2).to(dtype), pair[1].unsqueeze(-2).to(dtype)


def rotate(x_BTHK: Tensor, rotary: Rotary) -> Tensor:
    """Turn every pair (a, b) of a head by the angle of its position: (a cos - b sin, b cos + a sin)."""
    cos, signed_sin = rotary
    return torch.addcmul(x_BTHK * cos, x_BTHK.roll(x_BTHK.shape[-1] // 2, dims=-1), signed_sin)


def _scaled(frequencies: Tensor, config: Shape, theta: float) -> tuple[Tensor, float]:
    """Return the frequencies as `rope_scaling` stretches them, and what cosines and sines are multiplied with."""
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies, 1.0
    if isinstance(scaling, LinearScaling):
        return frequencies / scaling.factor, 1.0
    turns = scaling.original_max_seq_len * frequencies / (2 * math.pi)  # over the original positions
    if isinstance(scaling, Llama3Scaling):
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / scaling.factor), 1.0
    kept = _yarn_ramp(scaling, config, theta)
    kept = kept.to(frequencies.device)
    return frequencies * (kept + (1 - kept) / scaling.factor), 0.1 * math.log(scaling.factor) + 1.0


def _yarn_ramp(scaling: YarnScaling, config: Shape, theta: float) -> Tensor:
    """Return how much of each frequency is kept: all of the fast ones, none of the slow, a line between, (K/2)."""

    def dimension(turns: float) -> float:
        """Return the dimension that turns so often over the original positions."""
        ratio = scaling.original_max_seq_len / (turns * 2 * math.pi)
        return config.head_dim * math.log(ratio) / (2 * math.log(theta))

    first = max(math.floor(dimension(scaling.beta_fast)), 0)
    last = min(math.ceil(dimension(scaling.beta_slow)), config.head_dim - 1)
    steps = torch.arange(config.head_dim // 2, dtype=torch.float32)
    return 1 - ((steps - first) / max(last - first, 0.001)).clamp(0, 1)


def sinusoids(positions: Tensor, d_model: int) -> Tensor:
    """Return the positions of the original Transformer (Vaswani et al. 2017, section 3.5), (*positions.shape, D).

    The sines come first and then the cosines, which is the paper's up to a permutation of the dimensions.
    """
    exponents = torch.arange(0, d_model, 2, device=positions.device).float() / d_model
    angles = positions[..., None].float() / 10000.0**exponents
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class RelativeBias(nn.Module):
    """A learned number for each head and distance, logarithmic for far ones (Raffel et al. 2020, section 2.1)."""

    def __init__(self, config: Shape, bidirectional: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.relative_buckets, config.num_heads))
        self.bidirectional, self.max_distance = bidirectional, config.relative_max_distance

    def forward(self, queries_T: Tensor, keys_S: Tensor) -> Tensor:
        """Return what is added to the scores, (1, H, T, S), for positions along a row."""
        bias_TSH = self.weight[self._bucket(keys_S - queries_T.unsqueeze(1))]
        return bias_TSH.permute(2, 0, 1).unsqueeze(0)

    def _bucket(self, distance_TS: Tensor) -> Tensor:
        """Return the bucket of key minus query: half of them exact, the others ever wider up to `max_distance`."""
        count = len(self.weight)
        if self.bidirectional:
            count //= 2
            side_TS = (distance_TS > 0).long() * count
            distance_TS = distance_TS.abs()
        else:
            side_TS = torch.zeros_like(distance_TS)
            distance_TS = (-distance_TS).clamp(min=0)
        exact = count // 2
        growth = math.log(self.max_distance / exact)
        far_TS = exact + (torch.log(distance_TS.float().clamp(min=1) / exact) / growth * (count - exact)).long()
        return side_TS + distance_TS.where(distance_TS < exact, far_TS.clamp(max=count - 1))


def document_positions(documents_BT: Tensor) -> Tensor:
    """Return the position of each id within its document, (B, T), from 0 where `documents_BT` changes along a row."""
    columns_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    begins_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    begins_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    first_BT: Tensor = torch.where(begins_BT, columns_T, 0).cummax(1).values
    return columns_T - first_BT
