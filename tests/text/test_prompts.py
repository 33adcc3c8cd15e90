import pytest

from pipeline.errors import ConfigError
from pipeline.text.prompts import encode_prompt, special_id
from pipeline.text.tokenizers import BYTE_CHARACTERS, byte_level, word_piece

SPACE = BYTE_CHARACTERS[0x20]
VOCAB = {text: byte for byte, text in BYTE_CHARACTERS.items()} | {f"{SPACE}a": 256}
MASK, END = 257, 258


def make(merges=((SPACE, "a"),)):
    tokenizer = byte_level(VOCAB, list(merges))
    tokenizer.extend(["[MASK]", "<|endoftext|>"], [])
    return tokenizer


def test_special_tokens_are_text_unless_they_are_named():
    tokenizer, text = make(), "x<|endoftext|>[MASK]"
    assert tokenizer.decode(encode_prompt(tokenizer, text)) == text
    assert not {MASK, END} & set(encode_prompt(tokenizer, text))
    assert encode_prompt(tokenizer, text, tokenizer.special_tokens) == [ord("x"), END, MASK]
    assert encode_prompt(tokenizer, text, ["[MASK]"])[-1] == MASK
    assert END not in encode_prompt(tokenizer, text, ["[MASK]"])


def test_a_mask_takes_the_space_before_it_where_words_carry_theirs():
    assert encode_prompt(make(), "b [MASK] a", ["[MASK]"], "[MASK]") == [ord("b"), MASK, 256]
    by_byte = make(merges=())
    assert encode_prompt(by_byte, "b [MASK]", ["[MASK]"], "[MASK]") == [ord("b"), ord(" "), MASK]
    words = word_piece({"[UNK]": 0, "a": 1, "b": 2, "[MASK]": 3}, "[UNK]", lowercase=True)
    words.extend(["[MASK]"], [])
    assert encode_prompt(words, "b [MASK] a", ["[MASK]"], "[MASK]") == [2, 3, 1]


def test_a_token_that_is_not_special_is_refused():
    assert special_id(make(), "[MASK]") == MASK
    with pytest.raises(ConfigError, match=r"'\[MASQ\]' is no special token of the model's tokenizer; did you mean"):
        special_id(make(), "[MASQ]")
