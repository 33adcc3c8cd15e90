"""Pretraining refuses what cannot work, before it begins."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline.artifact import open_artifact, record_file
from pipeline.errors import ArtifactError, ConfigError
from pipeline.launch.local import Local
from pipeline.settings import decode, encode
from pipeline.stages.pretrain import Pretrain
from pipeline.stages.tokenize import Tokenize
from pipeline.stages.train_tokenizer import TrainTokenizer

BOTH = {"web": "@web", "code": "@code"}


def pretrain(**changes) -> Pretrain:
    return decode(Pretrain, {"kind": "pretrain", "tokens": "@tokens", "steps": 10, **changes}, where="stage")


def problems(**changes) -> list[tuple[str, str]]:
    return list(pretrain(**changes).check({}, Local()))


def refusal(**changes) -> str:
    with pytest.raises(ConfigError) as error:
        pretrain(**changes)
    return "\n".join(error.value.problems)


def test_one_artifact_needs_no_name_and_several_have_names():
    assert pretrain().sources == {"tokens": "tokens"}
    assert pretrain(tokens=BOTH).sources == {"web": "tokens.web", "code": "tokens.code"}
    assert not problems(tokens=BOTH, mixture={"kind": "weights", "weights": {"web": 0.7, "code": 0.3}})


def test_a_mixture_of_other_sources_is_refused():
    found = problems(tokens=BOTH, mixture={"kind": "weights", "weights": {"web": 0.7, "cod": 0.3}})
    assert found == [
        ("mixture.weights.cod", "no tokens are called 'cod'; did you mean 'code'?"),
        ("mixture.weights", "says nothing of 'code'; add it, with 0 to leave it out"),
    ]


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"kind": "weights", "weights": {"tokens": -1}}, "stage.mixture.weights.tokens"),
        ({"kind": "weights", "weights": {"tokens": 0}}, "found none among tokens"),
        ({"kind": "weights", "weights": {}}, "stage.mixture.weights"),
        ({"kind": "temperature", "temperature": 0}, "stage.mixture.temperature"),
        ({"kind": "wieghts"}, "did you mean 'weights'"),
        ({"kind": "phases", "phases": []}, "stage.mixture.phases"),
    ],
)
def test_a_mixture_that_is_none_is_refused(mixture, message):
    assert message in refusal(mixture=mixture)


def test_all_settings_survive_being_frozen():
    both = {"kind": "weights", "weights": {"web": 1, "code": 2.5}}
    for mixture in (
        both,
        {"kind": "epochs", "epochs": {"web": 1, "code": 2.5}},
        {"kind": "temperature", "temperature": 2},
        {"kind": "phases", "phases": [{"tokens": 1000, "mixture": {"kind": "temperature"}}, {"mixture": both}]},
    ):
        stage = pretrain(tokens=BOTH, mixture=mixture, packing={"kind": "best_fit"})
        assert decode(Pretrain, encode(stage)) == stage


def test_a_warm_up_that_does_not_divide_or_is_out_of_order_is_refused():
    found = problems(seq_len_warmup=[{"tokens": 1000, "seq_len": 100}, {"tokens": 500, "seq_len": 64}])
    assert found == [
        ("seq_len_warmup.0.seq_len", "rows of 256 tokens do not divide into sequences of 100"),
        ("seq_len_warmup.1.tokens", "wanted more than the 1,000 before it, found 500"),
    ]


@pytest.fixture
def tokens(tiny_tokens, tmp_path) -> Path:
    """A copy of the tokens of the tiny job that may be spoiled."""
    return Path(shutil.copytree(tiny_tokens, tmp_path / "tokens"))


def rewrite(path: Path, **stats) -> None:
    """Change numbers in a manifest."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["stats"] |= stats
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_more_steps_than_the_mixture_holds_are_refused(tokens):
    pretrain(seq_len=32, batch_tokens=512, steps=4 * 98_000 // 512).open_loader({"tokens": open_artifact(tokens)})
    with pytest.raises(
        ConfigError, match=r"^max_epochs: 1,000 steps go 5.19 times through 'tokens' .98,560.*use at most 770 steps"
    ):
        pretrain(seq_len=32, batch_tokens=512, steps=1000).open_loader({"tokens": open_artifact(tokens)})
    pretrain(seq_len=32, batch_tokens=512, steps=1000, max_epochs=None).open_loader({"tokens": open_artifact(tokens)})


def test_epochs_are_what_a_source_holds(tokens):
    both = {name: open_artifact(tokens) for name in BOTH}
    asked = {"kind": "epochs", "epochs": {"web": 6, "code": 1.5}}
    most = int(7.5 * 3080 / 16)
    pretrain(tokens=BOTH, mixture=asked, seq_len=32, batch_tokens=512, steps=most).open_loader(both)
    with pytest.raises(ConfigError, match="mixture.epochs: 1,500 steps go .* times through 'web'") as error:
        pretrain(tokens=BOTH, mixture=asked, seq_len=32, batch_tokens=512, steps=1500).open_loader(both)
    assert len(error.value.problems) == 2


def test_a_source_smaller_than_a_sequence_is_refused(tokens):
    with pytest.raises(ArtifactError, match="tokens 'tokens': has 98,584 tokens, fewer than one sequence of 131072"):
        pretrain(seq_len=131072, batch_tokens=131072).open_loader({"tokens": open_artifact(tokens)})


def test_a_changed_part_is_refused_by_name(tokens):
    part = tokens / open_artifact(tokens).parts()[0]
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    with pytest.raises(ArtifactError, match=f"{part}: damaged"):
        pretrain().open_loader({"tokens": open_artifact(tokens)})


def test_ids_outside_the_vocabulary_are_refused(tokens):
    rewrite(tokens, max_token_id=512)
    with pytest.raises(ArtifactError, match="has the id 512, but its vocabulary has 512; tokenize again"):
        pretrain().open_loader({"tokens": open_artifact(tokens)})


def test_sources_of_different_tokenizers_are_refused(tokens, tmp_path):
    other = Path(shutil.copytree(tokens, tmp_path / "other"))
    data = json.loads((other / "tokenizer.json").read_text())
    data["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(data))
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["files"]["tokenizer.json"] = encode(record_file(other / "tokenizer.json"))
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=f"{other}: its tokenizer .* is not the one of {tokens}"):
        pretrain(tokens=BOTH).open_loader({"web": open_artifact(tokens), "code": open_artifact(other)})


def test_a_part_of_another_length_than_the_manifest_says_is_refused(tokens):
    names = open_artifact(tokens).parts()
    rewrite(tokens, part_tokens=dict.fromkeys([*names, *open_artifact(tokens).parts("held-")], 40000))
    loader = pretrain(seq_len=32, batch_tokens=512).open_loader({"tokens": open_artifact(tokens)})
    with pytest.raises(ArtifactError, match="the manifest says 40000 tokens, found"):
        loader.read(1)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"held_out.bytes": "x"}, "held_out.bytes"),
        ({"end_of_text_id": 512}, "end_of_text_id, vocab_size"),
        ({"vocab_size": 2**40}, "end_of_text_id, vocab_size"),
        ({"part_tokens": None}, "part_tokens.part-00000-00000.arrow, "),
    ],
)
def test_a_manifest_with_numbers_that_cannot_be_is_refused(tokens, changes, named):
    rewrite(tokens, **changes)
    with pytest.raises(ArtifactError, match=f"its manifest has no sensible {named}"):
        pretrain().open_loader({"tokens": open_artifact(tokens)})


def test_no_tokens_at_all_are_refused():
    assert "stage.tokens" in refusal(tokens={})


def test_tokens_of_which_nothing_is_held_out_are_refused():
    maker = decode(Tokenize, {"kind": "tokenize", "corpus": "@c", "tokenizer": "@t", "held_out_fraction": 0}, where="")
    found = list(pretrain().check({"tokens": maker}, Local()))
    assert found == [("tokens", "nothing is held out to validate on; give tokenize a held_out_fraction above 0")]


BERT = {"kind": "encoder", "token_types": 2, "pooler": True}
SPANS = {"kind": "span_corruption"}


def maker(**settings) -> Pretrain:
    return pretrain(**{"tokens": "@t", **settings})


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (
            {"objective": {"kind": "masked"}},
            ("objective.kind", "'masked' trains a model of kind 'encoder', found 'dec"),
        ),
        ({"model": BERT}, ("objective.kind", "'causal' trains a model of kind 'decoder', found 'encoder'")),
        (
            {"model": {"kind": "encoder"}, "objective": {"kind": "next_sentence"}},
            ("model.token_types", "'next_sentence' tells two segments apart; wanted 2, found 0"),
        ),
        ({"model": {"kind": "decoder", "max_seq_len": 128}}, ("seq_len", "256 is longer than the model's max_seq_len")),
        (
            {"model": {"kind": "encoder_decoder"}, "objective": {**SPANS, "num_sentinels": 9}},
            ("objective.num_sentinels", "a row of 256 inputs has 14 spans, found 9"),
        ),
        (
            {"model": {"kind": "encoder_decoder"}, "objective": SPANS, "seq_len_warmup": [{"tokens": 9, "seq_len": 8}]},
            ("seq_len_warmup", "'span_corruption' makes 256 positions of 284 tokens"),
        ),
        (
            {"average": {"kind": "ema"}, "optimizer": {"kind": "schedule_free_adamw"}},
            ("average", "'schedule_free_adamw' keeps an average itself"),
        ),
    ],
)
def test_what_does_not_fit_together_is_refused_before_it_runs(changes, found):
    name, problem = problems(**changes)[0]
    assert name == found[0]
    assert problem.startswith(found[1])


def test_what_is_read_of_other_models_is_checked_before_it_runs():
    stage = pretrain(init_from="@m", objective={"kind": "masked"})
    assert list(stage.check({}, Local())) == []  # nobody knows yet
    assert [name for name, _ in stage.check({"init_from": maker(model={"kind": "decoder"})}, Local())] == [
        "objective.kind"
    ]
    assert list(stage.check({"init_from": maker(model=BERT)}, Local())) == []
    wide = pretrain(init_from="@m", model={"kind": "decoder", "d_model": 512, "dropout": 0.1})
    ((name, problem),) = wide.check({"init_from": maker(model={"kind": "decoder"})}, Local())
    assert name == "model"
    assert problem.startswith("the weights of init_from do not fit ('decoder.blocks.0.attention.key.weight': wanted sh")
    heads = pretrain(init_from="@m", model={"kind": "decoder", "predict_ahead": 2, "vocab_multiple": 128})
    assert list(heads.check({"init_from": maker(model={"kind": "decoder"})}, Local())) == []
    teacher = pretrain(objective={"kind": "distillation", "teacher": "@m"})
    short = maker(model={"kind": "decoder", "max_seq_len": 64})
    assert list(teacher.check({"objective.teacher": short}, Local())) == [
        ("objective.teacher", "reads 64 positions, fewer than seq_len (256)")
    ]
    other = list(teacher.check({"objective.teacher": maker(model=BERT)}, Local()))
    assert other == [("objective.teacher", "wanted a model of kind 'decoder', found one of kind 'encoder'")]


def test_a_special_token_that_the_tokenizer_will_lack_is_refused():
    stage = pretrain(model={"kind": "encoder_decoder"}, objective=SPANS)
    for tokens, lacking in (
        (["<|endoftext|>", "<extra_id_{0..99}>"], []),
        (["<|endoftext|>", "<extra_id_{0..98}>"], ["'<extra_id_99>', which the tokenizer of tokens will not have"]),
        (["<|endoftext|>"], ["'<extra_id_0>' and 99 more, which the tokenizer of tokens will not have"]),
    ):
        trainer = decode(TrainTokenizer, {"corpus": "@c", "special_tokens": tokens})
        found = list(stage.check({"tokens/tokenizer": trainer}, Local()))
        assert [problem.split("token ")[1].split(";")[0] for _, problem in found] == lacking


def test_the_disk_that_is_needed_grows_with_what_is_kept():
    run = Local()
    plain = pretrain(model={"kind": "decoder"}).disk_bytes(0, run)
    assert pretrain(optimizer={"kind": "lion"}).disk_bytes(0, run) < plain
    assert pretrain(average={"kind": "ema"}).disk_bytes(0, run) > plain
    assert pretrain(init_from="@m").disk_bytes(0, run) == 0


def test_rows_are_as_long_as_the_objective_needs(tokens):
    stage = pretrain(model={"kind": "encoder_decoder"}, objective=SPANS, seq_len=32, batch_tokens=512)
    loader = stage.open_loader({"tokens": open_artifact(tokens)})
    assert loader.order.seq_len == stage.objective.row_tokens(32) > 32
    assert loader.read(1).labels.shape == (16, loader.order.seq_len)
