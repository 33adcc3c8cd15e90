import json
import random
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import ArtifactError
from pipeline.text import trainers
from pipeline.text.tokenizer_files import Bytes
from pipeline.text.tokenizers import END_OF_TEXT, Tokenizer, byte_level, from_json, load
from pipeline.text.trainers import Bpe, Job, Unigram, WordPiece

DATA = Path(__file__).parents[1] / "data"
TEXTS = [json.loads(line)["text"] for line in (DATA / "mini.jsonl").read_text().splitlines()]
SCRIPTS = json.loads((DATA / "scripts.json").read_text("utf-8"))
SPECIAL = [END_OF_TEXT, "<|pad|>"]


@pytest.fixture(autouse=True)
def _fast_however_small(monkeypatch):
    """Let the fast trainer take corpora of any size."""
    monkeypatch.setattr("pipeline.text.trainers.WORTH_BYTES", 0)


@pytest.fixture
def train(tmp_path):
    """Give a function that trains with an algorithm and says with which library."""

    def run(texts=TEXTS, vocab_size=1000, special=SPECIAL, added=(), algorithm=None) -> tuple[Tokenizer, str]:
        return (algorithm or Bpe()).train(Job(lambda: texts, vocab_size, special, added, tmp_path))

    return run


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Bpe().train(Job(lambda: TEXTS, 1000, SPECIAL, [], tmp_path_factory.mktemp("scratch")))[0]


def random_text(noise: random.Random) -> str:
    blocks = [(0, 0x80), (0x80, 0x300), (0x300, 0x370), (0x590, 0x700), (0x2000, 0x2070), (0x3000, 0xA000)]
    blocks += [(0xE000, 0x10000), (0x1F300, 0x1FB00), (0x10000, 0x110000)]
    low, high = noise.choice(blocks)
    return "".join(chr(noise.randrange(low, high)) for _ in range(noise.randrange(1, 20)))


def test_the_vocabulary_has_what_was_asked_for(tokenizer):
    assert tokenizer.vocab_size == 1000
    assert tokenizer.special_tokens == {END_OF_TEXT: 0, "<|pad|>": 1}
    assert (tokenizer.token_id(END_OF_TEXT), tokenizer.token_id("<|none|>")) == (0, None)
    assert (tokenizer.unknown_token, tokenizer.added_tokens) == (None, {})


def both(train, monkeypatch, **settings) -> tuple[Tokenizer, Tokenizer, str]:
    """Train with gigatoken where it can, and with `tokenizers` alone."""
    fast, trainer = train(**settings)
    with monkeypatch.context() as patch:
        patch.setattr(trainers, "_train_fast", lambda job, min_frequency: None)
        return fast, train(**settings)[0], trainer


@pytest.mark.parametrize("script", SCRIPTS)
def test_both_trainers_make_the_same_tokenizer_in_every_script(train, monkeypatch, script):
    noise = random.Random(script)
    words = " ".join(SCRIPTS[script]).split()
    texts = [" ".join(noise.choices(words, k=20)) for _ in range(60)] + [script * 3, "aaaa aaaaa", "\n\n \n"]
    fast, plain, trainer = both(train, monkeypatch, texts=texts, vocab_size=300)
    assert trainer == "gigatoken"
    assert fast.data == plain.data
    assert len(fast.data["model"]["merges"]) == 300 - 258


@pytest.mark.parametrize("seed", range(20))
def test_both_trainers_make_the_same_tokenizer_where_counts_tie(train, monkeypatch, seed):
    noise = random.Random(seed)
    letters = ["ab", "abc", "aé漢"][seed % 3]
    words = ["".join(noise.choices(letters, k=noise.randrange(1, 12))) for _ in range(60)]
    texts = [noise.choice(["", " ", "\n"]).join(noise.choices(words, k=9)) for _ in range(40)]
    fast, plain, _ = both(train, monkeypatch, texts=texts, vocab_size=330)
    assert fast.data == plain.data


def test_both_trainers_make_the_same_tokenizer_of_real_text(train, monkeypatch):
    for vocab_size in (260, 2000):
        fast, plain, trainer = both(train, monkeypatch, vocab_size=vocab_size, added=["<tool>"])
        assert (trainer, fast.data == plain.data) == ("gigatoken", True)


def test_documents_are_not_joined_in_training(train):
    texts = ["ab", "cd"] * 9  # joined, the most frequent pairs would be of one word "abcdab…"
    tokenizer, trainer = train(texts=texts, vocab_size=259, special=[END_OF_TEXT])
    assert trainer == "gigatoken"
    assert tokenizer.data["model"]["merges"] == [["a", "b"], ["c", "d"]]


@pytest.mark.parametrize(
    ("min_frequency", "vocab_size", "trainer"),
    [(1, 1000, "gigatoken"), (5, 1000, "gigatoken"), (100, 2000, "tokenizers"), (2, 30_000, "tokenizers")],
)
def test_a_least_frequency_that_binds_is_left_to_the_plain_library(
    train, monkeypatch, min_frequency, vocab_size, trainer
):
    algorithm = Bpe(min_frequency=min_frequency)
    fast, plain, used = both(train, monkeypatch, vocab_size=vocab_size, algorithm=algorithm)
    assert (used, fast.data == plain.data) == (trainer, True)
    assert (fast.vocab_size < vocab_size) == (trainer == "tokenizers")


def test_letters_that_only_one_library_knows_are_no_reason_to_be_slow(train, monkeypatch):
    texts = [f"{text} a\u088fb 1\u088f x's \u088f\u088f \U000323b0a ʕ🫯" for text in TEXTS]
    fast, plain, trainer = both(train, monkeypatch, texts=texts, vocab_size=600)
    assert (trainer, fast.data == plain.data) == ("gigatoken", True)
    monkeypatch.setattr("pipeline.text.characters.disputed", lambda texts, spans: [])
    assert train(texts=texts, vocab_size=600)[0].data != plain.data


@pytest.mark.parametrize("texts", [[*TEXTS, "a !\u088f!b"], [], [""]])
def test_texts_on_which_trainers_may_differ_are_left_to_the_plain_library(train, texts):
    assert train(texts=texts, vocab_size=300)[1] == "tokenizers"


def test_a_special_token_in_a_text_is_ordinary_text_in_training(train, monkeypatch):
    texts = [f"{text} {END_OF_TEXT}<|pad|> <tool>" for text in TEXTS]
    fast, plain, trainer = both(train, monkeypatch, texts=texts, vocab_size=500)
    assert (trainer, fast.data == plain.data) == ("gigatoken", True)
    assert fast.token_id("<|") is not None


def test_training_twice_gives_equal_files_whatever_the_order(train, tmp_path):
    for algorithm in (Bpe(), WordPiece(), Unigram()):
        train(algorithm=algorithm)[0].save(tmp_path / "a.json")
        train(texts=TEXTS[::-1], algorithm=algorithm)[0].save(tmp_path / "b.json")
        assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_saving_and_loading_changes_nothing(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "a.json")
    again = load(tmp_path / "a.json")
    assert again.fingerprint == tokenizer.fingerprint
    assert again.special_tokens == tokenizer.special_tokens
    assert all(again.encode(text) == tokenizer.encode(text) for text in TEXTS)


def test_other_texts_give_another_fingerprint(train, tokenizer):
    assert train(texts=TEXTS[:5])[0].fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize("algorithm", [Bpe(), Unigram(), None])
def test_decoding_gives_back_any_text(train, algorithm):
    added = ["New York", "<tool>", "  "]
    if algorithm is None:
        tokenizer = Bytes().read()
        tokenizer.extend(SPECIAL, added)
    else:
        tokenizer = train(algorithm=algorithm, added=added)[0]
    noise = random.Random(0)
    texts = ["".join(random_text(noise) for _ in range(noise.randrange(0, 6))) for _ in range(1500)]
    texts += ["", " ", "\r\n\t \x00\x7f", "e\u0301 \ufb01 \ufeff", "a  b   c\n\n\n", "don't WE'RE 123 4,5", *TEXTS]
    texts += [f"a{END_OF_TEXT}b <tool>New York  <|pad|>", *(s for script in SCRIPTS.values() for s in script)]
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.special_tokens.values())


def test_plain_bytes_are_their_values():
    tokenizer = Bytes().read()
    assert tokenizer.encode("aé\n") == list("aé\n".encode())
    assert tokenizer.vocab_size == 256


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "gb18030", "utf-16", "shift_jis"])
def test_decoding_gives_back_text_of_the_wrong_encoding(tokenizer, encoding):
    mojibake = "größer 漢字 naïve".encode(encoding, "ignore").decode("latin-1")
    assert tokenizer.decode(tokenizer.encode(mojibake)) == mojibake


@pytest.mark.parametrize("algorithm", [Bpe(), WordPiece(), Unigram()])
def test_no_text_can_forge_a_special_token(train, algorithm):
    special = [END_OF_TEXT, "<|im_start|>", "<|im_end|>", "PAD"]
    tokenizer, _ = train(special=special, algorithm=algorithm)
    for token in special:
        for text in (token, f"before{token}after {token} {token}{token}"):
            assert not set(tokenizer.encode(text)) & {tokenizer.token_id(token) for token in special}


def test_a_unigram_model_is_kept_from_making_a_special_token_of_text(train, tmp_path):
    tokenizer, _ = train(special=[END_OF_TEXT, "PAD"], algorithm=Unigram())
    assert ["PAD", 0.0] in tokenizer.data["model"]["vocab"]
    assert tokenizer.decode(tokenizer.encode("a PAD b PADDED")) == "a PAD b PADDED"
    unguarded = tokenizer.data
    unguarded["pre_tokenizer"] = unguarded["pre_tokenizer"]["pretokenizers"][-1]
    assert tokenizer.token_id("PAD") in from_json(json.dumps(unguarded)).encode("a PAD b")
    ordinary = [text for text in TEXTS if "PAD" not in text and "<|" not in text]
    assert [tokenizer.encode(text) for text in ordinary] == [
        from_json(json.dumps(unguarded)).encode(text) for text in ordinary
    ]


def test_a_special_token_that_is_a_letter_is_refused(train):
    with pytest.raises(ArtifactError, match="special_tokens: ordinary text is encoded to the special token 'e'"):
        train(special=[END_OF_TEXT, "e"])


def test_added_tokens_are_found_in_text_and_have_the_last_ids(train):
    for algorithm in (Bpe(), WordPiece(), Unigram()):
        tokenizer, _ = train(added=["<tool>", "New York"], algorithm=algorithm)
        assert tokenizer.added_tokens == {"<tool>": tokenizer.vocab_size - 2, "New York": tokenizer.vocab_size - 1}
        ids = tokenizer.encode("in New York<tool>!")
        assert [n for n in ids if n >= tokenizer.vocab_size - 2] == [tokenizer.vocab_size - 1, tokenizer.vocab_size - 2]
        assert tokenizer.vocab_size == 1000


def test_an_ordinary_token_can_become_special_but_not_the_reverse(train):
    tokenizer, _ = train(added=["<tool>"])
    with pytest.raises(ArtifactError, match=r"added_tokens: '<\|pad\|>' is a special token of this tokenizer"):
        tokenizer.extend([], ["<|pad|>"])
    number = tokenizer.token_id("<tool>")
    tokenizer.extend(["<tool>"], [])
    assert (tokenizer.special_tokens["<tool>"], tokenizer.added_tokens) == (number, {})
    assert number not in tokenizer.encode("a <tool>")


def test_word_pieces_lose_case_and_spaces_but_no_word_silently(train):
    tokenizer, trainer = train(algorithm=WordPiece())
    assert (trainer, tokenizer.unknown_token) == ("tokenizers", "[UNK]")
    assert tokenizer.special_tokens == {END_OF_TEXT: 0, "<|pad|>": 1, "[UNK]": 2}
    assert tokenizer.decode(tokenizer.encode("The  WHALE")) == "the whale"
    assert tokenizer.encode("漢") == [2]
    cased, _ = train(algorithm=WordPiece(lowercase=False, unknown_token="<unk>"))
    assert cased.decode(cased.encode("The whale")) == "The whale"


def test_word_pieces_need_room_for_their_characters(train):
    texts = ["".join(chr(0x4E00 + n) for n in range(2000))]
    with pytest.raises(ArtifactError, match="vocab_size: the characters of the corpus alone make 2,003 tokens"):
        train(texts=texts, algorithm=WordPiece())
    assert train(texts=texts, vocab_size=3000, algorithm=WordPiece())[0].vocab_size == 2003


def test_a_unigram_model_prefers_frequent_pieces(train):
    tokenizer, _ = train(algorithm=Unigram(), vocab_size=2000)
    bpe, _ = train(vocab_size=2000)
    lengths = [sum(len(t.encode(text)) for text in TEXTS) for t in (tokenizer, bpe)]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.25)
    short, _ = train(algorithm=Unigram(max_piece_bytes=3), vocab_size=800)
    assert max(len(piece) for piece, _ in short.data["model"]["vocab"][2:]) == 3


def test_a_batch_is_one_flat_array(tokenizer):
    values, lengths = tokenizer.encode_batch(["one two", "", "three"], end=0)
    rows = [tokenizer.encode("one two"), [], tokenizer.encode("three")]
    assert values.tolist() == [*rows[0], 0, 0, *rows[2], 0]
    assert lengths.tolist() == [len(row) + 1 for row in rows]
    assert (values.dtype, lengths.dtype) == (np.uint16, np.int64)
    assert tokenizer.encode_batch([])[0].tolist() == []


def test_a_text_with_few_pairs_gives_a_smaller_vocabulary(train):
    tokenizer, trainer = train(texts=["ab ab"], special=[END_OF_TEXT])
    assert (tokenizer.vocab_size, trainer) == (258, "tokenizers")  # the token ab; a space and ab occur once


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


def test_a_pattern_splits_text_before_the_merges():
    vocab = Bytes().read().data["model"]["vocab"] | {"ab": 256}
    assert byte_level(vocab, [("a", "b")], r"a|.").encode("abb") == [97, 98, 98]
    assert byte_level(vocab, [("a", "b")], r"[ab]+").encode("abb") == [256, 98]


@pytest.mark.parametrize("content", ["", "{}", '{"model": {}}', '{"version": "1.0", "mod'])
def test_something_else_is_not_a_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: not a tokenizer in the Hugging Face format"):
        load(tmp_path / "tokenizer.json")
