"""Runs the stage `prove` on some ranks with a fault in the code that trains, one after another.

`python prove_ranks.py DIRECTORY WORLD [NAME…]`: for each fault, and for what is right, the ranks are forked, break one
thing in themselves and run the stage on some layouts; DIRECTORY/NAME.json has what the stage ended with, the rows of
its certificate, and the first layout.
"""

import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import deepspeed
import deepspeed.runtime.engine
import deepspeed.runtime.zero.muon.muon_optimizer
import torch
import torch.distributed as dist
from forking import run_ranks

from pipeline.env import Ranks
from pipeline.launch.local import Local
from pipeline.models import weights as plan
from pipeline.models.config import Decoder, Encoder, EncoderDecoder
from pipeline.models.loss import Output
from pipeline.models.parts import Experts
from pipeline.parallel import recompute, tensor
from pipeline.parallel.mesh import Mesh
from pipeline.stage import Context
from pipeline.stages import prove
from pipeline.training.certificate import chance
from pipeline.training.certificate.layouts import Layout
from pipeline.training.optim import Muon

Fault = Callable[[], None]


def skip_call(place: object, name: str, number: int, instead: Callable[..., object]) -> None:
    """Let one call of a function do something else; it is the same one on every rank."""
    original, calls = getattr(place, name), iter(range(10**9))

    def broken(*arguments, **named):
        does = instead if next(calls) == number else original
        return does(*arguments, **named)

    setattr(place, name, broken)


def drop_tensor_sum() -> None:
    skip_call(tensor, "_sum", 40, lambda x, mesh: x.clone())


def drop_gradient_average() -> None:
    skip_large(dist, "all_reduce", 2)


def skip_large(place: object, name: str, number: int) -> None:
    """Leave out one all-reduce of gradients: of those of many numbers, since losses and norms are few."""
    original, calls = getattr(place, name), iter(range(10**9))

    def broken(tensor, *arguments, **named):
        if tensor.numel() > 1000 and next(calls) == number:
            return None
        return original(tensor, *arguments, **named)

    setattr(place, name, broken)


def change_plan(change: Callable[[plan.Weight], plan.Weight]) -> None:
    original = plan.weights
    plan.weights = lambda config: map(change, original(config))


def count_twice(weight: plan.Weight) -> plan.Weight:
    return replace(weight, summed="heads") if weight.name == "decoder.norm.weight" else weight


def not_reduced(kind: str, weight: plan.Weight) -> plan.Weight:
    return replace(weight, summed=None) if weight.summed == kind and "blocks.1" in weight.name else weight


def leave_unmarked() -> None:
    original = tensor.split

    def broken(model, weights, mesh, sequence=False):
        original(model, weights, mesh, sequence)
        for parameter in model.parameters():
            if hasattr(parameter, "partition_dim"):
                parameter.tensor_model_parallel = parameter.model_parallel = False

    tensor.split = broken


def allow_odd_vocabulary() -> None:
    preparing_problems = plan.tensor_problems
    plan.tensor_problems = lambda config, degree, lengths=(): [
        problem for problem in preparing_problems(config, degree, lengths) if "vocabulary" not in problem
    ]


def count_padding() -> None:
    right = Output.num_ids.fget
    Output.num_ids = property(lambda output: right(output) if output.group is None else len(output.weight_VD))


def same_seeds() -> None:
    tensor.own_random_numbers = lambda mesh: nullcontext()


def same_seeds_of_data_ranks() -> None:
    chance.seed_step = lambda seed, step, data_rank: torch.manual_seed(seed * 1000 + step)


def other_seeds_in_the_residual_stream() -> None:
    chance.seed_step = lambda seed, step, data_rank: torch.manual_seed(1000 * step + int(os.environ["RANK"]))


def forget_accumulation() -> None:
    engine = deepspeed.runtime.engine.DeepSpeedEngine
    original = engine.backward
    engine.backward = lambda self, loss, **named: original(self, loss * self.gradient_accumulation_steps(), **named)


def count_own_labels() -> None:
    """Take the mean over what one rank has instead of what all have: a mean of means."""
    original = Mesh.sum

    def broken(self, numbers, device):
        is_count = len(numbers) == 3 and all(number == int(number) for number in numbers)
        return [number * self.data for number in numbers] if is_count else original(self, numbers, device)

    Mesh.sum = broken


def seed_again() -> None:
    """Let recomputation draw other random numbers than the first time."""
    original = recompute.checkpoint
    recompute.checkpoint = lambda *arguments, **named: original(*arguments, preserve_rng_state=False, **named)


STAGE = prove.Prove(steps=4)
MOE = Experts(count=4, shared=1, d_ff=16, router_z_loss=0.01, balance_bias_rate=0.01)
SMALL = {"vocab_size": 61, "vocab_multiple": 8, "d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 48}
MODELS = {
    "experts": Decoder(**SMALL, experts=MOE, qk_norm=True, predict_ahead=1, tie_embeddings=False, logit_softcap=5.0),
    "encoder": Encoder(**SMALL, token_types=2, pooler=True, bias=True, norm="layernorm", positions="learned"),
    "encoder_decoder": EncoderDecoder(**SMALL, positions="relative", mlp="relu", bias=True),
}
TWO = Layout("fp64", 0, 2)
SHARED, SEQUENCE = (Layout("fp64", 0, 1, 2, sequence=sequence) for sequence in (False, True))
FP64 = [TWO, SHARED, SEQUENCE]
RIGHT: dict[str, tuple[Fault, list[Layout], prove.Prove]] = {
    "right": (lambda: None, [*FP64, Layout("fp32", 1, 1, 2), Layout("fp32", 3, 1, 2, offload="cpu")], STAGE),
    "muon": (
        lambda: None,
        [*FP64, Layout("fp32", 2, 2), Layout("fp32", 1, 1, 2, 2, True), Layout("fp32", 3, 1, 2)],
        prove.Prove(steps=4, optimizer=Muon(lr=1e-3)),
    ),
    **{name: (lambda: None, FP64, prove.Prove(steps=4, model=model)) for name, model in MODELS.items()},
    "stopped": (lambda: None, [TWO], STAGE),
}
ODD = prove.Prove(steps=4, model=STAGE.model.model_copy(update={"vocab_multiple": 1}))
FAULTS: dict[str, tuple[Fault, list[Layout], prove.Prove]] = {
    "drop_tensor_sum": (drop_tensor_sum, [SHARED], STAGE),
    "drop_gradient_average": (drop_gradient_average, [TWO], STAGE),
    "count_twice": (partial(change_plan, count_twice), [SHARED], STAGE),
    "odd_vocabulary": (allow_odd_vocabulary, [SHARED], ODD),
    "count_padding": (count_padding, [SHARED], STAGE),
    "norm_of_sequence": (partial(change_plan, partial(not_reduced, "sequence")), [SEQUENCE], STAGE),
    "norm_of_heads": (partial(change_plan, partial(not_reduced, "heads")), [SHARED], STAGE),
    "leave_unmarked": (leave_unmarked, [Layout("fp32", 1, 1, 2)], STAGE),
    "same_seeds": (same_seeds, [SHARED], STAGE),
    "same_seeds_of_data_ranks": (same_seeds_of_data_ranks, [TWO], STAGE),
    "other_seeds": (other_seeds_in_the_residual_stream, [SHARED], STAGE),
    "other_seeds_again": (seed_again, [TWO], STAGE),
    "forget_accumulation": (forget_accumulation, [replace(TWO, accumulation=2)], STAGE),
    "count_own_labels": (count_own_labels, [TWO], STAGE),
}


def run_rank(world: int, directory: Path, name: str, rank: int) -> None:
    fault, tried, stage = {**RIGHT, **FAULTS}[name]
    prove.Prove.layouts = lambda self, run: tried
    fault()
    ctx = Context("prove", directory / name, {}, Local(ranks=world), Ranks(rank, world, rank))
    ctx.should_stop = lambda: name == "stopped" and rank == 1  # one of them is enough
    ended = ""
    try:
        stage.run(ctx)
    except Exception as error:
        ended = "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])
    if rank == 0:
        certificate = directory / name / prove.CERTIFICATE
        rows = json.loads(certificate.read_text())["rows"] if certificate.exists() else []
        (directory / f"{name}.json").write_text(json.dumps({"ended": ended, "rows": rows, "tried": tried[0].name}))


def main() -> None:
    directory, world = Path(sys.argv[1]), int(sys.argv[2])
    for name in sys.argv[3:] or [*RIGHT, *FAULTS]:
        (directory / name / "work").mkdir(parents=True)
        if not run_ranks(world, partial(run_rank, world, directory, name)):
            sys.exit(f"{name}: a rank failed")


if __name__ == "__main__":
    main()
