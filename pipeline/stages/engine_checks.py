"""What can be refused of a training's parallelism, precision and compilation before anything runs."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pipeline.env import has_accelerator, missing_compiler
from pipeline.errors import ConfigError
from pipeline.launch.local import Local
from pipeline.models.config import AnyModel
from pipeline.models.weights import tensor_problems
from pipeline.parallel.engine import EngineSettings, deepspeed_json
from pipeline.parallel.mesh import shape_batch
from pipeline.stage import Run

if TYPE_CHECKING:
    from pipeline.stages.finetune import Finetune
    from pipeline.stages.pretrain import Pretrain

FP8_MULTIPLE = 16  # as parallel.fp8, which needs torch

Problem = tuple[str, str]


def check_engine(
    rows: int,
    field: str,
    stage: "Pretrain | Finetune",
    run: Run,
    model: AnyModel | None = None,
    lengths: Sequence[int] = (),
) -> Iterator[Problem]:
    """Yield (setting, problem) for what the ranks, DeepSpeed, torch or this machine cannot do.

    Args:
        rows: Of one batch, which the setting `field` says.
        model: What is trained, as far as it is known.
        lengths: Of the sequences that it reads.
    """
    yield from _check_precision(stage, run, model)
    yield from ((field, problem) for problem in _run_problems(run, model))
    if run.ranks % run.parallel.tensor:
        yield (
            field,
            f"run.parallel.tensor: {run.ranks} ranks do not divide into groups of {run.parallel.tensor}; "
            "change it or run.ranks",
        )
        return
    yield from _check_tensor(run, model, lengths)
    try:
        shape = shape_batch(rows, run.microbatch_sequences, run.ranks // run.parallel.tensor)
        deepspeed_json(EngineSettings.of(shape, run.parallel, stage.precision, stage.clip_norm))
    except ConfigError as error:
        yield from ((field, problem) for problem in error.problems)


def _check_precision(stage: "Pretrain | Finetune", run: Run, model: AnyModel | None) -> Iterator[Problem]:
    needs_device = stage.precision in ("fp16", "fp8")
    if needs_device and isinstance(run, Local) and not has_accelerator():
        yield (
            "precision",
            f"'{stage.precision}' needs an accelerator, and this machine shows none (or CUDA_VISIBLE_DEVICES hides "
            "it); take fp32, or bf16",
        )
    if stage.precision == "fp8" and model is not None:
        yield from (("precision", problem) for problem in _fp8_problems(model, run.parallel.tensor))


def _fp8_problems(model: AnyModel, tensor: int) -> Iterator[str]:
    widths = {
        "d_model": model.d_model,
        "num_heads times head_dim": model.num_heads * model.head_dim / tensor,
        "num_kv_heads times head_dim": model.kv_heads * model.head_dim / tensor,
        "d_ff": model.ff / tensor,
    }
    for name, width in widths.items():
        if width % FP8_MULTIPLE:
            share = "" if tensor == 1 or name == "d_model" else " on each rank"
            yield (
                f"products in fp8 need sizes that are multiples of {FP8_MULTIPLE}, and model.{name} is "
                f"{width:g}{share}; change the model, or take bf16"
            )


def _run_problems(run: Run, model: AnyModel | None) -> Iterator[str]:
    """Yield what contradicts itself, or what this machine lacks."""
    parallel = run.parallel
    if run.compile and parallel.zero == 3:
        yield (
            "run.compile: under ZeRO stage 3 DeepSpeed brings every weight together when its layer is reached, which "
            "torch.compile cannot look through; set run.parallel.zero to 2 or less"
        )
    if run.compile and parallel.activation_checkpointing == "selective" and model is not None and model.experts:
        yield (
            "run.compile: layers with experts are compiled in pieces, and torch's selective checkpointing loses count "
            "between them; set run.parallel.activation_checkpointing to full or null"
        )
    if run.compile and isinstance(run, Local) and not has_accelerator() and (problem := missing_compiler()):
        yield f"run.compile: {problem}"
    if parallel.sequence and parallel.tensor == 1:
        yield "run.parallel.sequence: the ranks of a tensor-parallel group share the positions; set run.parallel.tensor"
    if parallel.offload_dir is not None and parallel.offload != "nvme":
        found = "null" if parallel.offload is None else f"'{parallel.offload}'"
        yield f"run.parallel.offload_dir: only offload 'nvme' uses it, found offload {found}; leave it out"


def _check_tensor(run: Run, model: AnyModel | None, lengths: Sequence[int]) -> Iterator[Problem]:
    degree = run.parallel.tensor
    if degree == 1:
        return
    if model is not None:
        if model.vocab_size is None:  # the tokens will say; build_model looks again
            model = model.model_copy(update={"vocab_size": degree * model.vocab_multiple})
        problems = tensor_problems(model, degree, lengths if run.parallel.sequence else ())
        yield from (("model", f"run.parallel.tensor is {degree}: {problem}") for problem in problems)
