"""The layers of the Transformer in plain torch: norms, attention, feed-forward, and the block and stack made of them.

Letters of the shape suffixes: B rows, T positions fed now, S positions attended to (those in the cache and the T, or
what the encoder made), D d_model, H query heads, G key and value heads, K size of a head, F width of the feed-forward
layer.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.cache import Cache, LayerCache
from pipeline.models.config import Shape
from pipeline.models.moe import MixtureOfExperts
from pipeline.models.positions import RelativeBias, rotate
from pipeline.models.seams import Seam, nothing
from pipeline.models.sight import Sight, View


def make_norm(config: Shape, width: int | None = None) -> nn.Module:
    """Return RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) or LayerNorm over the last dimension."""
    width = width or config.d_model
    if config.norm == "rmsnorm":
        return nn.RMSNorm(width, eps=config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias)


def activate(x: Tensor, config: Shape) -> Tensor:
    """Apply the activation of `config.mlp`, without its gate."""
    if config.mlp == "swiglu":
        return F.silu(x)
    if config.mlp == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="none" if config.mlp.endswith("exact") else "tanh")


class RowLinear(nn.Linear):
    """A linear layer of which tensor-parallel ranks may each have some input features.

    Attributes:
        leave: Sums what the ranks made of theirs, before the bias is added; null where this rank has all features.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.leave: Seam | None = None

    def forward(self, x_X: Tensor) -> Tensor:
        """Return (..., out_features) for (..., in_features)."""
        if self.leave is None:
            return super().forward(x_X)
        out_X = self.leave(F.linear(x_X, self.weight))
        return out_X if self.bias is None else out_X + self.bias


class Attention(nn.Module):
    """Attention in which several query heads may share one key and value head.

    Note: query, key and value are three products on purpose. One fused product was no faster where we measured it, and
    so every weight is a plain matrix that tensor parallelism can split by rows and an export can copy.

    Attributes:
        enter: What the normed residual stream passes before queries, keys and values; see `models.seams`.
        branch: The random numbers that dropout draws in here, where each rank has other heads than its neighbours.
    """

    branch: Callable[[], AbstractContextManager[None]] = nullcontext

    def __init__(self, config: Shape) -> None:
        super().__init__()
        self.enter: Seam = nothing
        width, kv_width = config.num_heads * config.head_dim, config.kv_heads * config.head_dim
        self.head_dim, self.scale, self.dropout = config.head_dim, config.attention_scale, config.dropout
        self.query = nn.Linear(config.d_model, width, bias=config.bias)
        self.key = nn.Linear(config.d_model, kv_width, bias=config.bias)
        self.value = nn.Linear(config.d_model, kv_width, bias=config.bias)
        self.out = RowLinear(width, config.d_model, bias=config.bias)
        self.query_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.key_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None

    def forward(self, x_BTD: Tensor, sight: Sight, cache: LayerCache | None = None) -> Tensor:
        """Return (B, T, D): each position mixes those of its own row that `sight` shows."""
        x_BTD = self.enter(x_BTD)
        q_BTHK, (k_BTGK, v_BTGK) = self._queries(x_BTD), self._keys_values(x_BTD)
        if sight.rotary is not None:
            q_BTHK, k_BTGK = rotate(q_BTHK, sight.rotary), rotate(k_BTGK, sight.rotary)
        k_BGSK, v_BGSK = k_BTGK.transpose(1, 2), v_BTGK.transpose(1, 2)
        if cache is not None:
            k_BGSK, v_BGSK = cache.append(k_BGSK, v_BGSK)
        return self._mix(q_BTHK, k_BGSK, v_BGSK, sight.mask, sight.causal)

    def cross(self, x_BTD: Tensor, memory_BSD: Tensor, mask: Tensor | None, cache: LayerCache | None) -> Tensor:
        """Return (B, T, D): each position mixes what the encoder made; keys and values are made once for a cache."""
        known = None if cache is None else cache.memory
        if known is None:
            k_BSGK, v_BSGK = self._keys_values(memory_BSD)
            known = k_BSGK.transpose(1, 2), v_BSGK.transpose(1, 2)
        if cache is not None:
            cache.memory = known
        return self._mix(self._queries(self.enter(x_BTD)), *known, mask, causal=False)

    def _queries(self, x_BTD: Tensor) -> Tensor:
        q_BTHK: Tensor = self.query(x_BTD).unflatten(-1, (-1, self.head_dim))  # a rank may hold only some of the heads
        if self.query_norm is not None:
            q_BTHK = self.query_norm(q_BTHK)
        return q_BTHK

    def _keys_values(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        k_BSGK, v_BSGK = (layer(x_BSD).unflatten(-1, (-1, self.head_dim)) for layer in (self.key, self.value))
        return k_BSGK if self.key_norm is None else self.key_norm(k_BSGK), v_BSGK

    def _mix(self, q_BTHK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        q_BHTK, dropout = q_BTHK.transpose(1, 2), self.dropout if self.training else 0.0
        with self.branch() if dropout else nullcontext():
            mixed_BHTK = F.scaled_dot_product_attention(
                q_BHTK,
                k_BGSK,
                v_BGSK,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=causal and mask is None,
                scale=self.scale,
                enable_gqa=q_BHTK.shape[1] != k_BGSK.shape[1],
            )
        out_BTD: Tensor = self.out(mixed_BHTK.transpose(1, 2).flatten(-2))
        return out_BTD


class FeedForward(nn.Module):
    """Feed-forward layer, with a gate (Shazeer 2020, arXiv:2002.05202) or without one."""

    def __init__(self, config: Shape, width: int) -> None:
        super().__init__()
        self.config = config
        self.enter: Seam = nothing
        self.gate = nn.Linear(config.d_model, width, bias=config.bias) if config.gated else None
        self.up = nn.Linear(config.d_model, width, bias=config.bias)
        self.down = RowLinear(width, config.d_model, bias=config.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return (B, T, D)."""
        x_BTD = self.enter(x_BTD)
        if self.gate is None:
            inner_BTF = activate(self.up(x_BTD), self.config)
        else:
            inner_BTF = activate(self.gate(x_BTD), self.config) * self.up(x_BTD)
        out_BTD: Tensor = self.down(inner_BTF)
        return out_BTD


class Block(nn.Module):
    """One layer: attention, cross attention where there is an encoder to read, then feed-forward.

    Each adds to the residual stream what it makes of a norm of it, or with `norm_placement` "post" the sum is normed.
    """

    def __init__(self, config: Shape, layer: int, cross: bool = False) -> None:
        super().__init__()
        self.post_norm, self.is_local = config.norm_placement == "post", config.is_local(layer)
        normed = config.embedding_norm and layer == 0 and not self.post_norm  # the embedding's norm has done it
        self.attention_norm = None if normed else make_norm(config)
        self.attention = Attention(config)
        self.cross_norm = make_norm(config) if cross else None
        self.cross = Attention(config) if cross else None
        self.mlp_norm = make_norm(config)
        self.mlp = MixtureOfExperts(config) if config.has_experts(layer) else FeedForward(config, config.ff)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, view: View, cache: LayerCache | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the residual stream, (B, T, D), and the losses of a mixture of experts, (2), if it is one."""
        sight = view.nearby if self.is_local else view.everywhere
        seen_BTD = self.attention(self._before(x_BTD, self.attention_norm), sight, cache)
        x_BTD = self._after(x_BTD, seen_BTD, self.attention_norm)
        if self.cross is not None and view.memory_BSD is not None:
            normed_BTD = self._before(x_BTD, self.cross_norm)
            read_BTD = self.cross.cross(normed_BTD, view.memory_BSD, view.memory_mask, cache)
            x_BTD = self._after(x_BTD, read_BTD, self.cross_norm)
        normed_BTD, losses = self._before(x_BTD, self.mlp_norm), None
        if isinstance(self.mlp, MixtureOfExperts):
            made_BTD, losses = self.mlp(normed_BTD, view.ids_BT, view.real_BT)
        else:
            made_BTD = self.mlp(normed_BTD)
        return self._after(x_BTD, made_BTD, self.mlp_norm), losses

    def _before(self, x_BTD: Tensor, norm: nn.Module | None) -> Tensor:
        return x_BTD if self.post_norm or norm is None else norm(x_BTD)

    def _after(self, x_BTD: Tensor, made_BTD: Tensor, norm: nn.Module | None) -> Tensor:
        x_BTD = x_BTD + self.dropout(made_BTD)
        return norm(x_BTD) if self.post_norm and norm is not None else x_BTD


class Stack(nn.Module):
    """The layers of an encoder or a decoder, one on another.

    Attributes:
        scatter: What the residual stream passes before the first layer, and `gather` after the last; between them a
            rank may have only some of the positions; see `models.seams`.
        enter_memory: What the encoder made passes before all layers that read it.
    """

    def __init__(self, config: Shape, num_layers: int, bidirectional: bool, cross: bool = False) -> None:
        super().__init__()
        self.scatter: Seam = nothing
        self.gather: Seam = nothing
        self.enter_memory: Seam = nothing
        self.blocks = nn.ModuleList(Block(config, layer, cross) for layer in range(num_layers))
        self.relative = RelativeBias(config, bidirectional) if config.positions == "relative" else None
        self.norm = None if config.norm_placement == "post" else make_norm(config)

    def forward(self, x_BTD: Tensor, view: View, cache: Cache | None = None) -> tuple[Tensor, Tensor]:
        """Return the residual stream, (B, T, D), without the last norm, and the losses of all experts, (2)."""
        total = x_BTD.new_zeros(2, dtype=torch.float32)
        x_BTD = self.scatter(x_BTD)
        for number, block in enumerate(self.blocks):
            x_BTD, losses = block(x_BTD, view, None if cache is None else cache.layers[number])
            total = total if losses is None else total + losses
        return self.gather(x_BTD), total

    def finish(self, x_BTD: Tensor) -> Tensor:
        """Apply the last norm, if there is one."""
        return x_BTD if self.norm is None else self.norm(x_BTD)
