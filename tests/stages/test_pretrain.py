"""Pretraining refuses what cannot work, before it begins."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline.artifact import open_artifact
from pipeline.errors import ArtifactError, ConfigError
from pipeline.launch.local import Local
from pipeline.settings import decode, encode
from pipeline.stages.pretrain import Pretrain
from pipeline.stages.tokenize import Tokenize

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
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["files"]["tokenizer.json"]["xxh128"] = "0" * 32
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
