import json
import random
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import ArtifactError
from pipeline.text.tokenizers import END_OF_TEXT, Tokenizer, load, train

MINI = Path(__file__).parents[1] / "data" / "mini.jsonl"
TEXTS = [json.loads(line)["text"] for line in MINI.read_text().splitlines()]
SPECIAL = [END_OF_TEXT, "<|pad|>"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(iter(TEXTS), 1000, SPECIAL, 2)


def random_text(noise: random.Random) -> str:
    blocks = [(0, 0x80), (0x80, 0x300), (0x300, 0x370), (0x590, 0x700), (0x2000, 0x2070), (0x3000, 0xA000)]
    blocks += [(0xE000, 0x10000), (0x1F300, 0x1FB00), (0x10000, 0x110000)]
    low, high = noise.choice(blocks)
    return "".join(chr(noise.randrange(low, high)) for _ in range(noise.randrange(1, 20)))


def test_the_vocabulary_has_what_was_asked_for(tokenizer):
    assert tokenizer.vocab_size == 1000
    assert tokenizer.special_tokens == {END_OF_TEXT: 0, "<|pad|>": 1}
    assert (tokenizer.token_id(END_OF_TEXT), tokenizer.token_id("<|none|>")) == (0, None)


def test_training_twice_gives_equal_files_whatever_the_order(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "a.json")
    train(reversed(TEXTS), 1000, SPECIAL, 2).save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_saving_and_loading_changes_nothing(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "a.json")
    again = load(tmp_path / "a.json")
    assert again.fingerprint == tokenizer.fingerprint
    assert again.special_tokens == tokenizer.special_tokens
    assert all(again.encode(text) == tokenizer.encode(text) for text in TEXTS)


def test_other_texts_give_another_fingerprint(tokenizer):
    assert train(TEXTS[:5], 1000, SPECIAL, 2).fingerprint != tokenizer.fingerprint


def test_decoding_gives_back_any_text(tokenizer):
    noise = random.Random(0)
    texts = ["".join(random_text(noise) for _ in range(noise.randrange(0, 6))) for _ in range(1500)]
    texts += ["", " ", "\r\n\t \x00\x7f", "e\u0301 \ufb01 \ufeff", "a  b   c\n\n\n", "don't WE'RE 123 4,5", *TEXTS]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "gb18030", "utf-16", "shift_jis"])
def test_decoding_gives_back_text_of_the_wrong_encoding(tokenizer, encoding):
    mojibake = "größer 漢字 naïve".encode(encoding, "ignore").decode("latin-1")
    assert tokenizer.decode(tokenizer.encode(mojibake)) == mojibake


def test_no_text_can_forge_a_special_token(tokenizer):
    text = f"before{END_OF_TEXT}after <|pad|>"
    ids = tokenizer.encode(text)
    assert not set(ids) & {0, 1}
    assert tokenizer.decode(ids) == text


def test_a_batch_is_one_flat_array(tokenizer):
    values, lengths = tokenizer.encode_batch(["one two", "", "three"], end=0)
    rows = [tokenizer.encode("one two"), [], tokenizer.encode("three")]
    assert values.tolist() == [*rows[0], 0, 0, *rows[2], 0]
    assert lengths.tolist() == [len(row) + 1 for row in rows]
    assert (values.dtype, lengths.dtype) == (np.uint16, np.int64)
    assert tokenizer.encode_batch([])[0].tolist() == []


def test_a_text_with_few_pairs_gives_a_smaller_vocabulary():
    assert train(["ab ab"], 1000, [END_OF_TEXT], 2).vocab_size == 258  # the token ab; a space and ab occur once


def test_large_vocabularies_need_four_bytes(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "a.json")
    data = json.loads((tmp_path / "a.json").read_text())
    data["model"]["vocab"] |= {f"token{n}": n for n in range(1000, 65_536)}
    (tmp_path / "a.json").write_text(json.dumps(data))
    assert load(tmp_path / "a.json").dtype == "uint16"
    data["model"]["vocab"]["last"] = 65_536
    (tmp_path / "a.json").write_text(json.dumps(data))
    assert load(tmp_path / "a.json").dtype == "uint32"
    assert load(tmp_path / "a.json").encode_batch(["x"])[0].dtype == np.uint32


def test_settings_of_a_foreign_tokenizer_do_not_cut_or_pad(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "a.json")
    data = json.loads((tmp_path / "a.json").read_text())
    data["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    data["padding"] = {
        "strategy": {"Fixed": 50},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "<|pad|>",
    }
    (tmp_path / "a.json").write_text(json.dumps(data))
    assert load(tmp_path / "a.json").encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


@pytest.mark.parametrize("content", ["", "{}", '{"model": {}}'])
def test_something_else_is_not_a_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: not a tokenizer in the Hugging Face format"):
        load(tmp_path / "tokenizer.json")
