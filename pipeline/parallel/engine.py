"""The only door to DeepSpeed's engine, and the only writer of its JSON."""

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, Self

from pipeline.errors import ConfigError
from pipeline.parallel.mesh import BatchShape, Mesh

if TYPE_CHECKING:
    import torch

    from pipeline.stage import Parallel

Precision = Literal["fp32", "bf16", "fp16", "fp8"]  # the last is bf16 with products in fp8, see parallel.fp8
Offload = Literal["cpu", "nvme"]
SIXTEEN_BITS = {"bf16": "bf16", "fp16": "fp16", "fp8": "bf16"}  # what DeepSpeed calls the type of the weights
TYPED = {  # what DeepSpeed's JSON would say too, and the setting that says it here
    "fp16": "precision",
    "bf16": "precision",
    "amp": "precision",
    "torch_autocast": "precision",
    "data_types": "precision",
    "communication_data_type": "precision",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "activation_checkpointing": "run.parallel.activation_checkpointing",
    "compile": "run.compile",
    "tensor_parallel": "run.parallel.tensor",
    "sequence_parallel_size": "run.parallel.sequence",
    "zero_optimization.stage": "run.parallel.zero",
    "zero_optimization.offload_optimizer": "run.parallel.offload",
    "zero_optimization.cpu_offload": "run.parallel.offload",
}
GROUP_TIMEOUT = timedelta(minutes=10)  # well above a checkpoint's time, well below torch's half hour


@dataclass(frozen=True)
class EngineSettings:
    """All that goes into DeepSpeed's JSON.

    Attributes:
        clip_norm: Largest global gradient norm; null does not clip.
        extra: `run.parallel.deepspeed`, merged last.
        offload: Where the state of the optimizer is kept; null is on the device.
    """

    batch: BatchShape
    zero: int
    precision: Precision
    clip_norm: float | None
    extra: Mapping[str, Any]
    offload: Offload | None = None

    @classmethod
    def of(cls, batch: BatchShape, parallel: "Parallel", precision: Precision, clip_norm: float | None) -> Self:
        """Return them for what `run.parallel` says."""
        return cls(batch, parallel.zero, precision, clip_norm, parallel.deepspeed, parallel.offload)

    def simplified(self) -> Self:
        """Return the same without ZeRO where it shares out nothing, and would only keep a copy of the weights more.

        That is with one data-parallel rank, in fp32. What is learned is the same but for rounding.
        """
        shares = self.batch.data_ranks > 1 or self.zero == 3 or self.precision != "fp32"
        asked_for = self.offload is not None or "zero_optimization" in self.extra
        return self if shares or asked_for else replace(self, zero=0)


def deepspeed_json(settings: EngineSettings) -> dict[str, Any]:
    """Return DeepSpeed's configuration.

    Raises:
        ConfigError: If `extra` contradicts a typed setting, or something is asked for that DeepSpeed cannot do or does
            wrong.
    """
    ours: dict[str, Any] = {
        "train_batch_size": settings.batch.rows,
        "train_micro_batch_size_per_gpu": settings.batch.microbatch,
        "gradient_accumulation_steps": settings.batch.accumulation,
        "managed_gradient_accumulation": True,
        "gradient_clipping": (settings.clip_norm or 0.0) if settings.zero else 0.0,  # without ZeRO, Gate clips
        "steps_per_print": 10**12,
        "zero_optimization": {"stage": settings.zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if settings.precision != "fp32":
        ours |= {SIXTEEN_BITS[settings.precision]: {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    problems = [*_refused(settings), *_clashes(settings.extra, ours)]
    if problems:
        raise ConfigError(*problems)
    if settings.offload:
        ours["zero_optimization"]["offload_optimizer"] = {"device": settings.offload}
    if settings.precision != "fp32":
        ours["communication_data_type"] = "fp32"  # else gradients are rounded to 16 bits before they are summed
    return _merge(ours, settings.extra)


def _refused(settings: EngineSettings) -> Iterator[str]:
    """Yield what cannot be combined, and why."""
    if settings.zero == 0 and settings.precision != "fp32":
        yield (
            f"run.parallel.zero: under stage 0 DeepSpeed sums the gradients of precision '{settings.precision}' in 16 "
            "bits; take stage 1, which sums them in fp32"
        )
    if settings.offload == "nvme":
        yield (
            "run.parallel.offload: what DeepSpeed swaps to 'nvme' it gives nobody else to read, so no checkpoint could "
            "be written; take 'cpu'"
        )
    elif settings.offload and settings.zero == 0:
        yield "run.parallel.offload: DeepSpeed offloads only what ZeRO shares out; set run.parallel.zero to 1, 2 or 3"
    elif settings.offload and settings.zero < 3 and settings.precision != "fp32":
        # Note: of DeepSpeed 0.19.8; its buffers on the host have the type of the weights, and keep what is not finite
        yield (
            f"run.parallel.offload: under stage {settings.zero} DeepSpeed sums offloaded gradients of precision "
            f"'{settings.precision}' in 16 bits, and keeps those that are not finite; set run.parallel.zero to 3"
        )


def _clashes(extra: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[str]:
    """Yield what `run.parallel.deepspeed` may not say, and what says it instead."""
    prefix = "run.parallel.deepspeed"
    zero = extra.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        yield f"{prefix}.zero_optimization: wanted a mapping, found {zero!r}"
        return
    derived = set(ours) - {"zero_optimization"}
    for key in [*extra, *(f"zero_optimization.{key}" for key in zero)]:
        if key in TYPED:
            yield f"{prefix}.{key}: contradicts a typed setting; set {TYPED[key]} instead"
        elif key in derived:
            yield f"{prefix}.{key}: contradicts a typed setting; it follows from the batch, clip_norm and run"
    offloaded = zero.get("offload_param")
    if isinstance(offloaded, Mapping) and offloaded.get("device") == "nvme":
        yield f"{prefix}.zero_optimization.offload_param: no checkpoint could be written of 'nvme'; take 'cpu'"
    if zero.get("round_robin_gradients"):
        # Note: of DeepSpeed 0.19.8; training is right, but a wrong model would be written (safe_get_full_fp32_param)
        yield (
            f"{prefix}.zero_optimization.round_robin_gradients: DeepSpeed then gives the weights out in a wrong order; "
            "leave it out"
        )


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


@contextmanager
def process_group(tensor: int = 1, timeout: timedelta = GROUP_TIMEOUT, at: str | None = None) -> Iterator[Mesh]:
    """Join the ranks of this task, from RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, for the time of the block.

    Args:
        tensor: How many neighbouring ranks share every layer.
        timeout: After which a rank that waits for another one fails.
        at: Where they meet instead of MASTER_ADDR, as torch's `init_method`.
    """
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_PORT", "0")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DeepSpeed's and torch's own deprecations
        import deepspeed
        import deepspeed.ops
        import deepspeed.runtime.bf16_optimizer

        deepspeed.utils.logger.setLevel(logging.ERROR)
        deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *said, **how: None  # it prints, whatever the level
        if not torch.cuda.is_available():
            # Note: else DeepSpeed compiles an operator that only inference needs: a minute, and a compiler
            deepspeed.ops.__compatible_ops__ = {}
        else:
            _take_gpu()
        ranks = {} if at is None else {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
        deepspeed.init_distributed(timeout=timeout, verbose=False, init_method=at, **ranks)
        try:
            yield Mesh(tensor, timeout)
        finally:
            # Note: not torch's own, which leaves DeepSpeed with a group that is not registered
            deepspeed.comm.destroy_process_group()


def _take_gpu() -> None:
    """Compute on the GPU of this rank's number on its machine; where ranks see one each (--gpus-per-task), on that."""
    import torch

    number = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()
    os.environ["LOCAL_RANK"] = str(number)  # from which DeepSpeed takes it
    torch.cuda.set_device(number)


def build_engine(
    model: "torch.nn.Module", optimizer: "torch.optim.Optimizer", settings: EngineSettings, mesh: Mesh
) -> Any:
    """Return the DeepSpeed engine that trains `model`.

    An optimizer with `layouts`, which looks at whole matrices, is told where they lie in what it is given.

    Raises:
        ConfigError: If the device lacks the precision, or DeepSpeed does not take what `run.parallel.deepspeed` says.
    """
    import deepspeed

    from pipeline.parallel.gate import Gate
    from pipeline.parallel.partitions import flat_partitions

    learning = [p for p in model.parameters() if p.requires_grad]
    config = deepspeed_json(settings)
    _check_device(settings.precision)
    with _explained(settings):
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, model_parameters=learning, config=config, mpu=mesh
        )
    if settings.zero == 3:
        _add_bias_apart()
    engine.gate = Gate(engine, optimizer, settings.clip_norm)
    if hasattr(optimizer, "layouts"):
        optimizer.layouts = flat_partitions(engine)
    return engine


@contextmanager
def _explained(settings: EngineSettings) -> Iterator[None]:
    """Say of what DeepSpeed does not take that it may be what the user asked for."""
    try:
        yield
    except Exception as error:
        if not settings.extra:
            raise
        reason = " ".join(str(error).split())
        raise ConfigError(f"run.parallel.deepspeed: DeepSpeed does not take it: {reason}") from error


def _add_bias_apart() -> None:
    """Make linear layers add their bias to a copy.

    Note: under ZeRO stage 3 DeepSpeed replaces torch's `linear` for good by one that adds the bias in place, to what
    selective activation checkpointing may have kept: there it would be added twice.
    """
    import torch.nn.functional as F
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    if F.linear is zero3_linear_wrap:
        F.linear = lambda x, weight, bias=None: (  # type: ignore[assignment]
            zero3_linear_wrap(x, weight) if bias is None else zero3_linear_wrap(x, weight) + bias
        )


def _check_device(precision: Precision) -> None:
    from deepspeed.accelerator import get_accelerator

    from pipeline.parallel import fp8

    device = get_accelerator()
    supports: dict[Precision, Callable[[], bool]] = {
        "bf16": device.is_bf16_supported,
        "fp16": device.is_fp16_supported,
        "fp8": fp8.is_supported,
    }
    if precision in supports and not supports[precision]():
        raise ConfigError(f"precision: this device ({device.device_name(0)}) has no '{precision}'; take fp32, or bf16")


def partitioner(settings: EngineSettings, mesh: Mesh) -> "Callable[[torch.nn.Parameter], None]":
    """Return what cuts a parameter among the data-parallel ranks at once, as ZeRO stage 3 does for the whole model.

    So no rank ever has to hold the model whole. The engine that trains it must be built with the same settings.
    """
    import torch
    from deepspeed.runtime.zero import Init

    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(settings.precision, torch.bfloat16)
    config = deepspeed_json(settings)
    first: list[Any] = []

    def cut(parameter: Any) -> None:
        parameter.data = parameter.data.to(dtype)
        if first:  # which has learned from DeepSpeed how to
            first[0].convert_to_zero_parameters(param_list=[parameter])
            return
        alone = torch.nn.ParameterList([parameter])
        with _explained(settings):
            Init(module=alone, data_parallel_group=mesh.data_group, config_dict_or_path=config, mpu=mesh, dtype=dtype)
        first.append(parameter)

    return cut


def refresh_weights(engine: Any) -> None:
    """Copy the fp32 partitions into the weights that the model computes with, after they were changed by hand."""
    zero = engine.optimizer
    if not engine.zero_optimization():  # the weights are the only ones
        return
    if not hasattr(zero, "fp32_partitioned_groups_flat"):
        zero.update_lp_params()
        return
    # Note: stage 3 keeps small parameters whole on every rank; the first call cuts them, the last brings them back.
    zero.checkpoint_event_prologue()
    for index in range(len(zero.fp32_partitioned_groups_flat)):
        zero._reassign_or_swap_out_partitioned_parameters(index)
    zero.checkpoint_event_epilogue()
