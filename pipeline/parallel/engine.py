"""The only door to DeepSpeed's engine, and the only writer of its JSON."""

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import ConfigError
from pipeline.parallel.mesh import BatchShape, Mesh

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "bf16"]
GROUP_TIMEOUT = timedelta(minutes=10)  # well above a checkpoint's time, well below torch's half hour


@dataclass(frozen=True)
class EngineSettings:
    """All that goes into DeepSpeed's JSON.

    Attributes:
        clip_norm: Largest global gradient norm; null does not clip.
        extra: `run.parallel.deepspeed`, merged last.
    """

    batch: BatchShape
    zero: int
    precision: Precision
    clip_norm: float | None
    extra: Mapping[str, Any]


def deepspeed_json(settings: EngineSettings) -> dict[str, Any]:
    """Return DeepSpeed's configuration.

    Raises:
        ConfigError: If `extra` contradicts a typed setting, or asks for what DeepSpeed does wrong.
    """
    ours: dict[str, Any] = {
        "train_batch_size": settings.batch.rows,
        "train_micro_batch_size_per_gpu": settings.batch.microbatch,
        "gradient_accumulation_steps": settings.batch.accumulation,
        "gradient_clipping": settings.clip_norm or 0.0,
        "steps_per_print": 10**12,
        "zero_optimization": {"stage": settings.zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if settings.precision == "bf16":
        ours |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    clashes = list(_clashes(settings.extra, ours))
    if clashes:
        raise ConfigError(*(f"run.parallel.deepspeed.{key}: contradicts a typed setting; set that" for key in clashes))
    if _merge(ours, settings.extra)["zero_optimization"].get("round_robin_gradients"):
        # Note: of DeepSpeed 0.19.8; training is right, but a wrong model would be written (safe_get_full_fp32_param)
        raise ConfigError(
            "run.parallel.deepspeed.zero_optimization.round_robin_gradients: DeepSpeed then gives the weights out in a "
            "wrong order; leave it out"
        )
    return _merge(ours, settings.extra)


def _clashes(extra: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[str]:
    typed = {"fp16", "bf16", "data_types", "optimizer", "scheduler"} | set(ours) - {"zero_optimization"}
    yield from (key for key in extra if key in typed)
    zero, stage = extra.get("zero_optimization", {}), ours["zero_optimization"]["stage"]
    if not isinstance(zero, Mapping) or zero.get("stage", stage) != stage:
        yield "zero_optimization.stage"


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

        deepspeed.utils.logger.setLevel(logging.ERROR)
        if not torch.cuda.is_available():
            # Note: else DeepSpeed compiles an operator that only inference needs: a minute, and a compiler
            deepspeed.ops.__compatible_ops__ = {}
        ranks = {} if at is None else {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
        deepspeed.init_distributed(timeout=timeout, verbose=False, init_method=at, **ranks)
        try:
            yield Mesh(tensor, timeout)
        finally:
            # Note: not torch's own, which leaves DeepSpeed with a group that is not registered
            deepspeed.comm.destroy_process_group()


class Gate:
    """Stands before the `step` of an optimizer, which DeepSpeed calls once for each group, and asks whether it may go.

    Attributes:
        grad_norm: The global norm of the step's gradient, infinite where it is not finite (then DeepSpeed updates
            nothing by itself).
        updated: Whether the weights were changed.
    """

    def __init__(self, engine: Any, optimizer: "torch.optim.Optimizer") -> None:
        self._engine, self._update = engine, optimizer.step
        self._ask: Callable[[float], bool] = lambda grad_norm: True
        self._asked = self.updated = False
        self.grad_norm = math.inf
        optimizer.step = self._step  # type: ignore[method-assign]

    def begin(self, ask: Callable[[float], bool]) -> None:
        """Get ready for a step; `ask` is called once, with the norm of the gradient, before any weight changes."""
        self._ask, self._asked, self.updated, self.grad_norm = ask, False, False, math.inf

    def _step(self, *arguments: Any, **named: Any) -> Any:
        if not self._asked:
            self.grad_norm = float(self._engine.optimizer._global_grad_norm)
            self._asked, self.updated = True, self._ask(self.grad_norm)
        return self._update(*arguments, **named) if self.updated else None


def build_engine(
    model: "torch.nn.Module", optimizer: "torch.optim.Optimizer", settings: EngineSettings, mesh: Mesh
) -> Any:
    """Return the DeepSpeed engine that trains `model`.

    An optimizer with `layouts`, which looks at whole matrices, is told where they lie in what it is given.

    Raises:
        ConfigError: If DeepSpeed does not take what `run.parallel.deepspeed` says.
    """
    import deepspeed

    from pipeline.parallel.partitions import flat_partitions

    learning = [p for p in model.parameters() if p.requires_grad]
    config = deepspeed_json(settings)
    try:
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, model_parameters=learning, config=config, mpu=mesh
        )
    except Exception as error:
        if not settings.extra:
            raise
        reason = " ".join(str(error).split())
        raise ConfigError(f"run.parallel.deepspeed: DeepSpeed does not take it: {reason}") from error
    engine.gate = Gate(engine, optimizer)
    if hasattr(optimizer, "layouts"):
        optimizer.layouts = flat_partitions(engine)
    return engine


def refresh_weights(engine: Any) -> None:
    """Copy the fp32 partitions into the weights that the model computes with, after they were changed by hand."""
    zero = engine.optimizer
    if not hasattr(zero, "fp32_partitioned_groups_flat"):
        zero.update_lp_params()
        return
    # Note: stage 3 keeps small parameters whole on every rank; the first call cuts them, the last brings them back.
    zero.checkpoint_event_prologue()
    for index in range(len(zero.fp32_partitioned_groups_flat)):
        zero._reassign_or_swap_out_partitioned_parameters(index)
    zero.checkpoint_event_epilogue()


def full_weights(engine: Any) -> dict[str, "torch.Tensor"]:
    """Return a copy of all weights in fp32 (the master copies where training was in bf16), on every rank.

    Buffers that belong to the model are among them, as they are.
    """
    import torch
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {}
    for name, parameter in engine.module.named_parameters():
        with GatheredParameters(parameter, enabled=not parameter.requires_grad):  # stage 3 cuts frozen ones too
            full = safe_get_full_fp32_param(parameter) if parameter.requires_grad else parameter.data
            weights[name] = full.detach().to("cpu", torch.float32).clone()
    buffers = {name: state for name, state in engine.module.state_dict().items() if name not in weights}
    return weights | {name: buffer.detach().cpu().clone() for name, buffer in buffers.items()}
