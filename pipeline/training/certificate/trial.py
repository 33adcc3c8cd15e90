"""The training that a certificate does again and again: in one process by plain torch, and under a layout.

What is learned follows from the seed alone, and rows differ in how much of them counts, so that a mean taken over the
wrong number shows. Under a layout everything is done by the code that trains: only the order in which the plain loop
does it is written down here a second time, without an engine, a mesh or a group.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.config import AnyModel, Encoder, EncoderDecoder
from pipeline.models.initial import init_weights, lr_scales
from pipeline.models.layers import Block
from pipeline.models.loss import IGNORED_LABEL
from pipeline.models.moe import after_step
from pipeline.models.transformer import Transformer, unit_of_loss
from pipeline.models.weights import SENTENCE_CLASSES
from pipeline.parallel.engine import build_engine
from pipeline.parallel.gathering import full_weights
from pipeline.parallel.mesh import BatchShape, Mesh
from pipeline.parallel.recompute import recompute
from pipeline.stage import Parallel
from pipeline.training.certificate.layouts import Layout
from pipeline.training.optim import AnyOptimizer
from pipeline.training.step import Batch, take_step


@dataclass(frozen=True)
class Trial:
    """What is trained, whatever the layout.

    Attributes:
        make: Gives this rank's part of a model with its first weights, as a stage that trains does.
        coefficients: What each term of the loss is multiplied with; 1 for those not named.
        like: What the run says of parallelism; of it `deepspeed` is tried too.
    """

    model: AnyModel
    make: Callable[[AnyModel, Layout, Mesh], Transformer]
    optimizer: AnyOptimizer
    seed: int
    batch_rows: int
    seq_len: int
    clip_norm: float
    coefficients: Mapping[str, float] = field(default_factory=dict)
    like: Parallel = field(default_factory=Parallel)

    def build_optimizer(self, model: Transformer) -> torch.optim.Optimizer:
        """Return the optimizer at the trial's learning rate, which is constant."""
        optimizer = self.optimizer.build(model, lr_scales(model, self.model))
        for group in optimizer.param_groups:
            group["lr"] = self.optimizer.lr * group["lr_scale"]
        return optimizer

    def example(self, step: int) -> dict[str, Tensor]:
        """Return all rows of a step as the model's arguments.

        An id is the one before it and a little more, so there is something to learn; the end of each row but the first
        is padding, of another length in each.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        vocab_size = self.model.real_vocab_size
        steps = torch.randint(1, 4, (self.batch_rows, self.seq_len + 1), generator=generator)
        steps[:, 0] = torch.randint(0, vocab_size, (self.batch_rows,), generator=generator)
        ids = steps.cumsum(1) % vocab_size
        lengths = torch.randint(self.seq_len // 2, self.seq_len + 1, (self.batch_rows, 1), generator=generator)
        lengths[0] = self.seq_len
        is_padding = torch.arange(self.seq_len) >= lengths
        documents = torch.where(is_padding, -1, 0).int()
        read, said = ids[:, :-1].contiguous(), ids[:, 1:].masked_fill(is_padding, IGNORED_LABEL)
        if isinstance(self.model, EncoderDecoder):  # its decoder says what its encoder has read
            own = {"decoder_ids": read, "decoder_documents": documents}
            return {"ids": ids[:, 1:].contiguous(), "documents": documents, "labels": said, **own}
        example = {"ids": read, "documents": documents, "labels": said}
        if isinstance(self.model, Encoder) and self.model.pooler:
            example["sentence"] = (ids[:, 0] % SENTENCE_CLASSES).where(
                lengths[:, 0] > self.seq_len * 3 // 4, IGNORED_LABEL
            )
        return example


@dataclass
class Trace:
    """What a training left: for every step its loss and the norm of its gradient, and the last weights.

    Attributes:
        weights: Whole, by name; on ranks other than 0 there are none.
        apart: Parameters that ranks hold that should be copies of one another, but are not, on any rank.
    """

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    apart: Sequence[str] = ()


def count_units(example: Mapping[str, Tensor]) -> dict[str, int]:
    """Return how many labels, rows and rows with a class an example has."""
    found = {"labels": int((example["labels"] != IGNORED_LABEL).sum()), "rows": len(example["ids"])}
    if "sentence" in example:
        found["sentences"] = int((example["sentence"] != IGNORED_LABEL).sum())
    return found


def train_plainly(trial: Trial, lengths: Sequence[int]) -> dict[int, Trace]:
    """Train in this process with nothing but torch, all rows at once, in fp64; return what was there after each length.

    Attributes:
        lengths: Numbers of steps; 0 is the beginning.
    """
    model = Transformer(trial.model)
    init_weights(model, trial.seed)
    model.double()
    optimizer = trial.build_optimizer(model)
    found, trace = {}, Trace()
    for step in range(max(lengths) + 1):
        if step:
            model.train()
            example = trial.example(step)
            counts = count_units(example)
            terms: dict[str, Tensor] = model(**example)
            shares = [trial.coefficients.get(t, 1.0) * v / counts[unit_of_loss(t)] for t, v in terms.items()]
            loss = torch.stack([share.double() for share in shares]).sum()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.clip_grad_norm_(model.parameters(), trial.clip_norm)
            optimizer.step()
            after_step(model)
            trace.losses.append(float(loss.detach()))
            trace.grad_norms.append(float(norm))
        if step in lengths:
            last = {name: p.detach().clone() for name, p in model.named_parameters()}
            found[step] = Trace(list(trace.losses), list(trace.grad_norms), last)
    return found


def train_under(trial: Trial, layout: Layout, mesh: Mesh, steps: int) -> Trace:
    """Train under a layout; every rank of the mesh must come here."""
    trace = Trace()
    with built(trial, layout, mesh) as engine:
        for step in range(1, steps + 1):
            done = take_step(engine, mesh, feed(trial, layout, mesh, step), trial.coefficients)
            after_step(engine.module, mesh.data_group)
            trace.losses.append(done.loss)
            trace.grad_norms.append(done.grad_norm)
        trace.apart = copies_apart(engine, mesh)
        trace.weights = full_weights(engine, mesh)
    return trace


def shape(trial: Trial, layout: Layout) -> BatchShape:
    """Return how a layout spreads the batch."""
    per_rank = trial.batch_rows // layout.data
    return BatchShape(trial.batch_rows, per_rank // layout.accumulation, layout.accumulation, layout.data)


@contextmanager
def built(trial: Trial, layout: Layout, mesh: Mesh) -> Iterator[Any]:
    """Give the engine that trains the model under a layout, and leave the process as it was."""
    linear = F.linear  # Note: for which DeepSpeed puts its own with ZeRO stage 3, for good
    model = trial.make(trial.model, layout, mesh)
    recompute((module for module in model.modules() if isinstance(module, Block)), layout.activation_checkpointing)
    settings = layout.engine(shape(trial, layout), trial.like, trial.clip_norm)
    engine = build_engine(model, trial.build_optimizer(model), settings, mesh)
    try:
        yield engine
    finally:
        engine.destroy()
        F.linear = linear


def feed(trial: Trial, layout: Layout, mesh: Mesh, step: int) -> Batch:
    """Return the rows of a step that this rank feeds."""
    example = trial.example(step)
    microbatches = [
        {name: tensor[rows] for name, tensor in example.items()}
        for rows in shape(trial, layout).microbatches(mesh.data_rank)
    ]
    counts = [count_units(microbatch) for microbatch in microbatches]
    totals = {unit: sum(count[unit] for count in counts) for unit in counts[0]}
    return Batch(microbatches, totals, tokens=sum(microbatch["ids"].numel() for microbatch in microbatches))


def copies_apart(engine: Any, mesh: Mesh) -> list[str]:
    """Return the names of the parameters of which some ranks should hold the same bits, and do not.

    Data-parallel ranks hold the same, but where ZeRO cuts every parameter; tensor-parallel ranks hold the same of what
    they do not share.
    """
    named = list(engine.module.named_parameters())
    sums = torch.stack([_checksum(parameter) for _, parameter in named])
    differs = torch.zeros(len(named), dtype=torch.bool, device=sums.device)
    if not any(hasattr(parameter, "ds_tensor") for _, parameter in named):
        differs |= _differs(sums, mesh.data_group)
    shared = torch.tensor([getattr(p, "tensor_model_parallel", False) for _, p in named], device=sums.device)
    differs |= _differs(sums, mesh.tensor_group) & ~shared
    counts = mesh.sum_all(differs.double().tolist(), sums.device)
    return [name for (name, _), count in zip(named, counts, strict=True) if count]


def _checksum(parameter: Any) -> Tensor:
    """Return an integer that follows from the bits of what this rank holds."""
    held = getattr(parameter, "ds_tensor", parameter).detach().contiguous().flatten()
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[held.element_size()]
    places = torch.arange(1, held.numel() + 1, device=held.device)
    checksum: Tensor = (held.view(integers).long() * places).sum()  # wraps around
    return checksum


def _differs(sums: Tensor, group: Any) -> Tensor:
    import torch.distributed as dist

    highest, lowest = sums.clone(), sums.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    dist.all_reduce(lowest, dist.ReduceOp.MIN, group=group)
    return highest != lowest
