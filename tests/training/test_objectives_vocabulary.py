"""What objectives learn from a tokenizer: special ids, and which tokens go on with a word."""

import json

import numpy as np
import pytest

from pipeline.errors import ArtifactError
from pipeline.text.tokenizers import BYTE_CHARACTERS, byte_level, from_json, word_piece
from pipeline.training.objectives.vocabulary import special_ids


def byte_tokenizer(*merged, special=("<|endoftext|>", "[MASK]")):
    vocab = {token: number for number, token in enumerate([*BYTE_CHARACTERS.values(), *merged])}
    tokenizer = byte_level(vocab, [])
    tokenizer.extend(list(special), ["<think>"])
    return tokenizer


def from_parts(model, **parts):
    names = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding")
    return from_json(
        json.dumps({"version": "1.0", "added_tokens": [], **dict.fromkeys(names), **parts, "model": model})
    )


def words_of(tokenizer, ids, tokens):
    """Whether each of some tokens goes on with a word, and whether it ends one."""
    numbers = [tokenizer.token_id(token) for token in tokens]
    return ids.continues[numbers].tolist(), ids.breaks[numbers].tolist()


def test_byte_level_words_begin_at_spaces():
    tokenizer = byte_tokenizer("Ġthe", "the", "ĠĠ")
    end = tokenizer.token_id("<|endoftext|>")
    ids = special_ids(tokenizer, ["[MASK]"], end)
    assert dict(ids) == {"[MASK]": end + 1}
    assert (ids.end_of_text, ids.vocab_size) == (end, tokenizer.vocab_size)
    assert np.flatnonzero(ids.special).tolist() == [end, end + 1]
    assert ids.ordinary.tolist() == [*range(end), end + 2]  # the added token is text
    continues, breaks = words_of(tokenizer, ids, ["Ġthe", "the", "Ċ", "ĠĠ", ","])
    assert continues == [False, True, False, False, True]
    assert breaks == [False, False, True, True, False]


def test_word_pieces_are_marked():
    vocab = {"[UNK]": 0, "play": 1, "##ing": 2, "#": 3, "[SEP]": 4, "[MASK]": 5}
    tokenizer = word_piece(vocab, "[UNK]", lowercase=True)
    tokenizer.extend(["[UNK]", "[SEP]", "[MASK]"], [])
    ids = special_ids(tokenizer, ["[MASK]", "[SEP]"], 4)
    assert (ids["[MASK]"], ids["[SEP]"]) == (5, 4)
    assert np.flatnonzero(ids.special).tolist() == [0, 4, 5]
    assert words_of(tokenizer, ids, ["play", "##ing", "#"]) == ([False, True, False], [False, False, False])


@pytest.mark.parametrize(
    "model",
    [
        {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["▁play", -1.0], ["ing", -2.0], ["▁", -3.0]]},
        {"type": "BPE", "vocab": {"<unk>": 0, "▁play": 1, "ing": 2, "▁": 3}, "merges": [], "unk_token": "<unk>"},
    ],
)
def test_vocabularies_of_characters_show_their_spaces(model):
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    tokenizer = from_parts(model, pre_tokenizer=space, decoder=space)
    tokenizer.extend(["<unk>"], [])
    ids = special_ids(tokenizer, [], 0)
    assert words_of(tokenizer, ids, ["▁play", "ing", "▁"]) == ([False, True, False], [False, False, True])


def test_ends_of_words_may_be_marked_instead():
    tokenizer = from_parts(
        {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": {"play": 0, "ing</w>": 1, ".": 2}, "merges": []}
    )
    ids = special_ids(tokenizer, [], 2)
    assert words_of(tokenizer, ids, ["play", "ing</w>"]) == ([True, True], [False, True])


def test_ids_without_a_token_are_special():
    tokenizer = from_parts({"type": "BPE", "vocab": {"a": 0, "b": 4}, "merges": []})
    ids = special_ids(tokenizer, [], 0)
    assert ids.vocab_size == 5
    assert ids.ordinary.tolist() == [4]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("[CLS]", r"objective: the tokenizer has no token '\[CLS\]'.*special_tokens of train_tokenizer or"),
        ("[MASQ]", r"has no token '\[MASQ\]'; did you mean '\[MASK\]'\?"),
        ("<think>", "has '<think>' as an ordinary token, which texts may hold; .*"),
    ],
)
def test_a_tokenizer_that_lacks_a_token_is_refused(name, message):
    with pytest.raises(ArtifactError, match=message):
        special_ids(byte_tokenizer(), ["[MASK]", name], 256)
