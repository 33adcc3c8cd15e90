import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import xxhash

from pipeline.errors import ArtifactError
from pipeline.settings import decode
from pipeline.stage import Run
from pipeline.stages.tokenize import Tokenize
from pipeline.stages.train_tokenizer import TrainTokenizer
from pipeline.text.arrow import open_tokens
from pipeline.text.tokenizers import load

MINI = Path(__file__).parents[1] / "data" / "mini.jsonl"
TEXTS = [*(json.loads(line)["text"] for line in MINI.read_text().splitlines()), "é漢😀 <|endoftext|> x"]


def tokenize(**settings) -> Tokenize:
    return decode(Tokenize, {"kind": "tokenize", "corpus": "@clean", "tokenizer": "@tokenizer", **settings})


def train(**settings) -> TrainTokenizer:
    return decode(TrainTokenizer, {"kind": "train_tokenizer", "corpus": "@clean", "vocab_size": 600, **settings})


@pytest.fixture
def inputs(tmp_path, texts_to_corpus, run_stage):
    corpus = texts_to_corpus(TEXTS, 8_000)
    return {"corpus": corpus, "tokenizer": run_stage(train(), {"corpus": corpus}, tmp_path / "tokenizer")}


def test_tokens_are_the_corpus(inputs, same_on_any_ranks):
    made = same_on_any_ranks(tokenize(), inputs)
    tokenizer = load(made.file("tokenizer.json"))
    parts = [open_tokens(made.file(name)) for name in made.parts()]
    assert made.parts() == inputs["corpus"].parts()
    rows = [part.values[a:b] for part in parts for a, b in zip(part.offsets, part.offsets[1:], strict=False)]
    assert [tokenizer.decode(row[:-1]) for row in rows] == TEXTS
    assert {int(row[-1]) for row in rows} == {0}
    assert sum(int((row == 0).sum()) for row in rows) == len(TEXTS)
    assert [identity for part in parts for identity in part.ids] == [f"d{n}" for n in range(len(TEXTS))]
    assert np.concatenate([part.num_bytes for part in parts]).tolist() == [len(text.encode()) for text in TEXTS]
    assert np.concatenate([part.text_hash for part in parts]).tolist() == [
        xxhash.xxh3_64_intdigest(text.encode()) for text in TEXTS
    ]
    num_tokens, num_bytes = sum(map(len, rows)), sum(len(text.encode()) for text in TEXTS)
    assert made.stats == {
        "documents_in": 20,
        "documents": 20,
        "tokens": num_tokens,
        "bytes": num_bytes,
        "vocab_size": 600,
        "end_of_text_id": 0,
        "bytes_per_token": num_bytes / num_tokens,
        "dtype": "uint16",
    }


def test_datasets_opens_a_part(inputs, tmp_path, run_stage):
    made = run_stage(tokenize(), inputs, tmp_path / "tokens")
    part = made.file(made.parts()[0])
    rows = datasets.Dataset.from_file(str(part))
    assert rows.features["input_ids"] == datasets.List(datasets.Value("uint16"))
    assert rows[1]["input_ids"] == open_tokens(part).values[slice(*open_tokens(part).offsets[1:3])].tolist()


def test_the_tokenizer_is_copied(inputs, tmp_path, run_stage):
    made = run_stage(tokenize(), inputs, tmp_path / "tokens", 3)
    assert made.file("tokenizer.json").read_bytes() == inputs["tokenizer"].file("tokenizer.json").read_bytes()


def test_another_token_may_end_documents(tmp_path, texts_to_corpus, run_stage):
    corpus = texts_to_corpus(TEXTS)
    special = ["<|endoftext|>", "<|end|>"]
    tokenizer = run_stage(train(special_tokens=special), {"corpus": corpus}, tmp_path / "tokenizer")
    made = run_stage(tokenize(end_of_text="<|end|>"), {"corpus": corpus, "tokenizer": tokenizer}, tmp_path / "tokens")
    assert made.stats["end_of_text_id"] == 1
    assert open_tokens(made.file(made.parts()[0])).values[-1] == 1


def test_an_end_of_text_that_is_not_there_is_refused_before_and_while_running(inputs, tmp_path, run_stage):
    stage = tokenize(end_of_text="<|endoftxt|>")
    assert list(stage.check({"tokenizer": train()}, Run(kind="local"))) == [
        ("end_of_text", "the tokenizer has no special token '<|endoftxt|>'; did you mean '<|endoftext|>'?")
    ]
    assert list(tokenize().check({"tokenizer": train()}, Run(kind="local"))) == []
    with pytest.raises(
        ArtifactError, match=r"end_of_text: .*tokenizer\.json has no token '<\|endoftxt\|>'; did you mean"
    ):
        run_stage(stage, inputs, tmp_path / "tokens")


def test_batches_change_nothing(inputs, tmp_path, run_stage, monkeypatch):
    made = run_stage(tokenize(), inputs, tmp_path / "a")
    monkeypatch.setattr("pipeline.stages.tokenize.BATCH_CHARS", 1)
    again = run_stage(tokenize(), inputs, tmp_path / "b")
    assert again.manifest.files == made.manifest.files


@pytest.mark.parametrize("which", ["corpus", "tokenizer"])
def test_a_damaged_input_is_not_read(inputs, tmp_path, run_stage, damage, which):
    name = inputs[which].names[0]
    damage(inputs[which].path / name)
    fresh = {field: type(artifact)(artifact.path, artifact.manifest) for field, artifact in inputs.items()}
    with pytest.raises(ArtifactError, match=f"{name}: damaged"):
        run_stage(tokenize(), fresh, tmp_path / "tokens")
