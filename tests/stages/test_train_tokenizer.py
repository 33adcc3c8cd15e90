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


def train(**settings) -> TrainTokenizer:
    return decode(TrainTokenizer, {"kind": "train_tokenizer", "corpus": "@clean", "vocab_size": 600, **settings})


def test_a_tokenizer_is_made_with_its_numbers(tmp_path, texts_to_corpus, run_stage):
    stage = train(special_tokens=["<|endoftext|>", "<|pad|>"])
    made = run_stage(stage, {"corpus": texts_to_corpus(TEXTS, 10_000)}, tmp_path / "tokenizer")
    tokenizer = load(made.file("tokenizer.json"))
    assert made.stats == {
        "vocab_size": 600,
        "special.<|endoftext|>": 0,
        "special.<|pad|>": 1,
        "bytes_per_token": pytest.approx(2.09, abs=0.01),
    }
    assert tokenizer.special_tokens == {"<|endoftext|>": 0, "<|pad|>": 1}
    text = "".join(TEXTS)
    assert made.stats["bytes_per_token"] == pytest.approx(len(text.encode()) / len(tokenizer.encode(text)), rel=0.01)
    assert TrainTokenizer.headline(made.stats)[0] == "600 tokens in the vocabulary"


def test_two_trainings_give_equal_files_whatever_the_parts(tmp_path, texts_to_corpus, run_stage):
    files = []
    for part_bytes in (1_000, 100_000):
        corpus = texts_to_corpus(TEXTS, part_bytes, f"raw{part_bytes}")
        made = run_stage(train(), {"corpus": corpus}, tmp_path / f"tokenizer{part_bytes}")
        files.append(made.file("tokenizer.json").read_bytes())
    assert files[0] == files[1]


def test_a_small_corpus_gives_a_smaller_vocabulary_and_says_so(tmp_path, texts_to_corpus, run_stage, capsys):
    made = run_stage(train(), {"corpus": texts_to_corpus(["ab ab ab"])}, tmp_path / "tokenizer")
    assert made.stats["vocab_size"] == 259
    assert "the vocabulary has 259 tokens, not 600: no other pair occurs 2 times" in capsys.readouterr().out


def test_bytes_per_token_come_from_a_sample_of_a_large_corpus(tmp_path, texts_to_corpus, run_stage, monkeypatch):
    corpus = texts_to_corpus(TEXTS, 5_000)
    whole = run_stage(train(), {"corpus": corpus}, tmp_path / "whole").stats["bytes_per_token"]
    monkeypatch.setattr("pipeline.stages.train_tokenizer.SAMPLE_BYTES", 10_000)
    sampled = run_stage(train(), {"corpus": corpus}, tmp_path / "sampled").stats["bytes_per_token"]
    assert sampled != whole
    assert sampled == pytest.approx(whole, rel=0.1)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["<|pad|>"], r"special_tokens: wanted '<\|endoftext\|>' as the first, found \['<\|pad\|>'\]"),
        ([], "special_tokens: wanted"),
        (["<|endoftext|>", "a", "a"], "special_tokens: wanted different tokens, none of them empty"),
        (["<|endoftext|>", ""], "special_tokens: wanted different tokens, none of them empty"),
    ],
)
def test_special_tokens_are_checked(tokens, message):
    with pytest.raises(ConfigError, match=message):
        train(special_tokens=tokens)


def test_a_vocabulary_must_hold_the_bytes():
    run = Run(kind="local")
    assert list(train(vocab_size=257).check({}, run)) == []
    assert list(train(vocab_size=256).check({}, run)) == [
        ("vocab_size", "wanted at least 257 (256 bytes and the special tokens), found 256")
    ]


def test_a_damaged_part_is_not_read(tmp_path, texts_to_corpus, run_stage, damage):
    corpus = texts_to_corpus(TEXTS)
    damage(corpus.path / corpus.parts()[0])
    with pytest.raises(ArtifactError, match="damaged"):
        run_stage(train(), {"corpus": corpus}, tmp_path / "tokenizer")
