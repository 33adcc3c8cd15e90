import json
from pathlib import Path

import pytest

from pipeline.errors import ArtifactError, ConfigError
from pipeline.settings import decode
from pipeline.stage import Run
from pipeline.stages.train_tokenizer import TrainTokenizer
from pipeline.text.tokenizers import load

MINI = Path(__file__).parents[1] / "data" / "mini.jsonl"
TEXTS = [json.loads(line)["text"] for line in MINI.read_text().splitlines()]


@pytest.fixture(autouse=True)
def _fast_however_small(monkeypatch):
    """Let the fast trainer take corpora of any size."""
    monkeypatch.setattr("pipeline.text.trainers.WORTH_BYTES", 0)


def train(**settings) -> TrainTokenizer:
    return decode(TrainTokenizer, {"kind": "train_tokenizer", "corpus": "@clean", "vocab_size": 600, **settings})


def test_a_tokenizer_is_made_with_its_numbers(tmp_path, texts_to_corpus, run_stage):
    stage = train(special_tokens=["<|endoftext|>", "<|pad|>"])
    made = run_stage(stage, {"corpus": texts_to_corpus(TEXTS, 10_000)}, tmp_path / "tokenizer")
    tokenizer = load(made.file("tokenizer.json"))
    assert made.stats == {
        "vocab_size": 600,
        "end_of_text": "<|endoftext|>",
        "special.<|endoftext|>": 0,
        "special.<|pad|>": 1,
        "trainer": "gigatoken",
        "bytes_per_token": pytest.approx(2.09, abs=0.01),
    }
    assert tokenizer.special_tokens == {"<|endoftext|>": 0, "<|pad|>": 1}
    text = "".join(TEXTS)
    assert made.stats["bytes_per_token"] == pytest.approx(len(text.encode()) / len(tokenizer.encode(text)), rel=0.01)
    assert TrainTokenizer.headline(made.stats)[0] == "600 tokens in the vocabulary"


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_two_trainings_give_equal_files_whatever_the_parts(tmp_path, texts_to_corpus, run_stage, kind):
    files = []
    for part_bytes in (1_000, 100_000):
        corpus = texts_to_corpus(TEXTS, part_bytes, f"raw{part_bytes}")
        made = run_stage(train(algorithm={"kind": kind}), {"corpus": corpus}, tmp_path / f"tokenizer{part_bytes}")
        files.append(made.file("tokenizer.json").read_bytes())
    assert files[0] == files[1]


def test_chat_markers_are_special_and_added_tokens_are_not(tmp_path, texts_to_corpus, run_stage):
    markers = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    stage = train(special_tokens=markers, added_tokens=["<think>", "</think>"])
    made = run_stage(stage, {"corpus": texts_to_corpus(TEXTS)}, tmp_path / "tokenizer")
    tokenizer = load(made.file("tokenizer.json"))
    assert [made.stats[f"special.{token}"] for token in markers] == [0, 1, 2]
    assert tokenizer.added_tokens == {"<think>": 598, "</think>": 599}
    ids = tokenizer.encode("<|im_start|>user <think>hm</think><|im_end|>")
    assert not {0, 1, 2} & set(ids)
    assert {598, 599} <= set(ids)


def test_words_that_word_pieces_cannot_express_are_counted(tmp_path, texts_to_corpus, run_stage):
    corpus = texts_to_corpus([*TEXTS, "x" * 101 + " short"])
    made = run_stage(train(algorithm={"kind": "wordpiece"}), {"corpus": corpus}, tmp_path / "tokenizer")
    assert made.stats["special.[UNK]"] == 1
    assert 0 < made.stats["unknown_fraction"] < 0.01
    assert made.stats["trainer"] == "tokenizers"


def test_nothing_of_the_scratch_files_stays(tmp_path, texts_to_corpus, run_stage):
    made = run_stage(train(), {"corpus": texts_to_corpus(TEXTS)}, tmp_path / "tokenizer")
    assert list((made.path / "work/scratch").iterdir()) == []
    assert train().disk_bytes(1000, Run(kind="local")) == 1000 + 60_000
    assert train(algorithm={"kind": "unigram"}).disk_bytes(1000, Run(kind="local")) == 60_000


def test_a_small_corpus_gives_a_smaller_vocabulary_and_says_so(tmp_path, texts_to_corpus, run_stage, capsys):
    made = run_stage(train(), {"corpus": texts_to_corpus(["ab ab ab"])}, tmp_path / "tokenizer")
    assert (made.stats["vocab_size"], made.stats["trainer"]) == (259, "tokenizers")
    assert "the vocabulary has 259 tokens, not 600: no other pair occurs 2 times" in capsys.readouterr().out


def test_bytes_per_token_come_from_a_sample_of_a_large_corpus(tmp_path, texts_to_corpus, run_stage, monkeypatch):
    corpus = texts_to_corpus(TEXTS, 5_000)
    whole = run_stage(train(), {"corpus": corpus}, tmp_path / "whole").stats["bytes_per_token"]
    monkeypatch.setattr("pipeline.stages.train_tokenizer.SAMPLE_BYTES", 10_000)
    sampled = run_stage(train(), {"corpus": corpus}, tmp_path / "sampled").stats["bytes_per_token"]
    assert sampled != whole
    assert sampled == pytest.approx(whole, rel=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"special_tokens": ["<|pad|>"]},
            r"special_tokens: wanted '<\|endoftext\|>' as the first, found \['<\|pad\|>'\]",
        ),
        ({"special_tokens": []}, "special_tokens: wanted"),
        (
            {"special_tokens": ["<|endoftext|>", "a", "a"]},
            "special_tokens: wanted different tokens, none of them empty",
        ),
        ({"special_tokens": ["<|endoftext|>", ""]}, "special_tokens: wanted different tokens, none of them empty"),
        ({"added_tokens": ["a", "a"]}, "added_tokens: wanted different tokens, none of them empty"),
        ({"algorithm": {"kind": "word_piece"}}, "no algorithm is called 'word_piece'; did you mean 'wordpiece'"),
        ({"algorithm": {"kind": "bpe", "min_frequency": 0}}, "algorithm.min_frequency: wanted greater than"),
        ({"algorithm": {"kind": "unigram", "min_frequency": 2}}, "algorithm.min_frequency: no such setting"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ConfigError, match=message):
        train(**settings)


def test_a_vocabulary_must_hold_the_bytes():
    run = Run(kind="local")
    assert list(train(vocab_size=257).check({}, run)) == []
    assert list(train(vocab_size=256).check({}, run)) == [
        ("vocab_size", "wanted at least 257 (256 bytes and the special tokens), found 256")
    ]
    assert list(train(vocab_size=258, added_tokens=["a", "b"], algorithm={"kind": "unigram"}).check({}, run)) == [
        ("vocab_size", "wanted at least 259 (256 bytes, the added and the special tokens), found 258")
    ]
    assert list(train(vocab_size=100, algorithm={"kind": "wordpiece"}).check({}, run)) == []


def test_no_token_is_both_special_and_added():
    stage = train(added_tokens=["<|endoftext|>"])
    assert list(stage.check({}, Run(kind="local"))) == [
        ("added_tokens", "'<|endoftext|>' is a special token too; no text contains those")
    ]


def test_a_damaged_part_is_not_read(tmp_path, texts_to_corpus, run_stage, damage):
    corpus = texts_to_corpus(TEXTS)
    damage(corpus.path / corpus.parts()[0])
    with pytest.raises(ArtifactError, match="damaged"):
        run_stage(train(), {"corpus": corpus}, tmp_path / "tokenizer")


def test_a_small_corpus_is_left_to_the_plain_library(tmp_path, texts_to_corpus, run_stage, monkeypatch):
    monkeypatch.undo()
    made = run_stage(train(), {"corpus": texts_to_corpus(TEXTS)}, tmp_path / "tokenizer")
    assert made.stats["trainer"] == "tokenizers"


def test_a_word_without_end_does_not_take_for_ever(tmp_path, texts_to_corpus, run_stage):
    endless = ["x" * 200_000, "ab" * 100_000 + " end", " " * 100_000, *TEXTS]
    for number, corpus in enumerate((endless, [text[: 1 << 14] for text in endless])):
        stage = train(algorithm={"kind": "bpe", "min_frequency": 2})
        made = run_stage(stage, {"corpus": texts_to_corpus(corpus)}, tmp_path / f"tokenizer{number}")
        assert made.stats["vocab_size"] > 256
