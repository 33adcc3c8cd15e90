"""Routers: which experts of a mixture each token has, with what weights, and what the choice costs.

Letters of the shape suffixes: B rows, T positions, N tokens (rows and positions as one), D d_model, E experts,
K experts that a token may have, A assignments (a token, and an expert that may compute it).
"""

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.config import Shape
from pipeline.models.parts import ExpertChoice, Experts, TokenChoice

NUM_TOTALS = 3  # of Router.counts, after the load of each expert: tokens, assignments, those that were dropped
_TINY = 1e-20  # keeps a sum of scores that are all 0 from being divided by
_32_BITS = 0xFFFFFFFF


class Routing(NamedTuple):
    """The experts of each token.

    Attributes:
        experts_NK: Their numbers.
        weights_NK: What their outputs are multiplied with.
        taken_NK: False where the expert does not compute the token: padding, or more than it has room for. Null where
            all are taken.
        losses: The balance loss and the router's z-loss, (2), each a mean over the tokens of a row, summed over rows,
            so that it does not matter which rows are fed together.
    """

    experts_NK: Tensor
    weights_NK: Tensor
    taken_NK: Tensor | None
    losses: Tensor


class Router(nn.Module):
    """What all routers share: the statistics of the tokens routed in training since they were last reset.

    Note: activation checkpointing routes everything twice and so counts everything twice. All that is made of the
    counts are ratios, which stay what they are.

    Plain attributes, made when they are first needed: buffers would be converted to bf16 with the weights, and left
    empty in a model that is built without memory and then loaded.

    Attributes:
        counts: How many tokens wanted each expert (E), and the `NUM_TOTALS`; integers, so that their sums are exact.
            Null if there were none.
        entropy: Sum over tokens of the entropy of their shares, in nats; null where nothing is learned.
    """

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.counts: Tensor | None = None
        self.entropy: Tensor | None = None

    def take_totals(self, device: torch.device) -> Tensor:
        """Return the counts and, last, the entropy, (E + NUM_TOTALS + 1) in fp64, and forget them."""
        counts, entropy = self.counts, self.entropy
        self.counts = self.entropy = None
        size = self.num_experts + NUM_TOTALS
        counts = torch.zeros(size, device=device) if counts is None else counts
        entropy = torch.zeros((), device=device) if entropy is None else entropy
        return torch.cat([counts.double(), entropy.double().view(1)])

    def forward(self, x_BTD: Tensor, ids_BT: Tensor, real_BT: Tensor | None) -> Routing:
        """Route tokens; those that are not real have no expert."""
        raise NotImplementedError

    def _record(self, load_E: Tensor, real_BT: Tensor, assignments: Tensor, dropped: Tensor) -> None:
        counts = torch.cat([load_E, torch.stack([real_BT.sum(), assignments, dropped])])
        before = torch.zeros_like(counts) if self.counts is None else self.counts  # an addition each time: what is
        self.counts = before + counts  # done again in the backward pass must be the same operations

    def _record_entropy(self, share_BTE: Tensor, real_BT: Tensor) -> None:
        entropy = torch.special.entr(share_BTE.detach()).sum(-1).where(real_BT, 0.0).sum()
        self.entropy = (torch.zeros_like(entropy) if self.entropy is None else self.entropy) + entropy


class LearnedRouter(Router):
    """A router with weights. Its scores are computed in fp32, as Fedus et al. (2022, arXiv:2101.03961) advise."""

    def __init__(self, config: Shape, num_experts: int) -> None:
        super().__init__(num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, config.d_model))
        nn.init.normal_(self.weight, std=config.init_std)

    def _logits(self, x_BTD: Tensor) -> Tensor:
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        return F.linear(x_BTD.to(dtype), self.weight.to(dtype))


class TokenChoiceRouter(LearnedRouter):
    """Every token chooses its best experts; an expert that has a capacity takes the first of each row.

    Note: first by position, not by score or by rank of choice, so that no token's fate depends on a later one. In
    evaluation nothing is dropped: what a token gets must not depend on the tokens it is fed with.
    """

    balance_bias: Tensor | None

    def __init__(self, config: Shape, experts: Experts, settings: TokenChoice) -> None:
        super().__init__(config, experts.count)
        self.settings = settings
        bias = None if experts.balance_bias_rate is None else torch.zeros(experts.count)
        self.register_buffer("balance_bias", bias)

    def forward(self, x_BTD: Tensor, ids_BT: Tensor, real_BT: Tensor | None) -> Routing:
        """Route tokens by what they are."""
        logits_BTE = self._logits(x_BTD)
        if self.settings.scores == "softmax":
            share_BTE = scores_BTE = logits_BTE.softmax(-1)
        else:
            scores_BTE = logits_BTE.sigmoid()
            share_BTE = scores_BTE / scores_BTE.sum(-1, keepdim=True).clamp_min(_TINY)
        # The bias has a say in the choice, and none in the weights (Wang et al. 2024, arXiv:2408.15664).
        biased_BTE = scores_BTE.detach() if self.balance_bias is None else scores_BTE.detach() + self.balance_bias
        experts_BTK = biased_BTE.topk(self.settings.top_k, dim=-1).indices
        weights_BTK = scores_BTE.gather(-1, experts_BTK)
        if self.settings.renormalize:
            weights_BTK = weights_BTK / weights_BTK.sum(-1, keepdim=True).clamp_min(_TINY)
        taken_BTK = self._taken(experts_BTK, real_BT)
        real_BT = _mask(ids_BT, real_BT)
        wanted_BE = _wanted(experts_BTK, real_BT, self.num_experts)
        if self.training:
            wanted = wanted_BE.sum()
            dropped = torch.zeros_like(wanted) if taken_BTK is None else wanted - taken_BTK.sum()
            self._record(wanted_BE.sum(0), real_BT, wanted, dropped)
            self._record_entropy(share_BTE, real_BT)
        losses = torch.stack([_balance_loss(share_BTE, wanted_BE, real_BT), _z_loss(logits_BTE, real_BT)])
        taken_NK = None if taken_BTK is None else taken_BTK.flatten(0, 1)
        return Routing(experts_BTK.flatten(0, 1), weights_BTK.flatten(0, 1), taken_NK, losses)

    def _taken(self, experts_BTK: Tensor, real_BT: Tensor | None) -> Tensor | None:
        factor, ids_BT = self.settings.capacity_factor, experts_BTK[..., 0]
        if factor is None or not self.training:
            return None if real_BT is None else real_BT.unsqueeze(-1).expand_as(experts_BTK)
        real_BT = _mask(ids_BT, real_BT)
        capacity_B = _capacity(factor * self.settings.top_k, real_BT, self.num_experts)
        rows_B11 = torch.arange(len(real_BT), device=real_BT.device).view(-1, 1, 1)
        groups_BTK = (rows_B11 * self.num_experts + experts_BTK).masked_fill(~real_BT.unsqueeze(-1), -1) + 1
        num_groups = len(real_BT) * self.num_experts + 1
        ranks_BTK = _ranks(groups_BTK.flatten(), num_groups).view_as(groups_BTK)
        return (ranks_BTK < capacity_B.view(-1, 1, 1)) & real_BT.unsqueeze(-1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Convert all but the bias, which stays in fp32: in bf16 its steps would be lost."""
        bias = self.balance_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if bias is not None and self.balance_bias is not None and not bias.is_meta:
            self.balance_bias = bias.to(self.balance_bias.device)
        return self


class ExpertChoiceRouter(LearnedRouter):
    """Every expert takes the tokens of a row that it likes best, in training and in evaluation.

    The load is even by construction, so there is no balance loss. What counts as dropped is a token that nobody takes.
    """

    def __init__(self, config: Shape, experts: Experts, settings: ExpertChoice) -> None:
        super().__init__(config, experts.count)
        self.settings = settings

    def forward(self, x_BTD: Tensor, ids_BT: Tensor, real_BT: Tensor | None) -> Routing:
        """Route tokens by what they are and what else is in their row."""
        logits_BTE = self._logits(x_BTD)
        share_BTE = logits_BTE.softmax(-1)
        real_BT = _mask(ids_BT, real_BT)
        capacity_B = _capacity(self.settings.capacity_factor, real_BT, self.num_experts)
        liked_BTE = share_BTE.detach().masked_fill(~real_BT.unsqueeze(-1), -1.0)
        best_BTE = liked_BTE.argsort(dim=1, descending=True, stable=True)  # stable: of equals the first
        ranks_BTE = best_BTE.argsort(dim=1)
        taken_BTE = (ranks_BTE < capacity_B.view(-1, 1, 1)) & real_BT.unsqueeze(-1)
        if self.training:
            tokens, lost = real_BT.sum(), (real_BT & ~taken_BTE.any(-1)).sum()
            self._record(taken_BTE.sum((0, 1)), real_BT, tokens, lost)
            self._record_entropy(share_BTE, real_BT)
        z_loss = _z_loss(logits_BTE, real_BT)
        experts_NE = torch.arange(self.num_experts, device=x_BTD.device).expand(real_BT.numel(), -1)
        losses = torch.stack([torch.zeros_like(z_loss), z_loss])
        return Routing(experts_NE, share_BTE.flatten(0, 1), taken_BTE.flatten(0, 1), losses)


class HashRouter(Router):
    """The id of a token says which expert it has, with weight 1. Every layer has the same hash; there are no losses."""

    def forward(self, x_BTD: Tensor, ids_BT: Tensor, real_BT: Tensor | None) -> Routing:
        """Route tokens by their ids."""
        experts_BTK = (mixed_bits(ids_BT) % self.num_experts).unsqueeze(-1)
        if self.training:
            mask_BT = _mask(ids_BT, real_BT)
            load_E = _wanted(experts_BTK, mask_BT, self.num_experts).sum(0)
            self._record(load_E, mask_BT, load_E.sum(), torch.zeros_like(load_E[0]))
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        weights_NK = torch.ones(ids_BT.numel(), 1, dtype=dtype, device=x_BTD.device)
        taken_NK = None if real_BT is None else real_BT.reshape(-1, 1)
        return Routing(experts_BTK.flatten(0, 1), weights_NK, taken_NK, weights_NK.new_zeros(2))


def make_router(config: Shape, experts: Experts) -> Router:
    """Return the router that the settings ask for."""
    if isinstance(experts.router, TokenChoice):
        return TokenChoiceRouter(config, experts, experts.router)
    if isinstance(experts.router, ExpertChoice):
        return ExpertChoiceRouter(config, experts, experts.router)
    return HashRouter(experts.count)


def mixed_bits(ids: Tensor) -> Tensor:
    """Return a hash of each id, from 0 to 2^32 - 1: the finalizer of MurmurHash3 (Appleby 2011), which is a bijection.

    Arithmetic of int64 wraps around, so the low 32 bits of a product are right.
    """
    bits = ids & _32_BITS
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = ((bits ^ (bits >> shift)) * factor) & _32_BITS
    return bits ^ (bits >> 16)


def count_groups(groups: Tensor, num_groups: int) -> Tensor:
    """Return how often each number below `num_groups` occurs. Unlike bincount it waits for no accelerator."""
    flat = groups.flatten()
    return torch.zeros(num_groups, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))


def _ranks(groups_A: Tensor, num_groups: int) -> Tensor:
    """Return for each element how many of its group come before it."""
    order_A = groups_A.argsort(stable=True)
    counts = count_groups(groups_A, num_groups)
    starts = counts.cumsum(0) - counts
    ranks_A = torch.empty_like(order_A)
    ranks_A[order_A] = torch.arange(len(order_A), device=order_A.device) - starts[groups_A[order_A]]
    return ranks_A


def _mask(ids_BT: Tensor, real_BT: Tensor | None) -> Tensor:
    return torch.ones_like(ids_BT, dtype=torch.bool) if real_BT is None else real_BT


def _capacity(factor: float, real_BT: Tensor, num_experts: int) -> Tensor:
    """Return how many tokens of each row an expert takes, (B): `factor` times its even share of them, rounded up."""
    # The small number undoes what rounding adds: 1.1 * 100 is more than 110.
    return (real_BT.sum(1).double() * factor / num_experts - 1e-6).ceil().clamp_min(0)


def _wanted(experts_BTK: Tensor, real_BT: Tensor, num_experts: int) -> Tensor:
    """Return how many real tokens of each row chose each expert, (B, E)."""
    ones_BX = real_BT.long().unsqueeze(-1).expand_as(experts_BTK).flatten(1)
    zeros_BE = torch.zeros(len(experts_BTK), num_experts, dtype=torch.int64, device=experts_BTK.device)
    return zeros_BE.scatter_add_(1, experts_BTK.flatten(1), ones_BX)


def _row_means(x_BTX: Tensor, real_BT: Tensor) -> Tensor:
    """Return the mean over the real tokens of each row; 0 for a row without any."""
    mask_BT1 = real_BT.unsqueeze(-1)
    return x_BTX.where(mask_BT1, 0.0).sum(1) / mask_BT1.sum(1).clamp_min(1)


def _balance_loss(share_BTE: Tensor, wanted_BE: Tensor, real_BT: Tensor) -> Tensor:
    """Return E times the product of each expert's part of the choices and its mean share, summed over experts and rows.

    An even load gives 1 for each row (Fedus et al. 2022, arXiv:2101.03961, equation 4, of each row alone; with more
    than one choice DeepSeek-V3's, arXiv:2412.19437, equations 17 to 20).
    """
    part_BE = wanted_BE / wanted_BE.sum(1, keepdim=True).clamp_min(1)
    return share_BTE.shape[-1] * (part_BE.to(share_BTE.dtype) * _row_means(share_BTE, real_BT)).sum()


def _z_loss(logits_BTE: Tensor, real_BT: Tensor) -> Tensor:
    """Return each row's mean squared log of the softmax's normalizer (Zoph et al. 2022, arXiv:2202.08906), summed."""
    return _row_means(logits_BTE.logsumexp(-1, keepdim=True).square(), real_BT).sum()
