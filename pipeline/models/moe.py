"""Mixture of experts: a feed-forward layer of which each token uses only some parts, chosen by a router.

Tokens are sorted by expert, so that each expert multiplies one contiguous slice; nothing is as large as tokens times
experts but the scores. Sums over the experts of a token are made in a fixed order, so that results repeat bit by bit.

Letters of the shape suffixes: B rows, T positions, N tokens (rows and positions as one), D d_model, E experts, F width
of an expert, K experts that a token may have, A assignments (a token and an expert that computes it), L layers.
"""

from functools import partial
from math import log
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipeline.models.config import Shape
from pipeline.models.routers import NUM_TOTALS, Routing, TokenChoiceRouter, count_groups, make_router
from pipeline.models.seams import Seam, nothing

if TYPE_CHECKING:
    import torch.distributed as dist

MAX_LOADS = 64  # experts of all layers up to which each one's load is logged
ALIGNMENT_BYTES = 16  # of the rows that a grouped product reads


class MixtureOfExperts(nn.Module):
    """Feed-forward layer of experts (Shazeer et al. 2017, arXiv:1701.06538).

    Attributes:
        look: What the tokens pass before the router, which must see all positions; see `models.seams`.
        enter: What passes on from there to the experts, and the weights of what they make.
        leave: What the experts made passes last.
    """

    def __init__(self, config: Shape) -> None:
        """Make a layer by `config.experts`, which must not be null."""
        from pipeline.models.layers import FeedForward  # which imports this module

        super().__init__()
        experts = config.experts
        assert experts is not None
        width = experts.d_ff or config.ff
        self.look: Seam = nothing
        self.enter: Seam = nothing
        self.leave: Seam = nothing
        self.balance_bias_rate = experts.balance_bias_rate
        self.router = make_router(config, experts)
        self.experts = ExpertWeights(config, experts.count, width)
        self.shared = FeedForward(config, experts.shared * width) if experts.shared else None

    def forward(self, x_BTD: Tensor, ids_BT: Tensor, real_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (B, T, D), and the balance loss and the router's z-loss, (2), see `Routing.losses`.

        Args:
            ids_BT: The ids of the tokens.
            real_BT: False at padding, which has no experts and is not counted; null where there is none.
        """
        x_BTD = self.look(x_BTD)
        routing = self.router(x_BTD, ids_BT, real_BT)
        x_BTD = self.enter(x_BTD)
        order = _sort(routing, self.router.num_experts)
        x_AD: Tensor = _Spread.apply(x_BTD.flatten(0, 1), order)  # type: ignore[no-untyped-call]
        y_AD = self.experts(x_AD, order.counts_E)
        weights_A = self.enter(routing.weights_NK).flatten().index_select(0, order.assignments_A)
        y_AD = y_AD * weights_A.to(y_AD.dtype).unsqueeze(-1)
        y_ND: Tensor = _Collect.apply(y_AD, order)  # type: ignore[no-untyped-call]
        out_BTD = y_ND.view_as(x_BTD)
        if self.shared is not None:
            out_BTD = out_BTD + self.shared(x_BTD)
        return self.leave(out_BTD), routing.losses


class ExpertWeights(nn.Module):
    """Experts, each a feed-forward layer with a gate."""

    def __init__(self, config: Shape, count: int, width: int) -> None:
        from pipeline.models.layers import activate

        super().__init__()
        self.activate = partial(activate, config=config)
        self.gate = nn.Parameter(torch.empty(count, width, config.d_model))
        self.up = nn.Parameter(torch.empty(count, width, config.d_model))
        self.down = nn.Parameter(torch.empty(count, config.d_model, width))
        for weight in (self.gate, self.up, self.down):
            nn.init.normal_(weight, std=config.init_std)

    def forward(self, x_AD: Tensor, counts_E: Tensor) -> Tensor:
        """Return (A, D) for tokens sorted by expert, the first `counts_E[0]` of which are the first expert's."""
        if _can_group(x_AD, self.gate):
            ends_E = counts_E.cumsum(0).to(torch.int32)
            inner_AF = self.activate(_grouped(x_AD, self.gate, ends_E)) * _grouped(x_AD, self.up, ends_E)
            return _grouped(inner_AF, self.down, ends_E)
        # Unbound at once: to index them one by one would make a gradient of the size of all for each. An expert without
        # tokens takes part too, so that every weight has a gradient.
        weights = zip(self.gate.unbind(), self.up.unbind(), self.down.unbind(), strict=True)
        slices = torch.split_with_sizes(x_AD, counts_E.tolist())
        return torch.cat(
            [
                F.linear(self.activate(F.linear(x, gate)) * F.linear(x, up), down)
                for x, (gate, up, down) in zip(slices, weights, strict=True)
            ]
        )


def forget_step(model: nn.Module) -> None:
    """Forget how the routers of a model have worked since the last `after_step`, as if there had been no tokens."""
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            module.router.counts = module.router.entropy = None


def after_step(model: nn.Module, group: "dist.ProcessGroup | None" = None) -> dict[str, float]:
    """Return how the routers of a model have worked since the last call, move their balance biases, and start anew.

    To be called after every optimizer step, on every rank; the counts are exact, so that the biases are the same on all
    ranks and on all layouts. A bias moves by its rate towards an even load (Wang et al. 2024, arXiv:2408.15664).

    Args:
        group: The data-parallel ranks, whose tokens are counted together; null counts this process's alone.

    Returns:
        Nothing without experts, else `router.load_max` and `router.load_min` (the largest and the smallest load of an
        expert in any layer, by the even load), `router.entropy` (of the routers' distributions, mean over tokens and
        layers, 1 is uniform), `router.dropped_fraction` (of assignments; with expert choice, of tokens), and where they
        are few, `router.load.<layer>.<expert>` by the even load, layers with experts counted from 0.
    """
    layers = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
    if not layers:
        return {}
    counts_LX, entropy_L = _totals(layers, group)
    load_LE = counts_LX[:, :-NUM_TOTALS]
    even_L1 = load_LE.mean(1, keepdim=True)
    for layer, step_E in zip(layers, (even_L1 - load_LE).sign(), strict=True):
        if isinstance(layer.router, TokenChoiceRouter) and layer.router.balance_bias is not None:
            layer.router.balance_bias += step_E.to(layer.router.balance_bias) * layer.balance_bias_rate
    load_LE = load_LE / even_L1.clamp_min(1)
    tokens, assignments, dropped = counts_LX[:, -NUM_TOTALS:].sum(0).tolist()
    if not tokens:
        return {}
    numbers = {
        "router.load_max": float(load_LE.max()),
        "router.load_min": float(load_LE.min()),
        "router.entropy": float(entropy_L.sum()) / tokens / log(load_LE.shape[1]),
        "router.dropped_fraction": dropped / assignments,
    }
    if load_LE.numel() <= MAX_LOADS:
        for number, load_E in enumerate(load_LE.tolist()):
            numbers |= {f"router.load.{number}.{expert}": load for expert, load in enumerate(load_E)}
    return numbers


def _totals(layers: list[MixtureOfExperts], group: "dist.ProcessGroup | None") -> tuple[Tensor, Tensor]:
    """Return the routers' counts, (L, E + NUM_TOTALS), and sums of entropies, (L), of all ranks, in fp64."""
    totals = torch.stack([layer.router.take_totals(layer.experts.gate.device) for layer in layers])
    if group is not None:
        import torch.distributed as dist

        dist.all_reduce(totals, group=group)
    totals = totals.cpu()
    return totals[:, :-1], totals[:, -1]


class _Order(NamedTuple):
    """Assignments sorted by expert.

    Attributes:
        assignments_A: Which of the N * K they are.
        tokens_A: Whose they are.
        counts_E: How many each expert has.
        slots_NK: Where each token's assignments are among the A; A stands for none.
    """

    assignments_A: Tensor
    tokens_A: Tensor
    counts_E: Tensor
    slots_NK: Tensor


def _sort(routing: Routing, num_experts: int) -> _Order:
    """Sort what is taken by expert, the tokens of each in order."""
    experts_NK, taken_NK = routing.experts_NK, routing.taken_NK
    num_choices = experts_NK.shape[1]
    if taken_NK is not None:
        experts_NK = experts_NK.masked_fill(~taken_NK, num_experts)  # which sorts them to the end
    order = experts_NK.flatten().argsort(stable=True)
    slots_NK = torch.empty_like(order)
    slots_NK[order] = torch.arange(len(order), device=order.device)
    slots_NK = slots_NK.view(-1, num_choices).sort(1).values  # summed in the order of the experts, whatever is dropped
    counts_E = count_groups(experts_NK, num_experts + 1)[:-1]
    if taken_NK is not None:
        total = int(counts_E.sum())
        order = order[:total]
        most = max(1, int(taken_NK.sum(1).max()))  # with expert choice often fewer than all
        slots_NK = slots_NK.clamp_max(total)[:, :most]
    return _Order(order, order // num_choices, counts_E, slots_NK)


class _Spread(torch.autograd.Function):
    """Repeat tokens as they are assigned; `_Collect` is its transpose."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order: _Order) -> Tensor:
        ctx.save_for_backward(order.slots_NK)
        return x_ND.index_select(0, order.tokens_A)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_AD: Tensor) -> tuple[Tensor, None]:
        (slots_NK,) = ctx.saved_tensors
        return _sum_slots(dx_AD, slots_NK), None


class _Collect(torch.autograd.Function):
    """Sum what the experts of each token made.

    Note: index_add would do it in one call, but an accelerator adds in whatever order, and the sums would differ from
    run to run.
    """

    @staticmethod
    def forward(ctx: Any, y_AD: Tensor, order: _Order) -> Tensor:
        ctx.save_for_backward(order.tokens_A)
        return _sum_slots(y_AD, order.slots_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor, None]:
        (tokens_A,) = ctx.saved_tensors
        return dy_ND.index_select(0, tokens_A), None


def _sum_slots(y_AD: Tensor, slots_NK: Tensor) -> Tensor:
    if len(y_AD) < slots_NK.numel():  # some tokens have fewer experts, and those slots mean a row of zeros
        y_AD = torch.cat([y_AD, y_AD.new_zeros(1, y_AD.shape[1])])
    sum_ND = y_AD.index_select(0, slots_NK[:, 0])
    if slots_NK.shape[1] > 1:
        dtype, sum_ND = sum_ND.dtype, sum_ND.to(torch.promote_types(sum_ND.dtype, torch.float32))
        for slots_N in slots_NK[:, 1:].unbind(1):
            sum_ND += y_AD.index_select(0, slots_N)
        sum_ND = sum_ND.to(dtype)
    return sum_ND


def _can_group(x_AD: Tensor, weight_EXX: Tensor) -> bool:
    """Return whether there is a kernel that multiplies all slices at once, without waiting for their lengths."""
    if x_AD.device.type != "cuda" or not hasattr(F, "grouped_mm") or not len(x_AD):
        return False
    aligned = all(size * x_AD.element_size() % ALIGNMENT_BYTES == 0 for size in weight_EXX.shape[1:])
    supported = x_AD.dtype == weight_EXX.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x_AD.device) >= (
        8,
        0,
    )
    return aligned and supported


def _grouped(x_AX: Tensor, weight_EYX: Tensor, ends_E: Tensor) -> Tensor:
    out_AY: Tensor = F.grouped_mm(x_AX, weight_EYX.transpose(-2, -1), offs=ends_E)
    return out_AY
