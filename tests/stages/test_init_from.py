"""Pretraining that goes on with a model of others: its weights, its tokenizer, and more of a vocabulary."""

from pathlib import Path

import pytest
from hf_directories import FAMILIES, write_hf
from support import PROJECT

from pipeline.settings import decode
from pipeline.stages.import_tokenizer import ImportTokenizer
from pipeline.stages.imported import open_input
from pipeline.stages.loading import load_language_model
from pipeline.stages.pretrain import Pretrain
from pipeline.stages.shard import Shard, TextSource
from pipeline.stages.tokenize import Tokenize
from pipeline.text.readers import Jsonl

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("theirs")]

ENDS = {"llama": "</s>", "gpt2": "<|endoftext|>", "bert": "[SEP]", "modernbert": "[SEP]", "t5": "</s>"}
OBJECTIVES = {
    "bert": {"kind": "next_sentence"},
    "modernbert": {"kind": "masked"},
    "t5": {"kind": "span_corruption", "num_sentinels": 10},
}
SHORT = {"seq_len": 32, "batch_tokens": 128, "validation_sequences": 4, "validate_every_steps": None}
# A rate at which no weight of fp32 moves, unless it is zero.
STILL = {"optimizer": {"kind": "adamw", "lr": 1e-30}, "schedule": {"kind": "constant"}}


@pytest.fixture
def tokens_of(tmp_path, run_stage):
    """Give a function that makes tokens with the tokenizer of a directory."""

    def make(directory: Path, end_of_text: str, **settings):
        reader = Jsonl(id_field="id")
        shard = Shard(sources=[TextSource(path=str(PROJECT / "tests/data/topics.jsonl"), reader=reader)])
        vocabulary = {"kind": "huggingface", "path": str(directory)}
        stage = {"kind": "import_tokenizer", "vocabulary": vocabulary, "end_of_text": end_of_text, **settings}
        inputs = {
            "corpus": run_stage(shard, {}, tmp_path / "corpus"),
            "tokenizer": run_stage(decode(ImportTokenizer, stage), {}, tmp_path / "tokenizer"),
        }
        return run_stage(Tokenize(corpus="@c", tokenizer="@t", held_out_fraction=0.1), inputs, tmp_path / "tokens")

    return make


@pytest.fixture
def go_on(tmp_path, run_stage):
    """Give a function that goes on with the pretraining of a directory."""

    def run(directory: Path, tokens, **settings):
        source = open_input(str(directory), tmp_path / "root", "model")
        stage = {"kind": "pretrain", "tokens": "@t", "init_from": str(directory), "steps": 1, **SHORT, **settings}
        made = run_stage(decode(Pretrain, stage), {"tokens": tokens, "init_from": source}, tmp_path / "model")
        return source, made

    return run


@pytest.mark.parametrize("family", FAMILIES)
def test_pretraining_begins_with_their_weights_and_their_tokenizer(tokens_of, go_on, tmp_path, family):
    directory = write_hf(tmp_path / family, family)
    objective = OBJECTIVES.get(family, {"kind": "causal"})
    source, made = go_on(directory, tokens_of(directory, ENDS[family]), objective=objective, **STILL)
    theirs, ours = load_language_model(source), load_language_model(made)
    more = {"vocab_size": max(theirs.config.vocab_size, ours.config.vocab_size)}  # [PAD] has no row there
    assert ours.config == theirs.config.model_copy(update=more)
    for name, weight in theirs.state_dict().items():
        rows = 400 if name == "embedding.weight" or (name.startswith("head") and len(weight) > 400) else len(weight)
        assert ours.state_dict()[name][:rows].allclose(weight[:rows], rtol=0, atol=2e-30), name


def test_a_vocabulary_grows_by_new_special_tokens(tokens_of, go_on, tmp_path):
    """As fill-in-the-middle needs them."""
    directory = write_hf(tmp_path / "gpt2", "gpt2")
    tokens = tokens_of(directory, "<|endoftext|>", special_tokens=[f"<new_{number}>" for number in range(60)])
    source, made = go_on(directory, tokens, **STILL)
    theirs, ours = load_language_model(source), load_language_model(made)
    assert (theirs.config.vocab_size, ours.config.vocab_size) == (400, 461)  # [PAD] too
    assert ours.embedding.weight[:400].equal(theirs.embedding.weight[:400])
    assert ours.embedding.weight[400:461].std() > 0.01  # drawn, not zero
