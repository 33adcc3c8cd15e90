"""A student: a Transformer that is told what a teacher predicts.

Letters of the shape suffixes: B rows, T positions, D d_model, N labels.
"""

from typing import Any

import torch
from torch import Tensor

from pipeline.models.config import AnyModel
from pipeline.models.loss import IGNORED_LABEL, summed_divergence
from pipeline.models.transformer import Transformer


class Student(Transformer):
    """While it trains it has one more loss, "distill": how far its predictions are from the teacher's.

    The teacher is no part of it: not of its parameters, its checkpoints or what ranks share among one another.
    """

    def __init__(self, config: AnyModel, teacher: Transformer, temperature: float) -> None:
        super().__init__(config)
        self._teacher = (teacher.eval().requires_grad_(False),)  # in a tuple, where torch does not look for modules
        self._temperature = temperature
        self._taught_BTD: Tensor | None = None

    def forward(self, ids: Tensor, labels: Tensor | None = None, *more: Any, **named: Any) -> Any:
        """Return what a Transformer returns, and the loss "distill" where it trains."""
        if labels is not None and self.training:
            self._taught_BTD = self._ask(ids, *more, **{k: v for k, v in named.items() if k != "sentence"})
        try:
            return super().forward(ids, labels, *more, **named)
        finally:
            self._taught_BTD = None

    @torch.no_grad()
    def _ask(self, ids: Tensor, *more: Any, **named: Any) -> Tensor:
        """Return what the teacher's output layer reads, (B, T, D)."""
        (teacher,) = self._teacher
        teacher.to(device=ids.device, dtype=self.embedding.weight.dtype)
        x_BTD, _, _ = teacher.last_layer(ids, *more, **named)
        return teacher._transformed(teacher._finish(x_BTD))

    def _losses(self, x_BTD: Tensor, labels_BT: Tensor, sentence_B: Tensor | None) -> dict[str, Tensor]:
        losses = super()._losses(x_BTD, labels_BT, sentence_B)
        if self._taught_BTD is not None:
            labels_N = labels_BT.flatten()
            kept_N = labels_N != IGNORED_LABEL
            hidden_ND = self._transformed(self._finish(x_BTD).flatten(0, 1)[kept_N])
            losses["distill"] = summed_divergence(
                self.enter_output(hidden_ND),
                self.output(),
                self._taught_BTD.flatten(0, 1)[kept_N],
                self._teacher[0].output(),
                labels_N[kept_N],
                self._temperature,
            )
        return losses
