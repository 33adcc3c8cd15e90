"""What is said of the memory of a training before it runs."""

import pytest
import torch

from pipeline.launch.local import Local
from pipeline.models.config import Decoder
from pipeline.models.transformer import Transformer
from pipeline.parallel.engine import Precision
from pipeline.settings import decode
from pipeline.stage import Parallel
from pipeline.stages.finetune import Finetune
from pipeline.stages.pretrain import Pretrain
from pipeline.stages.tokenize import Tokenize
from pipeline.stages.train_tokenizer import TrainTokenizer
from pipeline.training.memory import state_bytes

MODEL = {"kind": "decoder", "d_model": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 512}


def run(ranks: int = 1, **parallel) -> Local:
    return Local(ranks=ranks, parallel=Parallel(**parallel))


def test_one_process_needs_what_torch_takes():
    config = decode(Decoder, MODEL)
    model = Transformer(config)
    optimizer = torch.optim.AdamW(model.parameters())
    loss = sum(parameter.square().sum() for parameter in model.parameters())
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    optimizer.step()
    moments = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    held = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None), *moments]
    assert state_bytes(config.num_params(), 2, "fp32", run()) == sum(tensor.nbytes for tensor in held)


@pytest.mark.parametrize(
    ("precision", "zero", "each"),  # bytes for a weight, of weight, gradient, sum of gradients, master and two moments
    [
        ("fp32", 0, 4 + 4 + 8),
        ("fp32", 1, 4 + 4 + (4 + 8) / 4),
        ("fp32", 2, 4 + (4 + 4 + 8) / 4),
        ("fp32", 3, (4 + 4 + 4 + 8) / 4),
        ("bf16", 1, 2 + 2 + 4 + (4 + 8) / 4),
        ("bf16", 2, 2 + (2 + 4 + 4 + 8) / 4),
        ("fp16", 3, (2 + 2 + 4 + 4 + 8) / 4),
    ],
)
def test_zero_shares_out_among_four_ranks_what_its_stage_says(precision: Precision, zero, each):
    assert state_bytes(1000, 2, precision, run(4, zero=zero)) == 1000 * each


def test_tensor_parallel_ranks_share_all_of_it():
    assert state_bytes(1000, 2, "fp32", run(4, tensor=4, zero=1)) == 1000 * 16 / 4
    assert state_bytes(1000, 2, "fp32", run(4, tensor=2, zero=3)) == 1000 * 20 / 4


def test_it_is_known_where_settings_say_how_large_the_model_is():
    stage = decode(Pretrain, {"tokens": "@t", "model": MODEL, "steps": 1})
    known = stage.memory_bytes({}, run())
    assert known == state_bytes(decode(Decoder, MODEL).num_params(), stage.state_copies, "fp32", run())
    without = decode(Pretrain, {"tokens": "@t", "model": {**MODEL, "vocab_size": None}, "steps": 1})
    tokenize = Tokenize(corpus="@c", tokenizer="@t")
    assert without.memory_bytes({"tokens": tokenize}, run()) is None
    upstream = {"tokens": tokenize, "tokens/tokenizer": TrainTokenizer(corpus="@c", vocab_size=512)}
    assert without.memory_bytes(upstream, run()) == known
    finetune = Finetune(model="@m", data="x.jsonl")
    assert finetune.memory_bytes({"model": without}, run()) is None
    assert finetune.memory_bytes({"model": stage}, run()) == state_bytes(
        decode(Decoder, MODEL).num_params(), 2, "fp32", run()
    )
    assert tokenize.memory_bytes({}, run()) is None
