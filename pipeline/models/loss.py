"""Losses over a vocabulary that never keep all logits: some hundred or thousand tokens have theirs at one time.

The gradients are computed beside the loss, so no product is computed twice. Where tensor-parallel ranks share the rows
of the output layer, each computes the logits of its own, and only the largest one, the normalizer and the loss travel
(Shoeybi et al. 2019, arXiv:1909.08053, section 3). Letters of the shape suffixes: N tokens,
D d_model, V rows of the embedding, M tokens of one chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Tokens whose logits exist at one time. Measured on two cores at 4096 tokens, d_model 256 and 4096 ids: from 128 to
# 1024 there is no difference, and the loss takes half the time that F.cross_entropy on all logits takes.
CPU_CHUNK_TOKENS = 512
# An accelerator reads and writes the gradient of the whole weight once a chunk, so there must be fewer of them.
CHUNK_TOKENS = 4096
IGNORED_LABEL = -100


@dataclass(frozen=True)
class TokenLoss:
    """What is added to the cross entropy while a model trains.

    Attributes:
        label_smoothing: Share of the target that is spread over the whole vocabulary (Szegedy et al. 2016,
            arXiv:1512.00567).
        z_loss: Weight of the squared logarithm of the softmax's normalizer (PaLM, arXiv:2204.02311, section 5).
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0


@dataclass(frozen=True)
class Output:
    """An output layer: from hidden states to logits.

    Attributes:
        weight_VD: One row for each row of the embedding; those after `vocab_size` are padding.
        bias_V: Null is none.
        scale: What the products are multiplied with.
        softcap: The size that logits are squashed to; null does not.
        first_id: The id that the first row belongs to; 0 but where ranks share the rows.
        group: Those ranks.
    """

    weight_VD: Tensor
    bias_V: Tensor | None
    vocab_size: int
    scale: float = 1.0
    softcap: float | None = None
    first_id: int = 0
    group: dist.ProcessGroup | None = None

    @property
    def num_ids(self) -> int:
        """Return how many of the rows here belong to an id; padding comes after them."""
        return min(max(self.vocab_size - self.first_id, 0), len(self.weight_VD))

    def logits(self, x_MD: Tensor) -> Tensor:
        """Return logits (…, V) for hidden states (…, D); padding rows have some too."""
        logits_MV = F.linear(x_MD if self.scale == 1.0 else x_MD * self.scale, self.weight_VD, self.bias_V)
        return logits_MV if self.softcap is None else self.softcap * torch.tanh(logits_MV / self.softcap)

    def detached(self) -> "Output":
        """Return the same layer without a gradient."""
        bias_V = None if self.bias_V is None else self.bias_V.detach()
        return replace(self, weight_VD=self.weight_VD.detach(), bias_V=bias_V)

    def beside(self, other: "Output") -> "Output":
        """Return the rows of this layer, held whole, that belong to the ids which `other` holds of its own."""
        rows = slice(other.first_id, other.first_id + len(other.weight_VD))
        bias_V = None if self.bias_V is None else self.bias_V[rows]
        return replace(self, weight_VD=self.weight_VD[rows], bias_V=bias_V, first_id=other.first_id, group=other.group)


# From the logits of some tokens, with padding at -inf, and which tokens they are of, to their summed loss and its
# gradient, of the rows that are here; it may overwrite the logits.
Criterion = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


def summed_cross_entropy(x_ND: Tensor, output: Output, labels_N: Tensor, extra: TokenLoss | None = None) -> Tensor:
    """Return the sum of the cross entropies, a scalar in at least fp32, over the tokens whose label is not -100.

    The softmax runs over the ids that exist; rows that pad the embedding get no gradient.

    Args:
        extra: What is added to it.
    """
    extra = extra or TokenLoss()

    def criterion(logits_MV: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        return _cross_entropy(logits_MV, labels_N[chunk], output, extra)

    return _summed(x_ND, output, criterion)


def summed_divergence(
    x_ND: Tensor, output: Output, teacher_x_ND: Tensor, teacher: Output, labels_N: Tensor, temperature: float
) -> Tensor:
    """Return the summed Kullback-Leibler divergence of a teacher's predictions from the student's, in at least fp32.

    Both are softened by `temperature`, and the sum multiplied by its square, so that gradients keep their size (Hinton
    et al. 2015, arXiv:1503.02531). Tokens whose label is -100 do not count.

    Args:
        teacher_x_ND: The teacher's hidden states; its width may be another.
        teacher: Whole on every rank.
    """
    teacher, wide = teacher.beside(output), torch.promote_types(x_ND.dtype, torch.float32)

    def criterion(logits_MV: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        wanted_MV = teacher.logits(teacher_x_ND[chunk]).to(wide)[:, : teacher.num_ids] / temperature
        wanted_logp_MV, _ = _log_softmax(wanted_MV, teacher.group)
        logp_MV, _ = _log_softmax(logits_MV.to(wide) / temperature, output.group)
        kept_M1 = (labels_N[chunk] != IGNORED_LABEL).unsqueeze(1)
        wanted_p_MV = wanted_logp_MV.exp()
        gap_MV = wanted_logp_MV - logp_MV[:, : teacher.num_ids]
        loss = (wanted_p_MV * gap_MV * kept_M1).sum() * temperature**2
        dlogits_MV = logp_MV.exp_()
        dlogits_MV[:, : teacher.num_ids] -= wanted_p_MV
        return loss, dlogits_MV.mul_(kept_M1 * temperature)

    return _summed(x_ND, output, criterion)


def summed_loss(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Return the summed cross entropy over a few classes, a scalar in at least fp32; labels of -100 do not count."""
    logits_BC = logits_BC.to(torch.promote_types(logits_BC.dtype, torch.float32))
    return F.cross_entropy(logits_BC, labels_B, reduction="sum", ignore_index=IGNORED_LABEL)


def labels_ahead(labels_BT: Tensor, documents_BT: Tensor | None, distance: int) -> Tensor:
    """Return the labels `distance` positions later, (B, T), -100 where that is another document or past the end."""
    shifted_BT = torch.full_like(labels_BT, IGNORED_LABEL)
    shifted_BT[:, :-distance] = labels_BT[:, distance:]
    if documents_BT is not None:
        same_BT = documents_BT[:, distance:] == documents_BT[:, :-distance]
        shifted_BT[:, :-distance].masked_fill_(~same_BT, IGNORED_LABEL)
    return shifted_BT


def _summed(x_ND: Tensor, output: Output, criterion: Criterion) -> Tensor:
    needs_grad = torch.is_grad_enabled()
    loss: Tensor = _Chunked.apply(x_ND, output.weight_VD, output.bias_V, output.detached(), criterion, needs_grad)  # type: ignore[no-untyped-call]
    return loss


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        output: Output,
        criterion: Criterion,
        needs_grad: bool,
    ) -> Tensor:
        wide = torch.promote_types(x_ND.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=x_ND.device)
        dx_ND = torch.empty_like(x_ND) if needs_grad else None
        # Summed over chunks in fp32: bf16 would lose what a late chunk adds.
        dweight_VD = torch.zeros_like(weight_VD, dtype=wide) if needs_grad else None
        dbias_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=wide)
        num_tokens = CPU_CHUNK_TOKENS if x_ND.device.type == "cpu" else CHUNK_TOKENS
        for start in range(0, len(x_ND), num_tokens):
            chunk = slice(start, start + num_tokens)
            logits_MV = output.logits(x_ND[chunk])
            slope_MV = None if output.softcap is None else 1 - (logits_MV / output.softcap) ** 2
            logits_MV[:, output.num_ids :] = -torch.inf
            part, dlogits_MV = criterion(logits_MV, chunk)
            loss += part
            if dx_ND is None or dweight_VD is None:
                continue
            if slope_MV is not None:
                dlogits_MV *= slope_MV
            if dbias_V is not None:
                dbias_V += dlogits_MV.sum(0)
            dlogits_MV = (dlogits_MV if output.scale == 1.0 else dlogits_MV * output.scale).to(x_ND.dtype)
            dx_ND[chunk] = dlogits_MV @ weight_VD
            if dlogits_MV.dtype == wide:
                dweight_VD.addmm_(dlogits_MV.T, x_ND[chunk])  # no matrix of its size beside it
            else:
                dweight_VD += dlogits_MV.T @ x_ND[chunk]
            del logits_MV, dlogits_MV, slope_MV  # before the next chunk has its own
        if output.group is not None:
            dist.all_reduce(loss, group=output.group)
        if dx_ND is not None and dweight_VD is not None:
            ctx.has_bias = dbias_V is not None
            dbias = [] if bias_V is None or dbias_V is None else [dbias_V.to(bias_V.dtype)]
            ctx.save_for_backward(dx_ND, dweight_VD.to(weight_VD.dtype), *dbias)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [gradient * dloss.to(gradient.dtype) for gradient in ctx.saved_tensors]
        return scaled[0], scaled[1], scaled[2] if ctx.has_bias else None, None, None, None


def _cross_entropy(logits_MV: Tensor, labels_M: Tensor, output: Output, extra: TokenLoss) -> tuple[Tensor, Tensor]:
    """Return this rank's part of the summed cross entropy, and its gradient with respect to the logits here."""
    kept_M1 = (labels_M != IGNORED_LABEL).unsqueeze(1)
    here_M1, labels_M1 = kept_M1, labels_M.unsqueeze(1) - output.first_id
    if output.group is not None:  # the rank that has the row of a label counts it
        here_M1 = kept_M1 & (labels_M1 >= 0) & (labels_M1 < logits_MV.shape[1])
    labels_M1 = labels_M1.where(here_M1, 0)
    kept_share, spread = 1 - extra.label_smoothing, extra.label_smoothing / output.vocab_size
    logp_MV, normalizer_M1 = _log_softmax(logits_MV, output.group, bool(extra.z_loss))
    losses_M1 = (-kept_share * logp_MV.gather(1, labels_M1)).where(here_M1, 0.0)
    if spread:
        losses_M1 -= spread * logp_MV[:, : output.num_ids].sum(1, keepdim=True)
    if normalizer_M1 is not None:
        losses_M1 += (extra.z_loss * normalizer_M1**2).where(here_M1, 0.0)
    loss = losses_M1.where(kept_M1, 0.0).sum()
    dlogits_MV = logp_MV.exp_()
    if normalizer_M1 is not None:
        dlogits_MV *= 1 + 2 * extra.z_loss * normalizer_M1
    dlogits_MV.scatter_add_(1, labels_M1, here_M1.to(dlogits_MV.dtype) * -kept_share)
    if spread:
        dlogits_MV[:, : output.num_ids] -= spread
    return loss, dlogits_MV.mul_(kept_M1)


def _log_softmax(
    logits_MV: Tensor, group: dist.ProcessGroup | None, with_normalizer: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return the logarithms of the probabilities of the ids here, and of the normalizer, (M, 1), of all ids.

    Both in at least fp32.
    """
    wide = torch.promote_types(logits_MV.dtype, torch.float32)
    if group is None:
        normalizer_M1 = logits_MV.to(wide).logsumexp(1, keepdim=True) if with_normalizer else None
        return F.log_softmax(logits_MV, dim=-1, dtype=wide), normalizer_M1
    logits_MV = logits_MV.to(wide)
    top_M1 = logits_MV.new_full((len(logits_MV), 1), -torch.inf)
    if logits_MV.shape[1]:
        top_M1 = logits_MV.amax(1, keepdim=True)
    dist.all_reduce(top_M1, dist.ReduceOp.MAX, group=group)
    sum_M1 = (logits_MV - top_M1).exp_().sum(1, keepdim=True)
    dist.all_reduce(sum_M1, group=group)
    return logits_MV - top_M1 - sum_M1.log(), top_M1 + sum_M1.log() if with_normalizer else None
