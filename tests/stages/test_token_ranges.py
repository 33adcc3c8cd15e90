"""Ranges of special tokens: a hundred sentinels in one word of YAML."""

import pytest

from pipeline.errors import ConfigError
from pipeline.settings import decode, encode, fingerprint
from pipeline.stages.import_tokenizer import ImportTokenizer
from pipeline.stages.train_tokenizer import TrainTokenizer, expand_ranges


@pytest.mark.parametrize(
    ("short", "long"),
    [
        (["<x{0..2}>"], ["<x0>", "<x1>", "<x2>"]),
        (["<x{2..0}>"], ["<x2>", "<x1>", "<x0>"]),
        (["<x{7..7}>", "a"], ["<x7>", "a"]),
        (["{1..2}"], ["1", "2"]),
        (["<{x..y}>", "{1..}", "<1..2>", "{1.2}"], ["<{x..y}>", "{1..}", "<1..2>", "{1.2}"]),
    ],
)
def test_a_range_is_written_out(short, long):
    assert expand_ranges(short) == long


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        (TrainTokenizer, {"kind": "train_tokenizer", "corpus": "@clean"}),
        (ImportTokenizer, {"kind": "import_tokenizer", "vocabulary": {"kind": "bytes"}}),
    ],
)
def test_both_spellings_are_the_same_settings(stage, settings):
    sentinels = [f"<extra_id_{number}>" for number in range(100)]
    short, long = (
        decode(stage, {**settings, "special_tokens": ["<|endoftext|>", *tokens]})
        for tokens in (["<extra_id_{0..99}>"], sentinels)
    )
    assert short.special_tokens == ["<|endoftext|>", *sentinels]
    assert fingerprint(encode(short)) == fingerprint(encode(long))
    assert decode(stage, encode(short)) == short
    with pytest.raises(ConfigError, match="special_tokens: wanted different tokens, .* found '<extra_id_7>' twice"):
        decode(stage, {**settings, "special_tokens": ["<|endoftext|>", "<extra_id_{0..9}>", "<extra_id_7>"]})


def test_ordinary_tokens_have_no_ranges():
    stage = decode(
        ImportTokenizer, {"kind": "import_tokenizer", "vocabulary": {"kind": "bytes"}, "added_tokens": ["{1..2}"]}
    )
    assert stage.added_tokens == ["{1..2}"]
