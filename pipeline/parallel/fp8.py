"""Products of linear layers in fp8 (Micikevicius et al. 2022, arXiv:2209.05433), applied to a plain model from outside.

Weights, and all that is not a product, stay in bf16. What is multiplied is brought to fp8's range by one factor for
each tensor, taken from its largest element at that moment: e4m3 for what flows forward, e5m2 for gradients.

Letters of the shape suffixes: N tokens, I input and O output features.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import ConfigError

LAYERS = ("query", "key", "value", "out", "gate", "up", "down")  # routers and output layers stay as they are
MULTIPLE = 16  # of which a product in fp8 has its sizes
FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
_SMALLEST = 1e-30  # keeps the factor of a tensor that is all zero finite


def is_supported() -> bool:
    """Return whether this rank's device multiplies in fp8: of NVIDIA's, those of compute capability 8.9 and above."""
    return torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 9)


def multiply_in_fp8(model: nn.Module) -> None:
    """Let the linear layers of attention and feed-forward layers multiply in fp8; experts stay in bf16.

    To be called when a model has the weights that are this rank's, before its layers are compiled.

    Raises:
        ConfigError: If a layer has a size that is not a multiple of 16.
    """
    problems = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name.rpartition(".")[2] not in LAYERS:
            continue
        if any(size % MULTIPLE for size in module.weight.shape):
            problems.append(
                f"precision: a product in fp8 needs sizes that are multiples of {MULTIPLE}, and on each rank {name} "
                f"has {' x '.join(map(str, module.weight.shape))}; change the model's sizes, or take bf16"
            )
        module.__dict__["forward"] = _InFp8(module)  # which comes before the method of its class
    if problems:
        raise ConfigError(*problems)


class _InFp8:
    """The forward pass of a linear layer, which may sum over ranks before the bias is added."""

    def __init__(self, layer: nn.Linear) -> None:
        self._layer = layer

    def __call__(self, x_I: Tensor) -> Tensor:
        layer = self._layer
        out_NO: Tensor = _Product.apply(x_I.flatten(0, -2), layer.weight)  # type: ignore[no-untyped-call]
        out_O = out_NO.view(*x_I.shape[:-1], out_NO.shape[-1])
        leave: nn.Module | None = getattr(layer, "leave", None)
        out_O = out_O if leave is None else leave(out_O)
        return out_O if layer.bias is None else out_O + layer.bias


class _Product(torch.autograd.Function):
    """x times the transpose of a weight."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor) -> Tensor:
        small_NI, x_scale = _shrink(x_NI, FORWARD)
        ctx.save_for_backward(small_NI, x_scale, weight_OI)
        weight_scaled_OI, weight_scale = _shrink(weight_OI, FORWARD)
        return _multiply(small_NI, x_scale, weight_scaled_OI.t(), weight_scale, x_NI.dtype)

    @staticmethod
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor, Tensor]:
        x_NI, x_scale, weight_OI = ctx.saved_tensors
        small_NO, dy_scale = _shrink(dy_NO, BACKWARD)
        scaled_OI, weight_scale = _shrink(weight_OI, FORWARD)
        dx_NI = _multiply(small_NO, dy_scale, _by_columns(scaled_OI), weight_scale, dy_NO.dtype)
        short = -len(x_NI) % MULTIPLE  # here the sum is over tokens
        if short:
            x_NI, small_NO = (_pad(tensor, short) for tensor in (x_NI, small_NO))
        dweight_OI = _multiply(small_NO.t().contiguous(), dy_scale, _by_columns(x_NI), x_scale, dy_NO.dtype)
        return dx_NI, dweight_OI


def _shrink(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a tensor in fp8, and what it is to be multiplied with.

    Note: the factor is a power of two, so that it rounds nothing, and ranks that hold different parts of a tensor round
    alike.
    """
    most = torch.finfo(dtype).max
    largest = tensor.detach().abs().amax().float().clamp_min(_SMALLEST)
    factor = torch.exp2(torch.floor(torch.log2(most / largest)))
    return (tensor.float() * factor).to(dtype), factor.reciprocal()


def _multiply(one: Tensor, one_scale: Tensor, other: Tensor, other_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply a matrix that lies by rows with one that lies by columns."""
    product: Tensor = torch._scaled_mm(one, other, scale_a=one_scale, scale_b=other_scale, out_dtype=dtype)
    return product


def _by_columns(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t()


def _pad(tensor: Tensor, rows: int) -> Tensor:
    return F.pad(tensor.view(torch.uint8), (0, 0, 0, rows)).view(tensor.dtype)
