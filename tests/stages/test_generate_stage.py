"""The stage that generates: what it refuses beforehand, what it writes, and what a terminal shows meanwhile."""

import json
from types import SimpleNamespace

import pytest

from pipeline.artifact import Made, Manifest, open_artifact, record_file, write_manifest
from pipeline.errors import ConfigError
from pipeline.launch.local import Local
from pipeline.models.config import Decoder, Encoder, EncoderDecoder
from pipeline.models.initial import init_weights
from pipeline.models.saved import save_model
from pipeline.models.transformer import Transformer
from pipeline.settings import decode
from pipeline.stages.finetune import Finetune
from pipeline.stages.generate import Generate, _begins_with
from pipeline.stages.pretrain import Pretrain
from pipeline.stages.streaming import Stream
from pipeline.text.tokenizers import BYTE_CHARACTERS, NUM_BYTES, byte_level

MADE = Made(version="0", commit=None, python="3", host="here", time="2025-07-03T14:02:11Z", seconds=1.5, ranks=1)
END = NUM_BYTES
SPECIAL = ["<|endoftext|>", "[MASK]", "[CLS]"]  # from END on
SHAPE = {
    "vocab_size": NUM_BYTES + 3,
    "d_model": 16,
    "num_layers": 1,
    "num_heads": 2,
    "max_seq_len": 48,
    "init_std": 0.3,
}
FAMILIES = {"decoder": Decoder, "encoder": Encoder, "encoder_decoder": EncoderDecoder}


@pytest.fixture
def make(tmp_path):
    """Give a function that makes a model artifact with random weights, whose tokens are bytes."""

    def make_model(family, **stage):
        directory = tmp_path / family
        directory.mkdir()
        model = Transformer(FAMILIES[family](**SHAPE))
        init_weights(model, 0)
        tokenizer = byte_level({text: byte for byte, text in BYTE_CHARACTERS.items()}, [], split=False)
        tokenizer.extend(SPECIAL, [])
        tokenizer.save(directory / "tokenizer.json")
        names = [*save_model(directory, model), "tokenizer.json"]
        files = {name: record_file(directory / name) for name in names}
        stats = {"end_of_text_id": END, "vocab_size": SHAPE["vocab_size"]}
        manifest = Manifest(
            kind="model",
            name=family,
            fingerprint=family,
            stage={"kind": "pretrain", **stage},
            inputs={},
            files=files,
            stats=stats,
            made=MADE,
        )
        write_manifest(directory, manifest)
        return open_artifact(directory)

    return make_model


@pytest.fixture
def rows_of(make, run_stage, tmp_path):
    """Give a function that generates with a model of a family and returns the rows and the artifact."""

    def rows(family, stage=None, **settings):
        artifact = run_stage(generate(**settings), {"model": make(family, **(stage or {}))}, tmp_path / "samples")
        text = artifact.file("samples.jsonl").read_text("utf-8")
        return [json.loads(line) for line in text.removesuffix("\n").split("\n")], artifact

    return rows


def generate(**settings) -> Generate:
    return decode(Generate, {"kind": "generate", "model": "@pretrain", "prompt": "x", **settings}, where="stage")


def problems(model=None, objective=None, **settings) -> list[tuple[str, str]]:
    made_by = {"kind": "pretrain", "tokens": "@tokens", "steps": 1}
    made_by |= {} if model is None else {"model": {"kind": model}}
    made_by |= {} if objective is None else {"objective": objective}
    return list(generate(**settings).check({"model": decode(Pretrain, made_by)}, Local()))


FILL = {"kind": "fill_mask"}


def test_what_a_family_cannot_do_is_refused_beforehand():
    assert not problems("decoder")
    assert not problems("encoder_decoder", decoding={"kind": "beam"})
    assert not problems("encoder", decoding=FILL, prompt="a [MASK]")
    assert [setting for setting, _ in problems("encoder")] == ["decoding.kind"]
    assert [setting for setting, _ in problems("decoder", decoding=FILL, prompt="[MASK]")] == ["decoding.kind"]


def test_a_model_that_is_not_known_yet_is_refused_later(rows_of):
    assert not problems(decoding={"kind": "greedy"})
    with pytest.raises(ConfigError, match="^generate.decoding.kind: 'greedy' continues texts"):
        rows_of("encoder", decoding={"kind": "greedy"})


def test_all_that_cannot_be_filled_is_told_at_once():
    found = problems("encoder", decoding=FILL, prompt=["a [MASK]", "b"], stop="x")
    assert found == [
        ("prompt.1", "there is no [MASK] to fill"),
        ("stop", "all masks are filled at once, so nothing can be stopped; leave it empty"),
    ]
    objective = {"kind": "masked", "mask_token": "<mask>"}
    assert problems("encoder", objective, decoding=FILL, prompt="a [MASK]") == [
        ("decoding.mask_token", "the model is trained with '<mask>', found '[MASK]'")
    ]


def test_classifiers_are_refused():
    tuned = decode(Finetune, {"kind": "finetune", "model": "@pretrain", "data": "x"})
    assert [setting for setting, _ in generate().check({"model": tuned}, Local())] == ["model"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decoding": {"kind": "beams"}}, "stage.decoding.kind: no decoding is called 'beams'; did you mean 'beam'?"),
        ({"decoding": {"beams": 3}}, "stage.decoding.beams: no such setting of kind 'sample', the default; there is"),
        ({"stop": ["a", ""]}, "stage.stop.1: string should have at least 1 character"),
        ({"prompt": []}, "stage.prompt"),
    ],
)
def test_settings_that_are_none_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        generate(**settings)


@pytest.mark.parametrize("kind", ["greedy", "sample", "beam"])
@pytest.mark.parametrize("family", ["decoder", "encoder_decoder"])
def test_every_prompt_becomes_a_row(rows_of, family, kind):
    prompts = ["The ", "A longer prompt é"]
    rows, artifact = rows_of(family, prompt=prompts, max_new_tokens=6, decoding={"kind": kind})
    assert [row["prompt"] for row in rows] == prompts
    assert artifact.stats["new_tokens"] == sum(row["new_tokens"] for row in rows) > 0
    assert Generate.headline(artifact.stats) == ("2 prompts", f"{artifact.stats['new_tokens']} new tokens")
    shown = list(Generate.show(artifact))
    joint = "\n=> " if family == "encoder_decoder" else ""
    assert shown[0].startswith("The " + joint)
    assert all(c.isprintable() or c in "\n\t" for line in shown for c in line)


def test_a_stop_string_cuts_every_row(rows_of, make, run_stage, tmp_path):
    rows, artifact = rows_of("decoder", prompt=["a", "b"], max_new_tokens=30, decoding={"kind": "greedy"})
    stop = rows[0]["continuation"][3:5]
    stage = generate(prompt=["a", "b"], max_new_tokens=30, decoding={"kind": "greedy"}, stop=stop)
    model = open_artifact(artifact.path.parent / "decoder")
    cut = run_stage(stage, {"model": model}, tmp_path / "cut").file("samples.jsonl").read_text("utf-8")
    for before, line in zip(rows, cut.splitlines(), strict=True):
        assert json.loads(line)["continuation"] == before["continuation"].partition(stop)[0]


def test_masks_are_filled_with_candidates(rows_of):
    rows, artifact = rows_of(
        "encoder",
        {"objective": {"kind": "masked", "first_token": "[CLS]"}},
        prompt=["a [MASK]b[MASK]", "[MASK]"],
        decoding={"kind": "fill_mask", "candidates": 3},
    )
    assert [len(row["masks"]) for row in rows] == [2, 1]
    assert artifact.stats["masks"] == 3
    assert Generate.headline(artifact.stats) == ("2 prompts", "3 masks filled")
    for row in rows:
        for candidates in row["masks"]:
            shares = [c["probability"] for c in candidates]
            assert len(shares) == 3
            assert shares == sorted(shares, reverse=True)
    first = [candidates[0]["token"] for candidates in rows[0]["masks"]]
    if all(token.isascii() for token in first):
        assert rows[0]["filled"] == f"a {first[0]}b{first[1]}"
    assert "mask 2: " in next(iter(Generate.show(artifact)))


def test_a_mask_must_be_a_special_token(rows_of):
    message = r"^generate.decoding.mask_token: '\[MASC\]' is no special token of the model's tokenizer; did you mean"
    with pytest.raises(ConfigError, match=message):
        rows_of("encoder", prompt="[MASC]", decoding={"kind": "fill_mask", "mask_token": "[MASC]"})


def test_prompts_that_are_too_long_are_refused_together(rows_of):
    with pytest.raises(ConfigError) as error:
        rows_of("decoder", prompt=["x" * 47, "x" * 46, "x" * 99])
    assert error.value.problems == (
        "generate.prompt.0: 48 ids leave no room in the model's 48 positions; shorten it",
        "generate.prompt.2: 100 ids leave no room in the model's 48 positions; shorten it",
    )


def test_a_terminal_shows_texts_while_they_are_made(rows_of, monkeypatch, capsys):
    monkeypatch.setenv("PIPELINE_TERMINAL_WIDTH", "80")
    rows, artifact = rows_of("decoder", prompt=["a\x1b[2J", "b"], max_new_tokens=5)
    told = "".join(f"{text}\n\n" for text in list(Generate.show(artifact))[::2])
    assert capsys.readouterr().out == told
    assert "\x1b" not in told
    assert [row["prompt"] for row in rows] == ["a\x1b[2J", "b"]


def test_elsewhere_a_line_says_how_far_it_is(rows_of, monkeypatch, capsys):
    monkeypatch.setenv("PIPELINE_TERMINAL_WIDTH", "")
    monkeypatch.setattr("pipeline.progress.LINE_S", 0.0)
    rows_of("decoder", prompt=["a", "b"], max_new_tokens=2)
    assert capsys.readouterr().out.startswith("generate  2/2 prompts  100 %")


class Growing:
    """A text whose certain part a test sets."""

    certain, closed = "", False


def test_the_first_text_that_is_not_finished_grows_and_others_wait():
    pieces, texts = [], [Growing(), Growing(), Growing()]
    stream = Stream(["1:", "2:", "3:"], texts, pieces.append)
    stream()
    texts[0].certain, texts[1].certain, texts[1].closed = "a", "bb", True
    stream()
    texts[0].certain = "aa"
    stream()
    stream()
    texts[0].closed = True
    stream()
    texts[2].closed = True
    stream()
    assert pieces == ["1:", "a", "a", "\n\n", "2:", "bb", "\n\n", "3:", "\n\n"]


@pytest.mark.parametrize(("answers", "first"), [(False, 5), (True, 0)])
def test_a_model_of_others_begins_with_what_its_settings_say(tmp_path, make, answers, first):
    config = EncoderDecoder(decoder_start_id=0) if answers else Decoder()
    assert _begins_with(make("decoder"), type(config)()) == END
    theirs = {"architectures": ["X"], "model_type": "x", "bos_token_id": 5, "decoder_start_token_id": 0}
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    (tmp_path / "model.safetensors").write_bytes(b"")
    source = SimpleNamespace(path=tmp_path, stats={"end_of_text_id": END}, file=lambda name: tmp_path / name)
    assert _begins_with(source, config) == first
    (tmp_path / "config.json").write_text(json.dumps(theirs | {"bos_token_id": None, "decoder_start_token_id": None}))
    assert _begins_with(source, type(config)()) == END
