"""The layers of the Transformer in plain torch: rotary positions, attention with its cache, feed-forward, and the loss.

Letters of the shape suffixes: B rows, T positions fed now, S positions attended to (those in the cache and the T),
D d_model, H query heads, G key and value heads, K size of a head, F width of the feed-forward layer,
N tokens (rows and positions as one), V rows of the embedding.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipeline.models.config import Decoder

# Tokens whose logits exist at one time. Measured on two cores at 4096 tokens, d_model 256 and 4096 ids: from 128 to
# 1024 there is no difference, and the loss takes half the time that F.cross_entropy on all logits takes.
CPU_CHUNK_TOKENS = 512
# An accelerator reads and writes the gradient of the whole weight once a chunk, so there must be fewer of them.
CHUNK_TOKENS = 4096
IGNORED_LABEL = -100


def make_norm(config: Decoder) -> nn.Module:
    """Return RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) or LayerNorm over the last dimension."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.d_model, eps=config.norm_eps)
    return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)


def make_rotary(positions: Tensor, config: Decoder, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the cosines and the signed sines that `rotate` takes, each (*positions.shape, 1, K).

    Rotary positions (Su et al. 2021, arXiv:2104.09864) in Llama's convention: dimension i is paired with i + K/2.
    The angles are computed in fp32 and rounded to `dtype` at the end, as Hugging Face's Llama does. They are no buffer,
    so that converting the model to bf16 cannot round them before.
    """
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim
    angles = positions[..., None].float() / config.rope_theta**exponents
    cos, sin = angles.cos(), angles.sin()
    pair = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
    return pair[0].unsqueeze(-2).to(dtype), pair[1].unsqueeze(-2).to(dtype)


def rotate(x_BTHK: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn every pair (a, b) of a head by the angle of its position: (a cos - b sin, b cos + a sin)."""
    cos, signed_sin = rotary
    return torch.addcmul(x_BTHK * cos, x_BTHK.roll(x_BTHK.shape[-1] // 2, dims=-1), signed_sin)


def document_positions(documents_BT: Tensor) -> Tensor:
    """Return the position of each id within its document, (B, T), from 0 where `documents_BT` changes along a row."""
    columns_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    begins_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    begins_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    first_BT: Tensor = torch.where(begins_BT, columns_T, 0).cummax(1).values
    return columns_T - first_BT


def document_mask(documents_BT: Tensor) -> Tensor:
    """Return which keys each id may see, (B, 1, T, T): itself and what is before it in its own document."""
    columns_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    same_BTT = documents_BT.unsqueeze(2) == documents_BT.unsqueeze(1)
    return (same_BTT & (columns_T <= columns_T.unsqueeze(1))).unsqueeze(1)


class LayerCache:
    """The keys and values of one layer, in memory that is allocated once."""

    def __init__(self, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> None:
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store new positions and return all there are, (B, G, S, K)."""
        start, self.length = self.length, self.length + k_BGTK.shape[2]
        self.keys[:, :, start : self.length] = k_BGTK
        self.values[:, :, start : self.length] = v_BGTK
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class Cache:
    """What a model has read so far, so that each new position is computed once. Rows may be padded on the left."""

    def __init__(self, config: Decoder, capacity: int, padding_B: Tensor, dtype: torch.dtype = torch.float32) -> None:
        """Allocate the cache.

        Args:
            capacity: How many positions it can hold, padding included.
            padding_B: How many padding ids each row begins with; the cache lies on its device.
        """
        shape = (len(padding_B), config.kv_heads, capacity, config.head_dim)
        self.layers = [LayerCache(shape, padding_B.device, dtype) for _ in range(config.num_layers)]
        self.padding_B = padding_B
        self.last_position = config.max_seq_len - 1

    def positions(self, num_new: int) -> Tensor:
        """Return the positions (B, T) of the next ids; padding, and rows that have reached the limit, stay within."""
        start = self.layers[0].length
        columns_T = torch.arange(start, start + num_new, device=self.padding_B.device)
        return (columns_T - self.padding_B[:, None]).clamp(0, self.last_position)

    def mask(self, num_new: int) -> Tensor:
        """Return which keys each of the next ids may see, (B, 1, T, S): none that is later, none that is padding."""
        start = self.layers[0].length
        keys_S = torch.arange(start + num_new, device=self.padding_B.device)
        queries_T1 = keys_S[start:, None]
        seen_BTS = (keys_S <= queries_T1) & (keys_S >= self.padding_B[:, None, None])
        # Padding sees itself, because a softmax over nothing is not a number; nobody sees padding.
        return (seen_BTS | (keys_S == queries_T1)).unsqueeze(1)


class Attention(nn.Module):
    """Causal self-attention in which several query heads may share one key and value head.

    Note: query, key and value are three products on purpose. One fused product was no faster where we measured it, and
    so every weight is a plain matrix that tensor parallelism can split by rows and an export can copy.
    """

    def __init__(self, config: Decoder) -> None:
        super().__init__()
        kv_width = config.kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.dropout = config.dropout
        self.query = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        self.key = nn.Linear(config.d_model, kv_width, bias=config.bias)
        self.value = nn.Linear(config.d_model, kv_width, bias=config.bias)
        self.out = nn.Linear(config.d_model, config.d_model, bias=config.bias)

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Return (B, T, D). A position sees itself and all before it, or what `mask` allows."""
        per_head = (-1, self.head_dim)  # the number of heads is what is left of them: a rank may hold only some
        q_BTHK = self.query(x_BTD).unflatten(-1, per_head)
        k_BTGK = self.key(x_BTD).unflatten(-1, per_head)
        v_BTGK = self.value(x_BTD).unflatten(-1, per_head)
        if rotary is not None:
            q_BTHK, k_BTGK = rotate(q_BTHK, rotary), rotate(k_BTGK, rotary)
        q_BHTK, k_BGSK, v_BGSK = q_BTHK.transpose(1, 2), k_BTGK.transpose(1, 2), v_BTGK.transpose(1, 2)
        if cache is not None:
            k_BGSK, v_BGSK = cache.append(k_BGSK, v_BGSK)
        mixed_BHTK = F.scaled_dot_product_attention(
            q_BHTK,
            k_BGSK,
            v_BGSK,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None,
            enable_gqa=q_BHTK.shape[1] != k_BGSK.shape[1],
        )
        out_BTD: Tensor = self.out(mixed_BHTK.transpose(1, 2).flatten(-2))
        return out_BTD


class SwiGLU(nn.Module):
    """Feed-forward layer with a gate (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: Decoder) -> None:
        super().__init__()
        self.gate = nn.Linear(config.d_model, config.ff, bias=config.bias)
        self.up = nn.Linear(config.d_model, config.ff, bias=config.bias)
        self.down = nn.Linear(config.ff, config.d_model, bias=config.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return (B, T, D)."""
        out_BTD: Tensor = self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))
        return out_BTD


class GELU(nn.Module):
    """Feed-forward layer of GPT-2: the tanh approximation of GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""

    def __init__(self, config: Decoder) -> None:
        super().__init__()
        self.up = nn.Linear(config.d_model, config.ff, bias=config.bias)
        self.down = nn.Linear(config.ff, config.d_model, bias=config.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return (B, T, D)."""
        out_BTD: Tensor = self.down(F.gelu(self.up(x_BTD), approximate="tanh"))
        return out_BTD


class Block(nn.Module):
    """One layer: attention, then feed-forward, each reading a norm of the residual stream and adding to it."""

    def __init__(self, config: Decoder) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config)
        self.mlp = SwiGLU(config) if config.mlp == "swiglu" else GELU(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Return the residual stream, (B, T, D)."""
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), rotary, mask, cache))
        mlp_BTD: Tensor = self.dropout(self.mlp(self.mlp_norm(x_BTD)))
        return x_BTD + mlp_BTD


def summed_cross_entropy(x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, vocab_size: int) -> Tensor:
    """Return the sum of the cross entropies, a scalar in fp32, over the tokens whose label is not -100.

    The softmax runs over the first `vocab_size` rows of the output layer; rows after them are padding and get no
    gradient. Only some hundred or thousand tokens have logits at one time, and the gradients are computed beside the
    loss, so that nothing as large as all logits is ever kept and no product is computed twice.
    """
    needs_grad = torch.is_grad_enabled()
    loss: Tensor = _ChunkedCrossEntropy.apply(x_ND, weight_VD, labels_N, vocab_size, needs_grad)  # type: ignore[no-untyped-call]
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, vocab_size: int, needs_grad: bool
    ) -> Tensor:
        loss = torch.zeros((), dtype=torch.float32, device=x_ND.device)
        dx_ND = torch.empty_like(x_ND) if needs_grad else None
        # Summed over chunks in fp32: bf16 would lose what a late chunk adds.
        dweight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_grad else None
        num_tokens = CPU_CHUNK_TOKENS if x_ND.device.type == "cpu" else CHUNK_TOKENS
        for start in range(0, len(x_ND), num_tokens):
            chunk = slice(start, start + num_tokens)
            logits_NV = x_ND[chunk] @ weight_VD.T
            logits_NV[:, vocab_size:] = -torch.inf
            part, dlogits_NV = _loss_and_dlogits(logits_NV, labels_N[chunk])
            loss += part
            if dx_ND is not None and dweight_VD is not None:
                dlogits_NV = dlogits_NV.to(x_ND.dtype)
                dx_ND[chunk] = dlogits_NV @ weight_VD
                dweight_VD += dlogits_NV.T @ x_ND[chunk]
        if dx_ND is not None and dweight_VD is not None:
            ctx.save_for_backward(dx_ND, dweight_VD.to(weight_VD.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        dx_ND, dweight_VD = ctx.saved_tensors
        return dx_ND * dloss.to(dx_ND.dtype), dweight_VD * dloss.to(dweight_VD.dtype), None, None, None


def _loss_and_dlogits(logits_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed cross entropy and its gradient with respect to the logits, both in fp32."""
    kept_N1 = (labels_N != IGNORED_LABEL).unsqueeze(1)
    labels_N1 = labels_N.unsqueeze(1).where(kept_N1, 0)
    logp_NV = F.log_softmax(logits_NV, dim=-1, dtype=torch.float32)
    loss = -(logp_NV.gather(1, labels_N1).where(kept_N1, 0.0)).sum()
    dlogits_NV = logp_NV.exp_().scatter_add_(1, labels_N1, logp_NV.new_full(labels_N1.shape, -1.0))
    return loss, dlogits_NV.mul_(kept_N1)
