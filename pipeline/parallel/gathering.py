"""Whole weights, out of what the ranks of an engine hold of them."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.parallel.mesh import Mesh


def full_weights(engine: Any, mesh: Mesh) -> dict[str, Tensor]:
    """Return a copy of all weights in fp32 (the master copies where training was in less) on rank 0, else nothing.

    They are brought together one by one, so that a device holds one whole weight more than in training. Buffers that
    belong to the model are among them, as they are. Every rank must come here.
    """
    weights = {}
    for name, parameter in engine.module.named_parameters():
        whole = _gather(_data_whole(engine, parameter), parameter, mesh)
        if mesh.rank == 0:
            weights[name] = whole.to("cpu", _kept(whole.dtype), copy=True)
    if mesh.rank != 0:
        return {}
    buffers = {name: state for name, state in engine.module.state_dict().items() if name not in weights}
    return weights | {name: buffer.detach().cpu().clone() for name, buffer in buffers.items()}


def _kept(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _data_whole(engine: Any, parameter: Any) -> Tensor:
    """Return what the data-parallel ranks hold of a parameter together."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    if engine.zero_optimization() and parameter.requires_grad:
        master: Tensor = safe_get_full_fp32_param(parameter)
        return master.detach()
    with GatheredParameters(parameter, enabled=hasattr(parameter, "ds_id")):  # stage 3 cuts frozen ones too
        held: Tensor = parameter.detach().clone()
    return held


def _gather(held: Tensor, parameter: Any, mesh: Mesh) -> Tensor:
    """Return on rank 0 the whole of a parameter that tensor-parallel ranks may share; on the others, anything."""
    if mesh.data_rank != 0 or not getattr(parameter, "tensor_model_parallel", False):
        return held
    slices = [torch.empty_like(held) for _ in range(mesh.tensor)] if mesh.tensor_rank == 0 else None
    dist.gather(held.contiguous(), slices, dst=0, group=mesh.tensor_group)
    return held if slices is None else torch.cat(slices, dim=parameter.partition_dim)
