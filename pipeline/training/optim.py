"""Optimizers. The settings are light; torch is imported when one is built."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pipeline.settings import Choice

if TYPE_CHECKING:
    import torch


class AdamW(Choice):
    """AdamW (Loshchilov and Hutter 2019); weight decay acts on matrices only, not on norms and biases."""

    kind: Literal["adamw"] = "adamw"
    lr: float = Field(default=1e-3, gt=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)

    def build(self, model: "torch.nn.Module") -> "torch.optim.Optimizer":
        """Return the optimizer over the parameters that learn, in two groups: matrices, and all else."""
        import torch

        learning = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in learning if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in learning if p.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        return torch.optim.AdamW(groups, lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps, fused=True)


AnyOptimizer = AdamW  # a union on `kind` as soon as there is a second optimizer
