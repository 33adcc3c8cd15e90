"""Every family of models and every way to train one, from tokens to a saved model, at the smallest size that learns."""

import json
import math
import random
import shutil
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import run_pipeline

from pipeline.artifact import WORK, Artifact, InputRecord, Made, Manifest, open_artifact, write_manifest
from pipeline.errors import ConfigError, Preempted
from pipeline.models.saved import load_model
from pipeline.settings import decode, encode, fingerprint
from pipeline.stage import Context, Run, Stage, read_outputs
from pipeline.stages.evaluate import Evaluate
from pipeline.stages.pretrain import Pretrain
from pipeline.stages.shard import Shard, TextSource
from pipeline.stages.tokenize import Tokenize
from pipeline.stages.train_tokenizer import TrainTokenizer
from pipeline.text.readers import Jsonl as JsonlReader
from pipeline.text.stream import open_stream
from pipeline.track import Jsonl, open_tracker
from pipeline.training.metrics import score

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("families")]

SPECIAL = ["<|endoftext|>", "[CLS]", "[SEP]", "[MASK]", "<extra_id_{0..9}>"]
SMALL = {"d_model": 32, "num_layers": 2, "num_heads": 2, "max_seq_len": 64}
DECODER = {"kind": "decoder", **SMALL}
BERT = {"kind": "encoder", **SMALL, "token_types": 2, "pooler": True}
T5 = {"kind": "encoder_decoder", **SMALL, "positions": "relative"}
EXPERTS = {"count": 4, "d_ff": 32, "router": {"kind": "token_choice", "top_k": 2}, "balance_bias_rate": 0.01}
SPANS = {"kind": "span_corruption", "num_sentinels": 10}
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]

# fp32 sums of some thousand terms in another order
ROUNDING = 1e-5


MADE = Made(version="0", commit=None, python="", host="", time="", seconds=0, ranks=1)


def make(
    stage: Stage,
    inputs: Mapping[str, Artifact],
    directory: Path,
    should_stop: Callable[[], bool] = lambda: False,
    **how: object,
) -> Artifact:
    """Run a stage in this process as the worker does, with a file of metrics, and open what it made."""
    for folder in ("units", "ranks"):
        (directory / WORK / folder).mkdir(parents=True, exist_ok=True)
    ctx = Context(
        stage.kind,
        directory,
        inputs,
        Run(kind="local", **how),
        open_tracker=lambda after: open_tracker(Jsonl(), directory, "", "", {}, after),
        should_stop=should_stop,
    )
    try:
        stage.run(ctx)
    finally:
        ctx.close_tracker(failed=False)
    ctx.output.save(directory / WORK / "ranks/00000.json")
    final = Context(stage.kind, directory, inputs, Run(kind="local"))
    files, stats = read_outputs(directory)
    final.output.files.update(files)
    stats = stage.finish(final, stats)
    records = {
        name: InputRecord(path=str(artifact.path), fingerprint=artifact.manifest.fingerprint)
        for name, artifact in inputs.items()
    }
    manifest = Manifest(
        kind=stage.produces,
        name=stage.kind,
        fingerprint=fingerprint(encode(stage)),
        stage=encode(stage),
        inputs=records,
        stats=stats,
        files=dict(sorted(final.output.files.items())),
        made=MADE,
    )
    write_manifest(directory, manifest)
    return open_artifact(directory, stage.produces)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Artifact:
    """Tokens of texts that count, by a tokenizer with special tokens."""
    root = tmp_path_factory.mktemp("special")
    chance, rows = random.Random(0), []
    for number in range(400):
        start = chance.randrange(10)
        words = [NUMBERS[(start + place) % 10] for place in range(chance.randrange(20, 60))]
        rows.append(json.dumps({"id": f"d{number}", "text": " ".join(words)}) + "\n")
    (root / "texts.jsonl").write_text("".join(rows))
    source = TextSource(path=str(root / "texts.jsonl"), reader=JsonlReader(id_field="id"))
    corpus = make(Shard(sources=[source]), {}, root / "corpus")
    trainer = decode(TrainTokenizer, {"corpus": "@c", "vocab_size": 300, "special_tokens": SPECIAL})
    tokenizer = make(trainer, {"corpus": corpus}, root / "tokenizer")
    stage = Tokenize(corpus="@c", tokenizer="@t", held_out_fraction=0.1)
    return make(stage, {"corpus": corpus, "tokenizer": tokenizer}, root / "tokens")


@pytest.fixture
def train(tokens, tmp_path):
    """Give a function that pretrains with some settings, in a directory of its own, and opens what it made."""
    number = count()

    def run(inputs=None, directory=None, should_stop=lambda: False, how=None, **settings) -> Artifact:
        plain = {"tokens": "@tokens", "seq_len": 32, "batch_tokens": 256, "steps": 6, "validation_sequences": 8}
        plain |= {"optimizer": {"kind": "adamw", "lr": 1e-2}, "validate_every_steps": 3}
        stage = decode(Pretrain, {"kind": "pretrain", **plain, **settings}, where="stage")
        where = directory or tmp_path / f"model-{next(number)}"
        return make(stage, {"tokens": tokens, **(inputs or {})}, where, should_stop, **(how or {}))

    return run


def rows_of(artifact: Artifact) -> list[dict]:
    return [json.loads(line) for line in artifact.file("metrics.jsonl").read_text().splitlines()]


def weights_of(artifact: Artifact) -> dict[str, torch.Tensor]:
    return load_file(artifact.file("model.safetensors"))


def stop_after(checks: int) -> Callable[[], bool]:
    """Return a question whether to stop that is answered with yes after some steps."""
    asked = count(1)
    return lambda: next(asked) >= checks


def test_bert_learns_masked_words_and_pairs(train, tokens, tmp_path):
    model = train(
        model=BERT, objective={"kind": "next_sentence"}, packing={"kind": "padded"}, max_epochs=None, steps=12
    )
    first, *_, last = rows_of(model)
    assert first["loss"] == pytest.approx(first["loss.masked"] + first["loss.next_sentence"], rel=ROUNDING)
    assert first["loss.masked"] == pytest.approx(math.log(tokens.stats["vocab_size"]), abs=0.3)  # knows nothing yet
    assert first["loss.next_sentence"] == pytest.approx(math.log(2), abs=0.3)
    assert last["loss.masked"] < first["loss.masked"] - 0.5
    assert last["validation_loss"] == pytest.approx(
        last["validation_loss.masked"] + last["validation_loss.next_sentence"], rel=ROUNDING
    )
    assert "validation_bits_per_byte" not in last
    assert model.stats["terms"] == ["masked", "next_sentence"]
    assert "(masked " in Pretrain.headline(model.stats)[1]
    found = make(Evaluate(model="@m", tokens="@t"), {"model": model, "tokens": tokens}, tmp_path / "evaluate")
    assert found.stats["loss"] == pytest.approx(found.stats["loss.masked"] + found.stats["loss.next_sentence"])
    assert found.stats["perplexity"] == pytest.approx(math.exp(found.stats["loss.masked"]))
    assert "bits_per_byte" not in found.stats
    assert Evaluate.headline(found.stats)[1].startswith("loss masked ")


def test_t5_learns_spans(train, tokens, tmp_path):
    model = train(model=T5, objective=SPANS, steps=12)
    first, *_, last = rows_of(model)
    assert "loss.spans" not in first  # there is only one term
    assert last["loss"] < first["loss"] - 0.5
    found = make(Evaluate(model="@m", tokens="@t"), {"model": model, "tokens": tokens}, tmp_path / "evaluate")
    assert found.stats["predicted"] < found.stats["tokens"]
    assert Evaluate.headline(found.stats)[1] == f"loss span_corruption {found.stats['loss']:.3f}"
    batches = json.loads((tmp_path / "evaluate/work/progress/00000.json").read_text())
    assert (batches["done"], batches["noun"]) == (batches["total"], "batches")
    asked = iter([False, True])
    with pytest.raises(Preempted, match=rf"evaluate after 1 of {batches['total']} batches; it will begin again"):
        inputs = {"model": model, "tokens": tokens}
        make(Evaluate(model="@m", tokens="@t"), inputs, tmp_path / "stopped", should_stop=lambda: next(asked))


@pytest.mark.parametrize(
    "settings",
    [
        {"model": BERT, "objective": {"kind": "masked", "unit": "whole_word", "first_token": "[CLS]"}},
        {"model": {**BERT, "token_types": 0, "pooler": False}, "objective": {"kind": "masked"}, "document_mask": False},
        {"model": BERT, "objective": {"kind": "sentence_order"}, "packing": {"kind": "best_fit"}},
        {"model": DECODER, "objective": {"kind": "prefix"}, "label_smoothing": 0.1, "z_loss": 1e-4},
        {"model": T5, "objective": {"kind": "denoisers", "denoisers": [{"noise_density": 0.2, "mean_span": 4}],
                                    "num_sentinels": 10}},
        {"model": {**DECODER, "mup_base_width": 16}, "optimizer": {"kind": "muon", "lr": 1e-2},
         "schedule": {"kind": "wsd"}, "average": {"kind": "last", "count": 2, "every_steps": 2}},
    ],
    ids=["whole_word", "no_mask", "sentence_order", "prefix", "denoisers", "muon"],
)  # fmt: skip
def test_each_objective_learns_something(train, settings):
    model = train(**{"steps": 9, "max_epochs": None, **settings})
    losses = [row["loss"] for row in rows_of(model)]
    assert losses[-1] < losses[0] - 0.2
    assert model.stats["validation_loss"] < losses[0]


def test_several_tokens_ahead_are_predicted(train):
    first = rows_of(train(model={**DECODER, "predict_ahead": 2}, steps=3))[0]
    terms = [first[f"loss.{name}"] for name in ("next_token", "ahead_1", "ahead_2")]
    assert first["loss"] == pytest.approx(sum(terms), rel=ROUNDING)
    assert terms[0] > terms[1] > terms[2] > 0.8 * math.log(300)  # a sum over fewer and fewer labels


def test_experts_are_balanced_and_their_biases_kept(train, tokens):
    model = train(model={**DECODER, "experts": EXPERTS}, steps=12)
    row = rows_of(model)[-1]
    assert row["router.load_max"] >= 1 >= row["router.load_min"]
    assert {"router.entropy", "router.dropped_fraction", "router.load.1.3"} <= row.keys()
    assert row["loss"] == pytest.approx(row["loss.next_token"] + 0.01 * row["loss.balance"], rel=ROUNDING)
    assert row["validation_loss"] == pytest.approx(model.stats["validation_loss"])
    assert "validation_loss.balance" not in row
    bias = weights_of(model)["decoder.blocks.0.mlp.router.balance_bias"]
    assert 0 < bias.abs().max() <= 12 * 0.01 + 1e-6
    assert load_model(model.path).decoder.blocks[0].mlp.router.balance_bias.equal(bias)


@pytest.mark.parametrize("zero", [1, 3])
def test_a_stopped_run_ends_in_the_same_bits(train, tmp_path, zero):
    settings = {"model": {**DECODER, "experts": EXPERTS, "dropout": 0.1}, "average": {"kind": "ema", "decay": 0.9}}
    how = {"parallel": {"zero": zero}}
    whole = train(**settings, how=how)
    with pytest.raises(Preempted):
        train(**settings, how=how, directory=tmp_path / "stopped", should_stop=stop_after(3))
    stopped = train(**settings, how=how, directory=tmp_path / "stopped")
    one, other = weights_of(whole), weights_of(stopped)
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)
    losses = [[row["loss"] for row in rows_of(model)] for model in (whole, stopped)]
    assert losses[0] == losses[1]


def test_a_run_that_has_lost_its_checkpoints_says_so(train, tmp_path, capsys):
    lost = "pretrain: there is no checkpoint: begins at step 0 again (3 steps had been done)"
    where = tmp_path / "stopped"
    with pytest.raises(Preempted):
        train(model=DECODER, directory=where, should_stop=stop_after(3))
    shutil.rmtree(where / "checkpoints")
    assert lost not in capsys.readouterr().out
    model = train(model=DECODER, directory=where)
    assert lost in capsys.readouterr().out.splitlines()
    assert [row["step"] for row in rows_of(model)] == [1, 2, 3, 4, 5, 6]


def test_the_average_is_what_is_validated_and_kept(train, tokens):
    last = train(model=DECODER)
    mean = train(model=DECODER, average={"kind": "ema", "decay": 0.9})
    assert [row["loss"] for row in rows_of(mean)] == [row["loss"] for row in rows_of(last)]
    assert mean.stats["validation_loss"] != last.stats["validation_loss"]
    assert validation_loss(mean, tokens) == pytest.approx(mean.stats["validation_loss"], rel=ROUNDING)


def validation_loss(model: Artifact, tokens: Artifact) -> float:
    """Return the loss of a saved model over all that is held out, which is less than eight times eight sequences."""
    from pipeline.stages.preparing import Question, make_examples

    stage = decode(Pretrain, model.manifest.stage)
    asked = Question(stage.objective, stage.seq_len, stage.document_mask)
    examples = make_examples(asked, 0, tokens, load_model(model.path).config)
    held = open_stream(tokens, "held-")
    total = -(-held.num_tokens // stage.objective.row_tokens(stage.seq_len))
    windows = [number * total // 8 for number in range(8)]
    return score(load_model(model.path), held, examples, windows).loss


@pytest.mark.parametrize("how", [{"microbatch_sequences": 2}, {"parallel": {"zero": 2}}, {"parallel": {"zero": 3}}])
@pytest.mark.parametrize(
    "settings",
    [
        {"model": BERT, "objective": {"kind": "next_sentence"}},
        {"model": {**DECODER, "experts": EXPERTS, "predict_ahead": 1}},
    ],
    ids=["bert", "experts"],
)
def test_what_is_learned_does_not_depend_on_how(train, settings, how):
    settings = {**settings, "steps": 4, "optimizer": {"kind": "adamw", "lr": 1e-3}}
    one, other = train(**settings), train(**settings, how=how)
    for row, same in zip(rows_of(one), rows_of(other), strict=True):
        for name in row:
            if name.startswith(("loss", "validation", "router")):
                assert same[name] == pytest.approx(row[name], rel=1e-4, abs=1e-6), name


def test_two_ranks_learn_what_one_learns(tokens, tmp_path):
    def losses(ranks):
        settings = {
            "tokens": tokens.path,
            "objective": "{kind:next_sentence}",
            "seq_len": 32,
            "batch_tokens": 256,
            "steps": 4,
            "validation_sequences": 5,
        }
        shape = "{kind:encoder,d_model:32,num_layers:1,num_heads:2,max_seq_len:64,token_types:2,pooler:true}"
        words = [f"stage.{key}={value}" for key, value in settings.items()]
        run_pipeline(
            "stage=pretrain", f"stage.model={shape}", *words, f"run.ranks={ranks}",
            f"root={tmp_path / str(ranks)}",
        )  # fmt: skip
        return rows_of(open_artifact(next((tmp_path / str(ranks) / "model").iterdir())))

    for row, same in zip(losses(1), losses(2), strict=True):
        for name in row:
            if "loss" in name:
                assert same[name] == pytest.approx(row[name], rel=1e-4), name


def test_training_goes_on_where_a_saved_model_is(train, tokens):
    begun = train(model=DECODER, steps=12)
    settings = {"init_from": "@begun", "steps": 2, "batch_tokens": 512, "optimizer": {"kind": "adamw", "lr": 1e-9}}
    model = train({"init_from": begun}, **settings, validate_every_steps=1)
    assert load_model(model.path).config == load_model(begun.path).config
    assert rows_of(model)[0]["loss"] < rows_of(begun)[0]["loss"] - 0.5
    assert model.stats["validation_loss"] == pytest.approx(begun.stats["validation_loss"], rel=1e-4)
    assert model.file("tokenizer.json").read_bytes() == begun.file("tokenizer.json").read_bytes()
    wider = train({"init_from": begun}, **settings, model={**DECODER, "vocab_multiple": 128, "predict_ahead": 1})
    assert wider.stats["validation_loss.next_token"] == pytest.approx(begun.stats["validation_loss"], rel=1e-4)


def test_a_model_of_other_sizes_does_not_take_weights(train):
    begun = train(model=DECODER, steps=1)
    with pytest.raises(
        ConfigError, match=r"pretrain.model: the weights of init_from do not fit .'decoder.blocks.0.attention.key"
    ):
        train({"init_from": begun}, init_from="@begun", model={**DECODER, "d_model": 64})


def test_a_student_learns_from_its_teacher(train):
    teacher = train(model=DECODER, steps=12)
    objective = {"kind": "distillation", "teacher": "@teacher", "temperature": 2.0, "weight": 0.25}
    narrow = {**DECODER, "d_model": 16, "d_ff": 32}
    student = train({"objective.teacher": teacher}, model=narrow, objective=objective, steps=12)
    first, *_, last = rows_of(student)
    total = 0.75 * first["loss.next_token"] + 0.25 * first["loss.distill"]
    assert first["loss"] == pytest.approx(total, rel=ROUNDING)
    assert last["loss.distill"] < first["loss.distill"] - 0.2
    assert "validation_bits_per_byte" in last
    assert weights_of(student).keys() == weights_of(teacher).keys()  # nothing of the teacher is in it


def test_a_perfect_student_has_nothing_to_learn(train):
    teacher = train(model=DECODER, steps=6)
    objective = {"kind": "distillation", "teacher": "@teacher", "weight": 1.0}
    student = train(
        {"objective.teacher": teacher, "init_from": teacher}, init_from="@teacher", objective=objective, steps=1
    )
    assert rows_of(student)[0]["loss.distill"] == pytest.approx(0, abs=1e-4)


def test_a_token_that_the_tokenizer_lacks_is_named(train):
    with pytest.raises(ConfigError, match=r"pretrain.objective: the tokenizer has no token '<mask>'"):
        train(model=BERT, objective={"kind": "masked", "mask_token": "<mask>"})


def test_a_warm_up_is_told(train, capsys):
    warmup = [{"tokens": 500, "seq_len": 8}, {"tokens": 1000, "seq_len": 16}]
    model = train(model=DECODER, seq_len_warmup=warmup)
    assert "sequence length: 8 tokens in steps 1 to 2, 16 tokens in steps 3 to 4, 32 tokens from step 5 on" in (
        capsys.readouterr().out
    )
    assert len(rows_of(model)) == 6
