"""What stands between all gradients of a step and its update: the norm, whether the step may go, and clipping."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.parallel.mesh import Mesh

CLIP_EPSILON = 1e-6  # added to the norm that is divided by, as torch and DeepSpeed do
BUCKET_ELEMENTS = 2**25  # gradients that are averaged at once: few enough that the copy is small beside the model


class Gate:
    """Stands before the `step` of an optimizer, which DeepSpeed calls once for each group, and asks whether it may go.

    Without ZeRO it also averages the gradients, measures and clips them: there DeepSpeed tells no norm, and averages
    only types that a device computes fast with.

    Attributes:
        grad_norm: The global norm of the step's gradient before clipping, infinite where it is not finite (then nothing
            is updated).
        updated: Whether the weights were changed.
    """

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer, clip_norm: float | None) -> None:
        self._engine, self._update, self._clip_norm = engine, optimizer.step, clip_norm
        self._ask: Callable[[float], bool] = lambda grad_norm: True
        self._judged = -1  # the step that was asked about
        self.updated, self.grad_norm = False, math.inf
        optimizer.step = self._step  # type: ignore[method-assign]
        if not engine.zero_optimization():
            engine.enable_backward_allreduce = False

    def begin(self, ask: Callable[[float], bool]) -> None:
        """Get ready for a step; `ask` is called once, with the norm of the gradient, before any weight changes."""
        self._ask, self.updated, self.grad_norm = ask, False, math.inf

    def _step(self, *arguments: Any, **named: Any) -> Any:
        if self._judged != self._engine.global_steps:
            self._judged = self._engine.global_steps
            self._judge()
        return self._update(*arguments, **named) if self.updated else None

    def _judge(self) -> None:
        gradients = Gradients(self._engine) if not self._engine.zero_optimization() else None
        found = float(self._engine.optimizer._global_grad_norm) if gradients is None else gradients.prepare()
        is_finite = 0 <= found < math.inf  # Note: DeepSpeed may say -1 for what is not finite
        self.grad_norm = found if is_finite else math.inf
        self.updated = is_finite and self._ask(found)
        if self.updated and gradients is not None and self._clip_norm is not None:
            gradients.scale(min(self._clip_norm / (found + CLIP_EPSILON), 1.0))


class Gradients:
    """The gradients of all weights that learn, whole on every data-parallel rank; of those never used they are zero."""

    def __init__(self, engine: Any) -> None:
        self.mesh: Mesh = engine.mpu
        self.weights = [p for p in engine.module.parameters() if p.requires_grad]

    def prepare(self) -> float:
        """Average them over the data-parallel ranks and return their global norm; it may not be finite."""
        for weight in self.weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        if self.mesh.data > 1:
            for bucket in self._buckets():
                self._average(bucket)
        return self._norm()

    def scale(self, factor: float) -> None:
        """Multiply them, by at most one."""
        if factor < 1:
            torch._foreach_mul_([w.grad for w in self.weights if w.grad is not None], factor)

    def _buckets(self) -> Iterator[list[Tensor]]:
        bucket: list[Tensor] = []
        for weight in self.weights:
            assert weight.grad is not None
            if bucket and sum(g.numel() for g in bucket) + weight.numel() > BUCKET_ELEMENTS:
                yield bucket
                bucket = []
            bucket.append(weight.grad)
        if bucket:
            yield bucket

    def _average(self, bucket: list[Tensor]) -> None:
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        flat /= self.mesh.data
        dist.all_reduce(flat, group=self.mesh.data_group)
        pieces = torch.split(flat, [gradient.numel() for gradient in bucket])
        for gradient, piece in zip(bucket, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))

    def _norm(self) -> float:
        """Return the norm; what tensor-parallel ranks share is summed over them, what each of them has counts once."""
        counted = [
            w.grad for w in self.weights if self.mesh.tensor_rank == 0 or getattr(w, "tensor_model_parallel", False)
        ]
        norms = torch._foreach_norm(counted) if counted else [torch.zeros((), device=self.weights[0].device)]
        squared = torch.stack(norms).double().square().sum()
        if self.mesh.tensor > 1:
            dist.all_reduce(squared, group=self.mesh.tensor_group)
        return math.sqrt(squared.item())
