"""Compares models that tensor-parallel ranks share with whole ones, on real ranks.

`python tensor_ranks.py DIRECTORY WORLD TENSOR SEQUENCE PART…`: forks WORLD ranks, of which TENSOR share a model, and
the positions too if SEQUENCE is 1; each leaves DIRECTORY/RANK.json, from the name of a PART to what it found. Every
rank computes what it compares with by itself, in plain torch.
"""

import copy
import gc
import json
import math
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import torch
from forking import run_ranks
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from model_variants import FAMILIES, MAX_SEQ_LEN, make, random_ids

from pipeline.errors import ConfigError
from pipeline.models.classifier import Classifier
from pipeline.models.distillation import Student
from pipeline.models.initial import first_weight, init_weights
from pipeline.models.loss import TokenLoss
from pipeline.models.saved import save_model
from pipeline.models.transformer import Transformer, unit_of_loss
from pipeline.models.weights import weights
from pipeline.parallel.engine import EngineSettings, build_engine, partitioner, process_group
from pipeline.parallel.gathering import full_weights
from pipeline.parallel.mesh import shape_batch
from pipeline.parallel.recompute import recompute
from pipeline.parallel.tensor import materialize, split
from pipeline.stage import Parallel
from pipeline.stages.preparing import INIT_FROM, build_model
from pipeline.training.objectives import Causal
from pipeline.training.step import Batch, take_step

LENGTH, ROWS = 12, 3
STEPS, BATCH, CLIP, SEED, STD = 4, 8, 0.5, 0, 0.1
SIZES = {"vocab_size": 100, "num_heads": 8, "num_kv_heads": 4, "vocab_multiple": 32}  # the last rank has some padding
ALL_PADDING = {"vocab_size": 50, "vocab_multiple": 128}  # the last rank has no id at all
COEFFICIENTS = {"balance": 0.1, "router_z": 0.01}
TRAINED = {
    "decoder": ("grouped", {"qk_norm": True, "predict_ahead": 1, "logit_softcap": 3.0, "tie_embeddings": True}),
    "mixture": ("deepseek", {}),
    "encoder": ("bert", {}),
    "both": ("t5", {"tie_embeddings": True}),
}
TRAINED_WITH = {0: TRAINED, 1: ("decoder", "mixture"), 2: ("decoder", "mixture"), 3: TRAINED}  # by ZeRO stage


# --- losses and gradients of every family, in fp64


def compare(whole, mine, fed, mesh):
    """Return the largest relative differences of what a whole and a shared model make of the same rows."""
    wanted, found = whole(**fed), mine(**fed)
    sum(wanted.values()).backward()
    sum(found.values()).backward()
    losses = {f"loss {term}": apart(found[term].detach(), wanted[term].detach()) for term in wanted}
    return losses | compare_gradients(whole, mine, mesh)


def compare_gradients(whole, mine, mesh):
    worst = {}
    theirs = {name: parameter.grad for name, parameter in whole.named_parameters()}
    for name, parameter in mine.named_parameters():
        if theirs[name] is None:
            assert parameter.grad is None, name
            continue
        dim = getattr(parameter, "partition_dim", None)
        part = theirs[name] if dim is None else theirs[name].chunk(mesh.tensor, dim)[mesh.tensor_rank]
        scale = theirs[name].abs().max().clamp_min(1e-3)  # of a gradient that is zero but for rounding
        worst[name] = float((parameter.grad - part).abs().max() / scale)
    return worst


def apart(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1.0))


def shared(whole, mesh, sequence):
    mine = copy.deepcopy(whole)
    split(mine, weights(whole.config), mesh, sequence)
    return mine


def rows(config):
    """Return rows of several documents, with padding and with positions without a label."""
    documents = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    documents[1, 5:], documents[2, 7:] = 1, -1
    labels = random_ids(ROWS, LENGTH, 1)
    labels[0, 2:6] = -100
    fed = {"ids": random_ids(ROWS, LENGTH), "documents": documents, "labels": labels}
    if config.kind == "encoder_decoder":
        decoder = {"decoder_ids": random_ids(ROWS, 8, 2), "decoder_documents": documents[:, :8]}
        fed |= {**decoder, "labels": labels[:, :8]}
    return fed | ({"sentence": torch.tensor([0, 1, -100])} if getattr(config, "pooler", False) else {})


def compare_families(mesh, sequence):
    found = {}
    for name, (_, changes) in FAMILIES.items():
        if changes.get("num_kv_heads", 8) == 1:
            continue
        for sizes in (SIZES, SIZES | ALL_PADDING) if name in ("llama", "bert") else (SIZES,):
            whole = make(name, **sizes).double().train()
            whole.token_loss = TokenLoss(0.1, 0.01)
            case = f"{name} of {sizes['vocab_size']} ids"
            found[case] = compare(whole, shared(whole, mesh, sequence), rows(whole.config), mesh)
    return found


def compare_others(mesh, sequence):
    """Return the differences of logits, of a classifier and of a student."""
    found = {}
    whole = make("capped", **SIZES).double()
    mine, ids = shared(whole, mesh, sequence), random_ids(ROWS, LENGTH)
    wanted, logits = whole(ids), mine(ids)
    pull = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found["logits"] = {"logits": apart(logits.detach(), wanted.detach())}
    (wanted * pull).sum().backward()
    (logits * pull).sum().backward()
    found["logits"] |= compare_gradients(whole, mine, mesh)

    for name in ("qwen3", "bert", "t5"):
        sorts = Classifier(make(name, **SIZES), 3).double()
        init_weights(sorts, SEED)
        mine = copy.deepcopy(sorts)
        split(mine.trunk, weights(sorts.trunk.config), mesh, sequence)
        length = LENGTH - 3 if sequence else LENGTH  # which the ranks cannot share
        mask = torch.arange(length) < torch.tensor([[length], [5], [1]])
        fed = {"ids": random_ids(ROWS, length), "mask": mask, "labels": torch.tensor([0, 2, 1])}
        found[f"classifier on {name}"] = compare(sorts, mine, fed, mesh)

    teacher = make("grouped", d_model=32, seed=5, std=0.3, vocab_size=70).double()
    student = Student(make("qwen3", **SIZES).config, teacher, 2.0).double().train()
    init_weights(student, SEED)
    mine = copy.deepcopy(student)
    split(mine, weights(student.config), mesh, sequence)
    found["student"] = compare(student, mine, {"ids": random_ids(ROWS, LENGTH), "labels": random_ids(ROWS)}, mesh)
    return found


# --- whole trainings with every ZeRO stage


def example(config, step):
    fed = {"ids": random_ids(BATCH, LENGTH, step), "labels": random_ids(BATCH, LENGTH, step + 50)}
    fed["labels"][::3, 2:6] = -100
    if config.kind == "encoder_decoder":
        fed["decoder_ids"] = random_ids(BATCH, LENGTH, step + 70)
    return fed | ({"sentence": torch.arange(BATCH) % 2} if getattr(config, "pooler", False) else {})


def count(fed):
    found = {"labels": int((fed["labels"] != -100).sum()), "rows": len(fed["ids"])}
    return found | ({"sentences": len(fed["ids"])} if "sentence" in fed else {})


def train_plainly(model):
    optimizer, losses, norms = torch.optim.AdamW(model.parameters(), 0.01), [], []
    for step in range(STEPS):
        fed = example(model.config, step)
        counts = count(fed)
        terms = model(**fed)
        loss = sum(COEFFICIENTS.get(term, 1.0) * v / counts[unit_of_loss(term)] for term, v in terms.items())
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, norms, {name: parameter.detach() for name, parameter in model.named_parameters()}


def create(config, mesh, zero, sequence, dtype, before_each=lambda: None):
    """Return this rank's part of a model, made one weight at a time, and the settings of its engine."""
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    split(model, weights(config), mesh, sequence)
    extra = {"zero_optimization": {"stage3_param_persistence_threshold": 20}}
    shape = shape_batch(BATCH, 2, mesh.data)
    settings = EngineSettings(shape, zero, "fp32", CLIP, extra)

    def value(name):
        before_each()
        return first_weight(config, name, shapes[name], SEED)

    materialize(model, value, mesh, partitioner(settings, mesh) if zero == 3 else None)
    return model, settings


def held():
    """Return the bytes of all tensors on the CPU."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and thing.device.type == "cpu"]
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(sizes.values())


def train(config, mesh, zero, sequence, dtype):
    model, settings = create(config, mesh, zero, sequence, dtype)
    engine = build_engine(model, torch.optim.AdamW(model.parameters(), 0.01), settings, mesh)
    first, losses, norms = full_weights(engine, mesh), [], []
    for step in range(STEPS):
        fed = example(config, step)
        mine = [{name: v[rows] for name, v in fed.items()} for rows in settings.batch.microbatches(mesh.data_rank)]
        counts = [count(microbatch) for microbatch in mine]
        units = {unit: sum(counted[unit] for counted in counts) for unit in counts[0]}
        done = take_step(engine, mesh, Batch(mine, units, 0), COEFFICIENTS)
        losses.append(done.loss)
        norms.append(done.grad_norm)
    found = losses, norms, full_weights(engine, mesh)
    engine.destroy()
    return first, *found


def compare_training(name, mesh, zero, sequence):
    """Return how far a training on ranks, and one in one process in the same precision, are from one in fp64."""
    family, changes = TRAINED[name]
    dtype = torch.float64 if zero == 0 else torch.float32
    alone, exact = (make(family, std=STD, **(SIZES | changes)).train() for _ in range(2))
    first = {name: parameter.detach().clone() for name, parameter in alone.named_parameters()}
    begun, *found = train(alone.config, mesh, zero, sequence, dtype)
    wanted = train_plainly(exact.double())
    differences = {"ranks": far(found, wanted), "alone": far(train_plainly(alone.to(dtype)), wanted)}
    moved = {name: float((begun[name] - first[name]).abs().max()) for name in first if mesh.rank == 0}
    return differences | {"first": moved}


def far(found, wanted):
    """Return the relative differences of losses, gradient norms and, where they are, last weights."""
    differences = {
        name: max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))
        for name, ours, theirs in zip(("loss", "grad_norm"), found, wanted, strict=False)
    }
    # Note: softmax does not see a number that is added to all keys, so the gradient of their bias is nothing but
    # rounding, which AdamW blows up to the size of its learning rate.
    kept = [name for name in found[2] if name in wanted[2] and not name.endswith("key.bias")]
    return differences | {"weights": {name: apart(found[2][name].double(), wanted[2][name]) for name in kept}}


def measure_creation(mesh, zero):
    """Return the bytes of the whole model, of this rank's part, of the largest weight, and what was held at most."""
    config, found = make("llama", num_layers=4, **SIZES).config, []
    gc.collect()
    before = held()
    model, _ = create(config, mesh, zero, False, torch.float32, lambda: found.append(held() - before))
    found.append(held() - before)
    sizes = [4 * math.prod(weight.shape) for weight in weights(config)]
    del model
    return {"whole": sum(sizes), "weight": max(sizes), "most": max(found), "last": found[-1]}


def begin_with(mesh, zero, directory):
    """Return how far weights that pretraining begins with are from those of `init_from`, or their first values."""
    path = directory / f"source-{mesh.rank}-{zero}"
    path.mkdir()
    source = make("deepseek", seed=9, **(SIZES | {"vocab_size": 90}))
    source.decoder.blocks[1].mlp.router.balance_bias += torch.arange(4)
    save_model(path, source)
    stage = SimpleNamespace(objective=Causal(), seed=SEED, precision="fp32", label_smoothing=0.1, z_loss=0.0)
    run = SimpleNamespace(parallel=Parallel(zero=zero, tensor=mesh.tensor))
    inputs = {INIT_FROM: SimpleNamespace(names=[], path=path, file=None)}
    config = source.config.model_copy(update={"vocab_size": 100, "vocab_multiple": 64, "predict_ahead": 1})
    model = build_model(stage, config, SimpleNamespace(inputs=inputs, settings=run, log=lambda line: None), mesh)
    wanted = {weight.name: first_weight(config, weight.name, weight.shape, SEED) for weight in weights(config)}
    for name, weight in source.state_dict().items():
        rows = 90 if name == "embedding.weight" else len(weight)
        wanted.setdefault(name, torch.zeros_like(weight))[:rows] = weight[:rows]
    found = {}
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        dim = getattr(parameter, "partition_dim", None)
        whole = wanted.get(name, torch.zeros(4))  # the biases of routers that the source has not
        part = whole if dim is None else whole.chunk(mesh.tensor, dim)[mesh.tensor_rank]
        with deepspeed.zero.GatheredParameters(parameter, enabled=hasattr(parameter, "ds_id")):
            found[name] = float((parameter - part).abs().max())
    return found | {"pieces": sum(hasattr(p, "ds_id") for p in model.parameters())}


# --- random numbers


def check_dropout(mesh, sequence):
    """Return what is drawn where, and how far recomputation is from what is computed once."""
    model = shared(make("grouped", dropout=0.3, qk_norm=True, **SIZES).double().train(), mesh, sequence)
    block = model.decoder.blocks[0]
    torch.manual_seed(3)
    with block.attention.branch():
        inside = torch.rand(3).tolist()
    outside = torch.rand(3).tolist()
    residual = block.dropout(torch.ones(64)).tolist()
    embedded = model.dropout(torch.ones(64)).tolist()
    gradients = []
    for kind in (None, "full", "selective"):
        again = shared(make("grouped", dropout=0.3, qk_norm=True, **SIZES).double().train(), mesh, sequence)
        recompute(again.decoder.blocks, kind)
        torch.manual_seed(4)
        again(**rows(again.config))["tokens"].backward()
        gradients.append({name: parameter.grad for name, parameter in again.named_parameters()})
    differ = [name for other in gradients[1:] for name in other if not torch.equal(gradients[0][name], other[name])]
    replicated = {name: g.tolist() for name, g in gradients[0].items() if name.endswith("norm.weight")}
    return {
        "inside": inside,
        "outside": outside,
        "residual": residual,
        "embedded": embedded,
        "differ": differ,
        "replicated": replicated,
    }


def refused(mesh):
    try:
        shared(make("llama", **SIZES), mesh, sequence=True)(random_ids(2, MAX_SEQ_LEN - 1))
    except ConfigError as error:
        return str(error)
    return ""


def run_rank(directory, tensor, sequence, parts, rank):
    with process_group(tensor) as mesh:
        checks = {
            "gradients": lambda: compare_families(mesh, sequence) | compare_others(mesh, sequence),
            "dropout": lambda: check_dropout(mesh, sequence),
            "refused": lambda: refused(mesh),
            "begun": lambda: {f"ZeRO {zero}": begin_with(mesh, zero, directory) for zero in (0, 3)},
            "creation": lambda: {f"ZeRO {zero}": measure_creation(mesh, zero) for zero in (1, 3)},
            "training": lambda: {
                f"{name}, ZeRO {zero}": compare_training(name, mesh, zero, sequence)
                for zero, names in TRAINED_WITH.items()
                for name in names
            },
        }
        found = {part: checks[part]() for part in parts}
    (directory / f"{mesh.rank}.json").write_text(json.dumps(found))


def main():
    directory, (world, tensor), sequence = Path(sys.argv[1]), map(int, sys.argv[2:4]), sys.argv[4] == "1"
    directory.mkdir(parents=True)
    gc.freeze()  # `held` need not look at what there was before
    sys.exit(not run_ranks(world, partial(run_rank, directory, tensor, sequence, sys.argv[5:])))


if __name__ == "__main__":
    main()
