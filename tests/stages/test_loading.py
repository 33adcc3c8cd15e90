"""Whose tokenizer tokens were made with, when its file is not the same byte for byte."""

import json
import shutil
from pathlib import Path

import pytest
from hf_directories import FAMILIES, TEXTS, make_tokenizer

from pipeline.artifact import Artifact, Made, Manifest, open_artifact, record_file, write_manifest
from pipeline.errors import ArtifactError
from pipeline.settings import decode
from pipeline.stages.import_tokenizer import ImportTokenizer
from pipeline.stages.loading import check_tokenizer
from pipeline.text.tokenizers import load

MADE = Made(version="0", commit=None, python="", host="", time="", seconds=0, ranks=1)
ENDS = {"llama": "</s>", "gpt2": "<|endoftext|>", "bert": "[SEP]", "modernbert": "[SEP]", "t5": "</s>"}


def artifact(directory: Path, tokenizer: str, vocab_size: int, end_of_text_id: int = 0) -> Artifact:
    """Something with a tokenizer and rows for so many ids."""
    directory.mkdir()
    (directory / "tokenizer.json").write_text(tokenizer)
    files = {"tokenizer.json": record_file(directory / "tokenizer.json")}
    stats = {"vocab_size": vocab_size, "end_of_text_id": end_of_text_id}
    manifest = Manifest(
        kind="x", name="x", fingerprint="0" * 16, stage={}, inputs={}, files=files, stats=stats, made=MADE
    )
    write_manifest(directory, manifest)
    return open_artifact(directory)


@pytest.fixture
def compare(tmp_path, run_stage):
    """Give a function that imports a model's tokenizer with some settings, and checks it against the model's."""

    def run(family: str, rows: int = 448, may_grow: bool = False, change=lambda data: data, **settings):
        theirs = change(json.loads(make_tokenizer(family)[0].to_str()))
        model = artifact(tmp_path / "model", make_tokenizer(family)[0].to_str(pretty=True), rows)
        (tmp_path / "tokenizer.json").write_text(json.dumps(theirs))
        vocabulary = {"kind": "huggingface", "path": str(tmp_path / "tokenizer.json")}
        stage = {"kind": "import_tokenizer", "vocabulary": vocabulary, "end_of_text": ENDS[family], **settings}
        made = run_stage(decode(ImportTokenizer, stage), {}, tmp_path / "made")
        tokens = artifact(tmp_path / "tokens", made.file("tokenizer.json").read_text(), made.stats["vocab_size"])
        check_tokenizer(model, tokens, may_grow=may_grow)
        return load(tokens.file("tokenizer.json"))

    return run


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokenizer_of_a_model_is_its_own_once_imported(compare, family):
    ours = compare(family)
    theirs = make_tokenizer(family)[0]
    theirs.no_truncation()
    theirs.no_padding()
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids


def test_more_special_tokens_fit_into_rows_that_are_there(compare):
    compare("gpt2", special_tokens=["<|im_start|>"], added_tokens=["<tool>"])


def test_and_not_where_there_are_none(compare):
    with pytest.raises(ArtifactError, match=r"its tokenizer \(vocabulary of 401\) is not the one of .* of 400\)"):
        compare("gpt2", rows=400, special_tokens=["<|im_start|>"])


def test_unless_the_model_grows(compare):
    compare("gpt2", rows=400, may_grow=True, special_tokens=["<|im_start|>"])


def test_special_tokens_that_their_file_has_beyond_their_rows_are_no_hindrance(tmp_path):
    """As [PAD] often is."""
    tokenizer = make_tokenizer("gpt2")[0]
    tokenizer.add_special_tokens(["[PAD]"])
    model = artifact(tmp_path / "model", tokenizer.to_str(pretty=True), 400)
    check_tokenizer(model, artifact(tmp_path / "tokens", tokenizer.to_str(), 401))
    with pytest.raises(ArtifactError, match="is not the one of"):
        check_tokenizer(model, artifact(tmp_path / "padded", tokenizer.to_str(), 401, end_of_text_id=400))


def without_a_merge(data):
    data["model"]["merges"].pop(7)
    return data


def without_a_split(data):
    data["pre_tokenizer"]["add_prefix_space"] = True
    return data


def swapped(data):
    vocab = data["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    return data


@pytest.mark.parametrize("change", [without_a_merge, without_a_split, swapped])
def test_another_tokenizer_of_the_same_size_is_refused(compare, change):
    with pytest.raises(ArtifactError, match="is not the one of"):
        compare("gpt2", change=change, may_grow=True)


def test_a_tokenizer_that_lacks_a_special_token_is_refused(tmp_path):
    tokenizer = make_tokenizer("gpt2")[0]
    less = artifact(tmp_path / "less", tokenizer.to_str(), 401)
    tokenizer.add_special_tokens(["<|im_start|>"])
    more = artifact(tmp_path / "more", tokenizer.to_str(), 401)
    check_tokenizer(less, more)
    with pytest.raises(ArtifactError, match="is not the one of"):
        check_tokenizer(more, less)


def test_the_same_file_is_not_even_read(tmp_path):
    tokens = artifact(tmp_path / "tokens", "no tokenizer at all", 9)
    shutil.copytree(tokens.path, tmp_path / "model")
    check_tokenizer(open_artifact(tmp_path / "model"), tokens)
