import json
import random
from pathlib import Path

import numpy as np
import pytest

from pipeline.text import engine as engines
from pipeline.text.characters import LETTERS_17, OTHERS_17, disputed
from pipeline.text.engine import Gigatoken, Plain, choose_engine, hostile, train_merges
from pipeline.text.flat import Texts
from pipeline.text.ranks import shown
from pipeline.text.tokenizer_files import PATTERNS, Bytes, Gpt2
from pipeline.text.tokenizers import END_OF_TEXT, Tokenizer, byte_level, from_json
from pipeline.text.trainers import Bpe, Job, Unigram, WordPiece

DATA = Path(__file__).parents[1] / "data"
SCRIPTS = json.loads((DATA / "scripts.json").read_text("utf-8"))
MINI = [json.loads(line)["text"] for line in (DATA / "mini.jsonl").read_text().splitlines()]
CODE = [path.read_text("utf-8") for path in sorted(Path(engines.__file__).parents[1].rglob("*.py"))]
CHAT = ["<|im_start|>", "<|im_end|>"]


def gpt2() -> Tokenizer:
    tokenizer = Gpt2(path=str(DATA / "gpt2/vocab.bpe")).read()
    tokenizer.extend([END_OF_TEXT], [])
    return tokenizer


def mixed(noise: random.Random, sentences: list[str], num_words: int) -> str:
    """Words of sentences in another order, with numbers, punctuation and odd spaces between."""
    words = [word for sentence in sentences for word in sentence.split()]
    glue = [" ", " ", " ", "  ", "\n", "\t", "\r\n", "\u3000", ", ", "...", " 12", "'s ", "-", "🙂", ""]
    return "".join(noise.choice(words) + noise.choice(glue) for _ in range(num_words))


def with_words(tokenizer: Tokenizer) -> Tokenizer:
    """Merge ASCII letters, digits, spaces and punctuation with every byte, so that ids tell where words end."""
    merges = [(a, b) for a in ("a", "B", "1", shown(b" "), "!", "s") for b in map(shown, map(bytes, zip(range(256))))]
    tokens = dict.fromkeys([*tokenizer.data["model"]["vocab"], *(a + b for a, b in merges)])
    data = tokenizer.data
    data["model"] |= {"vocab": {token: n for n, token in enumerate(tokens)}, "merges": merges}
    return from_json(json.dumps(data))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Tokenizer:
    texts = [*MINI, *(sentence for script in SCRIPTS.values() for sentence in script)]
    job = Job(lambda: texts, 3000, [END_OF_TEXT, *CHAT], ["New York", "<tool>"], tmp_path_factory.mktemp("scratch"))
    return Bpe().train(job)[0]


@pytest.fixture(scope="module", params=["gpt2", "trained", "cl100k", "o200k", "bytes"])
def tokenizer(request, trained) -> Tokenizer:
    if request.param == "trained":
        return trained
    if request.param == "gpt2":
        return gpt2()
    if request.param == "bytes":
        made = Bytes().read()
    else:
        model = trained.data["model"]
        vocab = {token: number for token, number in model["vocab"].items() if number > 2}
        made = byte_level(vocab, [tuple(pair) for pair in model["merges"]], PATTERNS[request.param])
    made.extend([END_OF_TEXT, *CHAT], ["<tool>"])
    return made


def assert_equal(tokenizer: Tokenizer, texts: list[str]) -> None:
    """The engine is the fast one, and gives the ids of the plain library for strings and for bytes."""
    engine = choose_engine(tokenizer, [])
    assert (engine.name, engine.why) == ("gigatoken", None)
    values, lengths = tokenizer.encode_batch(texts)
    for given in (texts, [text.encode() for text in texts]):
        found, counts = engine.encode(Texts.of(given))
        assert counts.tolist() == lengths.tolist()
        assert np.array_equal(found, values)
        assert (found.dtype, counts.dtype) == (np.dtype(tokenizer.dtype), np.int64)


@pytest.mark.parametrize("script", SCRIPTS)
def test_ids_are_the_plain_librarys_in_every_script(tokenizer, script):
    noise = random.Random(script)
    assert_equal(tokenizer, [*SCRIPTS[script], *(mixed(noise, SCRIPTS[script], 30) for _ in range(100))])


def test_ids_are_the_plain_librarys_on_source_code(tokenizer):
    assert sum(map(len, CODE)) > 200_000
    assert_equal(tokenizer, CODE)


def test_ids_are_the_plain_librarys_on_random_bytes(tokenizer):
    noise = random.Random(0)
    texts = [noise.randbytes(noise.randrange(1, 400)).decode("utf-8", "replace") for _ in range(400)]
    texts += [bytes(noise.choices(range(0x80, 0x100), k=99)).decode("utf-8", "replace") for _ in range(200)]
    assert_equal(tokenizer, texts)


def test_ids_are_the_plain_librarys_on_random_characters(tokenizer):
    noise = random.Random(1)
    blocks = [(0, 0x80), (0x80, 0x300), (0x300, 0x370), (0x590, 0x800), (0x900, 0x1000), (0x1C80, 0x2100)]
    blocks += [(0x3000, 0xA000), (0xA640, 0xABFF), (0xF900, 0x10000), (0x10000, 0x20000), (0x20000, 0x33500)]
    alphabets = [noise.choices(blocks, k=2) for _ in range(600)]
    texts = ["".join(chr(noise.randrange(*noise.choice(two))) for _ in range(40)) for two in alphabets]
    assert_equal(tokenizer, texts)


def test_ids_are_the_plain_librarys_on_empty_and_huge_documents(tokenizer):
    noise = random.Random(2)
    every = [sentence for script in SCRIPTS.values() for sentence in script]
    huge = mixed(noise, [*every, *MINI[0].splitlines()], 150_000)
    assert len(huge.encode()) > 1_000_000
    assert_equal(tokenizer, ["", huge, "", "x", ""])
    assert_equal(tokenizer, [])
    assert_equal(tokenizer, ["", ""])


def test_ids_are_the_plain_librarys_on_hostile_texts_with_the_tokens_in_them(trained):
    texts = hostile(trained)
    for token in [END_OF_TEXT, *CHAT, "New York", "<tool>"]:
        assert any(f"a{token}b" in text for text in texts)
    assert_equal(trained, texts)
    assert trained.token_id("New York") in trained.encode("in New York now")


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["gpt2", "o200k"])
def test_ids_are_the_plain_librarys_on_every_character(pattern):
    made = with_words(byte_level(Bytes().read().data["model"]["vocab"], [], PATTERNS[pattern]))
    characters = [chr(n) for n in (*range(0xD800), *range(0xE000, 0x34000), *range(0xE0000, 0xE0200))]
    assert_equal(made, [f"a{c}Ba1{c} {c}{c}!{c}'s\n{c}" for c in characters])


def test_characters_that_the_libraries_see_differently_go_to_the_plain_one(monkeypatch):
    tokenizer = with_words(byte_level(Bytes().read().data["model"]["vocab"], []))
    texts = ["plain", "new letters a\u088fs \U000323b0x", "", "a🙂b"]
    assert disputed(Texts.of(texts)) == [1]
    engine = choose_engine(tokenizer, [])
    values, lengths = tokenizer.encode_batch(texts, end=9)
    assert [array.tolist() for array in engine.encode(Texts.of(texts), 9)] == [values.tolist(), lengths.tolist()]
    monkeypatch.setattr(engines, "disputed", lambda texts: [])
    assert engine.encode(Texts.of(texts), 9)[0].tolist() != values.tolist()  # else the list could be taken out


def test_disputed_characters_are_found_wherever_they_are():
    ends = [number for span in (LETTERS_17 + OTHERS_17).split() for number in (span.split("-")[0], span.split("-")[-1])]
    for character in (chr(int(number, 16)) for number in ends):
        assert disputed(Texts.of(["", character, "x", f"Ωa{character}", "ß漢🙂"])) == [1, 3]
    innocent = "".join(chr(n) for n in range(0x294)) + "ʔʖ漢字🙂🛗🫨ꟊ\U00010900\U000323af"
    assert disputed(Texts.of([innocent])) == []


def test_an_end_follows_every_text():
    engine = choose_engine(gpt2(), [])
    values, lengths = engine.encode(Texts.of(["Hello world!", "", " a"]), end=50256)
    assert values.tolist() == [15496, 995, 0, 50256, 50256, 257, 50256]
    assert lengths.tolist() == [4, 1, 2]
    assert engine.encode(Texts.of([]), end=50256)[0].tolist() == []


def test_large_vocabularies_need_four_bytes():
    tokenizer = gpt2()
    tokenizer.extend([], [f"<token {n}>" for n in range(20_000)])
    assert_equal(tokenizer, ["x <token 19999> y", "a"])
    values, _ = choose_engine(tokenizer, []).encode(Texts.of(["<token 19999>"]), end=50256)
    assert (values.tolist(), values.dtype) == ([50257 + 19_999, 50256], np.uint32)


def test_a_fresh_instance_gives_the_same_ids(trained, monkeypatch):
    begun = []
    begin = Gigatoken._begin
    monkeypatch.setattr(Gigatoken, "_begin", lambda self: (begun.append(1), begin(self)))
    monkeypatch.setattr(engines, "REFRESH_BYTES", 5_000)
    engine = Gigatoken(trained)
    pieces = [engine.encode(Texts.of([text]))[0] for text in MINI]
    assert len(begun) > 3
    assert np.concatenate(pieces).tolist() == trained.encode_batch(MINI)[0].tolist()


@pytest.mark.parametrize("algorithm", [WordPiece(), Unigram()])
def test_a_tokenizer_that_gigatoken_does_not_support_is_left_to_the_plain_library(tmp_path, algorithm):
    tokenizer, _ = algorithm.train(Job(lambda: MINI, 600, [END_OF_TEXT], [], tmp_path))
    engine = choose_engine(tokenizer, MINI[:3])
    assert isinstance(engine, Plain)
    assert (engine.name, engine.why[:44]) == ("tokenizers", "gigatoken does not support this tokenizer (U")
    values, lengths = engine.encode(Texts.of([MINI[0].encode(), b""]), end=0)
    assert values.tolist() == [*tokenizer.encode(MINI[0]), 0, 0]
    assert lengths.tolist() == [len(tokenizer.encode(MINI[0])) + 1, 1]


def test_an_engine_that_gives_one_other_id_is_not_used(trained, monkeypatch):
    encode = Gigatoken._encode

    def other(self, raw, end):
        values, lengths = encode(self, raw, end)
        values[values == trained.encode("zqz")[0]] += 1
        return values, lengths

    monkeypatch.setattr(Gigatoken, "_encode", other)
    engine = choose_engine(trained, [])
    assert isinstance(engine, Plain)
    assert engine.why.startswith("gigatoken gives other ids for ")
    wrong_on_sample = choose_engine(trained, ["only the sample shows it"])
    assert isinstance(wrong_on_sample, Plain)


def test_a_difference_that_only_the_sample_shows_counts(monkeypatch):
    tokenizer, encode = gpt2(), Gigatoken._encode
    number = tokenizer.encode(" ferry")[0]

    def other(self, raw, end):
        values, lengths = encode(self, raw, end)
        return np.where(values == number, 5, values).astype(values.dtype), lengths

    monkeypatch.setattr(Gigatoken, "_encode", other)
    assert isinstance(choose_engine(tokenizer, []), Gigatoken)
    assert choose_engine(tokenizer, ["fine", "the ferry"]).why == "gigatoken gives other ids for 'the ferry'"


def test_what_rust_calls_a_panic_is_no_reason_to_stop(trained, monkeypatch):
    class Panic(BaseException):
        pass

    def panic(self, raw, end):
        raise Panic("index out of bounds\nmore")

    monkeypatch.setattr(Gigatoken, "_encode", panic)
    why = choose_engine(trained, []).why
    assert why == "gigatoken does not support this tokenizer (index out of bounds)"


def test_training_prints_nothing(tmp_path, capfd):
    (tmp_path / "texts").write_bytes(b"low lower lowest\xfflow low\xff")
    merges = train_merges(tmp_path / "texts", b"\xff", 3)
    assert merges[:2] == [(b"l", b"o"), (b"lo", b"w")]
    print("after")
    assert capfd.readouterr() == ("after\n", "")


@pytest.mark.parametrize("how", ["lstrip", "rstrip", "single_word"])
def test_added_tokens_that_look_around_are_left_to_the_plain_library(trained, how):
    data = trained.data
    number = 1 + max(data["model"]["vocab"].values())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    data["added_tokens"].append({"id": number, "content": "<x>", **flags, how: True})
    engine = choose_engine(from_json(json.dumps(data)), [])
    assert engine.name == "tokenizers"
    assert "its added tokens take what is around them into account" in engine.why
