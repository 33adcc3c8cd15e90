"""Fine-tuning of every family, from our artifacts and from Hugging Face's directories, at the smallest size."""

import json
import random
from pathlib import Path

import pytest
from hf_directories import FAMILIES

from pipeline.artifact import Artifact, Made, Manifest, open_artifact, record_file, write_manifest
from pipeline.errors import ArtifactError, ConfigError
from pipeline.launch.local import Local
from pipeline.settings import decode
from pipeline.stages.finetune import Finetune
from pipeline.stages.imported import Imported, open_input
from pipeline.stages.pretrain import Pretrain

LEARNED = 0.9  # accuracy on 32 texts in which one word decides; guessing gets there once in a million

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("finetune")]

SMALL = {"d_model": 32, "num_layers": 2, "num_heads": 2, "max_seq_len": 64, "vocab_size": 400}
OURS = {
    "decoder": {"kind": "decoder", **SMALL},
    "experts": {
        "kind": "decoder",
        **SMALL,
        "experts": {"count": 4, "d_ff": 32, "router": {"kind": "token_choice", "top_k": 2}, "balance_bias_rate": 0.01},
    },
    "encoder": {"kind": "encoder", **SMALL, "token_types": 2, "pooler": True},
    "encoder_decoder": {"kind": "encoder_decoder", **SMALL, "positions": "relative"},
}


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> Path:
    """Texts that a single word tells apart; one is empty."""
    path, chance = tmp_path_factory.mktemp("labelled") / "rows.jsonl", random.Random(0)
    lines = []
    for number in range(160):
        label, split = ("game", "library")[number % 2], ("train", "train", "train", "valid", "test")[number // 2 % 5]
        words = [chance.choice(["a", "the", "with", "for", "and"]) for _ in range(chance.randrange(3, 12))]
        words[chance.randrange(1, len(words))] = label
        lines.append(json.dumps({"text": "" if number == 0 else " ".join(words), "label": label, "split": split}))
    path.write_text("\n".join(lines) + "\n")
    return path


def ours(directory: Path, settings: dict, tokenizer: Path) -> Artifact:
    """Return an artifact of ours with random weights."""
    from pipeline.models.files import ModelFile
    from pipeline.models.initial import init_weights
    from pipeline.models.saved import save_model
    from pipeline.models.transformer import Transformer

    model = Transformer(decode(ModelFile, {"model": settings}).model)
    init_weights(model, 0)
    directory.mkdir()
    names = [*save_model(directory, model), "tokenizer.json"]
    (directory / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    made = Made(version="0", commit=None, python="", host="", time="", seconds=0, ranks=1)
    files = {name: record_file(directory / name) for name in names}
    write_manifest(
        directory,
        Manifest(kind="model", name="x", fingerprint="0" * 16, stage={}, inputs={}, files=files, stats={}, made=made),
    )
    return open_artifact(directory)


@pytest.fixture
def finetune(rows, run_stage, tmp_path):
    """Give a function that fine-tunes a model and opens what it made."""

    def run(model: Artifact, name: str = "tuned", **settings) -> Artifact:
        plain = {"model": "@model", "data": str(rows), "seq_len": 32, "epochs": 12, "batch_examples": 16}
        plain |= {"optimizer": {"kind": "adamw", "lr": 1e-2}, "baseline": False}
        stage = decode(Finetune, {"kind": "finetune", **plain, **settings}, where="stage")
        return run_stage(stage, {"model": model}, tmp_path / name)

    return run


def check_saved(tuned: Artifact, labels=("game", "library")) -> None:
    """Load the classifier that was saved, and look that it says of the texts what the stage said."""
    import torch

    from pipeline.models.classifier import Classifier
    from pipeline.models.saved import load_model
    from pipeline.text.tokenizers import load

    model = load_model(tuned.path)
    assert isinstance(model, Classifier)
    assert model.labels == list(labels)
    tokenizer = load(tuned.file("tokenizer.json"))
    said = []
    with torch.inference_mode():
        for text in ("the game and a", "a library with the"):
            ids = torch.tensor([tokenizer.encode(text)])
            said.append(model.labels[model(ids, torch.ones_like(ids, dtype=torch.bool)).argmax()])
    assert said == list(labels)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_directory_of_theirs_is_fine_tuned(theirs, finetune, tmp_path, family):
    tuned = finetune(open_input(str(theirs / family), tmp_path / "root", "model"))
    assert tuned.stats["test_accuracy"] > LEARNED
    assert (tuned.path / "tokenizer.json").read_bytes() == (theirs / family / "tokenizer.json").read_bytes()
    check_saved(tuned)


@pytest.mark.parametrize("family", OURS)
def test_a_model_of_ours_is_fine_tuned(theirs, finetune, tmp_path, family):
    tuned = finetune(ours(tmp_path / "model", OURS[family], theirs / "gpt2/tokenizer.json"))
    assert tuned.stats["test_accuracy"] > LEARNED
    check_saved(tuned)


def test_a_frozen_trunk_keeps_their_weights(theirs, finetune, tmp_path):
    from pipeline.models.saved import load_model
    from pipeline.stages.loading import load_language_model

    source = open_input(str(theirs / "bert"), tmp_path / "root", "model")
    trunk = load_model(finetune(source, trunk="frozen", epochs=1).path).trunk.state_dict()
    for name, weight in load_language_model(source).state_dict().items():
        assert trunk[name].equal(weight), name


def test_the_baseline_is_the_same_model_from_random_weights(theirs, finetune, tmp_path):
    tuned = finetune(open_input(str(theirs / "t5"), tmp_path / "root", "model"), baseline=True)
    assert tuned.stats["baseline.test_accuracy"] > LEARNED
    assert tuned.stats["test_accuracy"] > LEARNED


@pytest.mark.parametrize("kind", ["muon", "lion", "adafactor", "schedule_free_adamw"])
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_any_optimizer_fine_tunes(theirs, finetune, tmp_path, family, kind):
    source = open_input(str(theirs / family), tmp_path / "root", "model")
    tuned = finetune(source, optimizer={"kind": kind, "lr": 1e-3}, schedule={"kind": "constant"}, epochs=1)
    assert tuned.stats["test_loss"] < 0.8


def test_texts_longer_than_the_model_reads_are_refused():
    stage = decode(Finetune, {"model": "@m", "data": "x", "seq_len": 65})
    model = decode(Imported, {"path": "x", "model": {"kind": "encoder", **SMALL}})
    found = list(stage.check({"model": model}, Local()))
    assert found == [("seq_len", "65 is longer than the model's max_seq_len of 64")]
    model = decode(Pretrain, {"tokens": "@t", "steps": 1, "model": {"kind": "encoder_decoder", **SMALL}})
    assert found == list(stage.check({"model": model}, Local()))


def test_a_classifier_is_not_fine_tuned_again(theirs, finetune, tmp_path):
    tuned = finetune(open_input(str(theirs / "bert"), tmp_path / "root", "model"), epochs=1)
    with pytest.raises(ArtifactError, match="wanted a language model, found a classifier"):
        finetune(tuned, "again")


def test_what_is_known_only_when_it_is_read_is_refused_then(theirs, finetune, tmp_path):
    with pytest.raises(ConfigError, match="finetune.seq_len: 100 is longer than the model's max_seq_len of 64"):
        finetune(open_input(str(theirs / "gpt2"), tmp_path / "root", "model"), seq_len=100)
