"""The settings of the optimizers, and what each cannot do.

A parameter group carries `lr_scale`: the loop sets its rate to that of the step times this factor. Weight decay acts on
matrices only, not on norms and biases, and is multiplied with the rate (decoupled: Loshchilov and Hutter 2019).
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from pipeline.settings import Choice
from pipeline.stage import Run

if TYPE_CHECKING:
    import torch

    from pipeline.training.optim.groups import Group


class Optimizer(Choice):
    """What all optimizers have.

    Attributes:
        lr: Peak learning rate; the schedule multiplies it.

    Class attributes:
        state_copies: How many numbers it keeps for each weight, at most.
        needs_matrices: Whether it looks at whole matrices, so that ZeRO's pieces must come together.
    """

    state_copies: ClassVar[int]
    needs_matrices: ClassVar[bool] = False

    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)

    def build(self, model: "torch.nn.Module", lr_scales: Mapping[str, float] | None = None) -> "torch.optim.Optimizer":
        """Return the optimizer over the parameters that learn.

        Args:
            lr_scales: Factors of the learning rate, by the parameter's name; those not named get 1.
        """
        from pipeline.training.optim.groups import make_groups

        return self._over(make_groups(model, self.weight_decay, lr_scales or {}, self._rule))

    def check(self, run: Run) -> Iterator[tuple[str, str]]:
        """Yield (setting, problem) for what cannot work."""
        if not self.needs_matrices:
            return
        zero = run.parallel.deepspeed.get("zero_optimization", {})
        extra = zero if isinstance(zero, Mapping) else {}
        unfit = ("offload_optimizer", "mics_shard_size", "zenflow", "cpu_offload")
        found = [f"deepspeed.zero_optimization.{key}" for key in unfit if extra.get(key)]
        for key in [*(["offload"] if run.parallel.offload else []), *found]:
            yield (
                "optimizer.kind",
                f"'{self.kind}' works on whole matrices and cannot put them together under run.parallel.{key}; leave "
                "that out, or take adamw",
            )

    @abstractmethod
    def _over(self, groups: "list[Group]") -> "torch.optim.Optimizer":
        """Return the optimizer over groups."""

    def _rule(self, name: str, parameter: "torch.Tensor") -> str:
        """Return what is done with a parameter, where an optimizer does several things."""
        return self.kind


class AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), in one fused kernel where the device has it."""

    state_copies: ClassVar[int] = 2

    kind: Literal["adamw"] = "adamw"
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)

    def _over(self, groups: "list[Group]") -> "torch.optim.Optimizer":
        from torch.optim import AdamW

        from pipeline.training.optim.groups import have_fused

        betas, groups_of_any = (self.beta1, self.beta2), list[dict[str, Any]](groups)
        return AdamW(groups_of_any, lr=self.lr, betas=betas, eps=self.eps, fused=have_fused(groups))


class Muon(Optimizer):
    """Muon (Jordan et al. 2024): hidden matrices move along their momentum, made orthogonal; the rest by AdamW.

    A matrix's step is multiplied with 0.2 * sqrt(max(rows, columns)), so that its root mean square is AdamW's, and one
    learning rate could serve both, and one weight decay does (Liu et al. 2025, "Muon is scalable for LLM training",
    arXiv:2502.16982, section 2.2). Embeddings, tables of positions, the output layer, routers, norms and biases are
    AdamW's; of a stack of experts each matrix is made orthogonal by itself.

    Note: what such a step does to a hidden state grows with the root of the width, not with the width as AdamW's does,
    so under μP a matrix's rate is scaled by the root of what AdamW's would be (Yang et al. 2023, arXiv:2310.17813).

    Attributes:
        momentum: Share of the old momentum in the new one (Nesterov's).
        adamw_lr_scale: How many times as large the learning rate of what AdamW moves is.
        newton_schulz_steps: Iterations that make a matrix nearly orthogonal.
    """

    state_copies: ClassVar[int] = 2
    needs_matrices: ClassVar[bool] = True

    kind: Literal["muon"] = "muon"
    lr: float = Field(default=1e-2, gt=0)
    momentum: float = Field(default=0.95, ge=0, lt=1)
    newton_schulz_steps: int = Field(default=5, ge=1)
    adamw_lr_scale: float = Field(default=4.0, gt=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)

    def _over(self, groups: "list[Group]") -> "torch.optim.Optimizer":
        from pipeline.training.optim.muon import MuonWithAdamW

        for group in groups:
            if group["rule"] == "muon":
                group["lr_scale"] **= 0.5
            else:
                group["lr_scale"] *= self.adamw_lr_scale
        betas = (self.beta1, self.beta2)
        return MuonWithAdamW(groups, self.lr, self.momentum, self.newton_schulz_steps, betas, self.eps)

    def _rule(self, name: str, parameter: "torch.Tensor") -> str:
        from pipeline.training.optim.groups import dimensions, is_table

        return "adamw" if dimensions(parameter) < 2 or is_table(name) else "muon"


class Lion(Optimizer):
    """Lion (Chen et al. 2023, arXiv:2302.06675): steps of one size, in the direction of the sign of a momentum.

    Its authors take a learning rate 3 to 10 times smaller than AdamW's and a weight decay larger by as much.
    """

    state_copies: ClassVar[int] = 1

    kind: Literal["lion"] = "lion"
    lr: float = Field(default=1e-4, gt=0)
    weight_decay: float = Field(default=1.0, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.99, ge=0, lt=1)

    def _over(self, groups: "list[Group]") -> "torch.optim.Optimizer":
        from pipeline.training.optim.lion import LionOptimizer

        return LionOptimizer(groups, self.lr, (self.beta1, self.beta2))


class Adafactor(Optimizer):
    """Adafactor (Shazeer and Stern 2018, arXiv:1804.04235): of a matrix's second moment only rows and columns are kept.

    Without momentum, as there. Each matrix of a stack of experts has its own rows and columns.

    Attributes:
        relative_step: Whether a step is a fraction `lr` of the parameter's root mean square (section 8).
        smallest_rms: What that is at least.
        decay_power: The decay of the second moment at step t is 1 - t^-decay_power (section 7.2).
        clip_threshold: Largest root mean square of an update (section 6).
        eps: Added to the squared gradient.
    """

    state_copies: ClassVar[int] = 1
    needs_matrices: ClassVar[bool] = True

    kind: Literal["adafactor"] = "adafactor"
    lr: float = Field(default=1e-2, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    relative_step: bool = True
    smallest_rms: float = Field(default=1e-3, gt=0)
    decay_power: float = Field(default=0.8, gt=0)
    clip_threshold: float = Field(default=1.0, gt=0)
    eps: float = Field(default=1e-30, gt=0)

    def _over(self, groups: "list[Group]") -> "torch.optim.Optimizer":
        from pipeline.training.optim.adafactor import AdafactorOptimizer

        smallest = self.smallest_rms if self.relative_step else None
        return AdafactorOptimizer(groups, self.lr, self.decay_power, self.clip_threshold, self.eps, smallest)

    def _rule(self, name: str, parameter: "torch.Tensor") -> str:
        from pipeline.training.optim.groups import dimensions

        return "factored" if dimensions(parameter) >= 2 else "whole"


class ScheduleFreeAdamW(Optimizer):
    """Schedule-free AdamW (Defazio et al. 2024, arXiv:2405.15682): for a constant rate, with warm-up.

    Gradients are taken at a point y between the fast weights z and their running average x; validation and the final
    model take x, so the average needs no setting of its own.

    Attributes:
        beta1: Share of x in y.
    """

    state_copies: ClassVar[int] = 2

    kind: Literal["schedule_free_adamw"] = "schedule_free_adamw"
    beta1: float = Field(default=0.9, gt=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)

    def _over(self, groups: "list[Group]") -> "torch.optim.Optimizer":
        from pipeline.training.optim.schedule_free import ScheduleFreeOptimizer

        return ScheduleFreeOptimizer(groups, self.lr, (self.beta1, self.beta2), self.eps)


AnyOptimizer = Annotated[AdamW | Muon | Lion | Adafactor | ScheduleFreeAdamW, Field(discriminator="kind")]
