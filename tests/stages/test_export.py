"""The stage that exports: every family goes out checked, and what cannot go is refused before it is trained."""

import json

import pytest
import torch
import transformers

from pipeline.artifact import Made, Manifest, open_artifact, record_file, write_manifest
from pipeline.errors import ArtifactError
from pipeline.launch.local import Local
from pipeline.models.config import Decoder, Encoder, EncoderDecoder
from pipeline.models.initial import init_weights
from pipeline.models.parts import Experts
from pipeline.models.saved import load_model, save_model
from pipeline.models.transformer import Transformer
from pipeline.stages.export import Export
from pipeline.stages.finetune import Finetune
from pipeline.stages.pretrain import Pretrain
from pipeline.text.tokenizers import BYTE_CHARACTERS, NUM_BYTES, byte_level

MADE = Made(version="0", commit=None, python="3", host="here", time="2025-07-03T14:02:11Z", seconds=1.5, ranks=1)
END = NUM_BYTES
SHAPE = {
    "vocab_size": NUM_BYTES + 2,
    "d_model": 16,
    "num_layers": 2,
    "num_heads": 2,
    "max_seq_len": 24,
    "init_std": 0.3,
}
BERT = {"norm": "layernorm", "norm_placement": "post", "positions": "learned", "mlp": "gelu_exact", "bias": True}
MODELS = {
    "LlamaForCausalLM": Decoder(**SHAPE, predict_ahead=2),
    "MixtralForCausalLM": Decoder(**SHAPE, experts=Experts(count=3)),
    "BertForPreTraining": Encoder(**SHAPE, **BERT, embedding_norm=True, token_types=2, pooler=True),
    "T5ForConditionalGeneration": EncoderDecoder(**SHAPE, positions="relative"),
}


@pytest.fixture
def make(tmp_path):
    """Give a function that makes a model artifact with random weights, whose tokens are bytes."""

    def make_model(config):
        directory = tmp_path / "model"
        directory.mkdir()
        model = Transformer(config)
        init_weights(model, 0)
        tokenizer = byte_level({text: byte for byte, text in BYTE_CHARACTERS.items()}, [], split=False)
        tokenizer.extend(["<|endoftext|>", "[MASK]"], [])
        tokenizer.save(directory / "tokenizer.json")
        names = [*save_model(directory, model), "tokenizer.json"]
        manifest = Manifest(
            kind="model",
            name="model",
            fingerprint="0",
            stage={"kind": "pretrain"},
            inputs={},
            files={name: record_file(directory / name) for name in names},
            stats={"end_of_text_id": END, "vocab_size": SHAPE["vocab_size"]},
            made=MADE,
        )
        write_manifest(directory, manifest)
        return open_artifact(directory, "model")

    return make_model


@pytest.mark.parametrize(("architecture", "config"), MODELS.items(), ids=MODELS)
def test_every_family_goes_out(make, run_stage, tmp_path, capsys, architecture, config):
    source = make(config)
    export = run_stage(Export(model="@m"), {"model": source}, tmp_path / "out")
    assert export.stats["max_logit_difference"] < 1e-5
    assert export.stats["parameters"] == config.num_params()
    assert ("2 heads that predict further tokens are left out" in capsys.readouterr().out) == (
        architecture == "LlamaForCausalLM"
    )
    theirs = getattr(transformers, architecture).from_pretrained(export.path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(export.path)
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.mask_token) == (
        "<|endoftext|>",
        "<|endoftext|>",
        "[MASK]",
    )
    ids = torch.tensor([tokenizer("some bytes")["input_ids"]])
    more = {"decoder_input_ids": ids} if isinstance(config, EncoderDecoder) else {}
    with torch.no_grad():
        made = theirs(ids, **more)
        logits = made.prediction_logits if architecture == "BertForPreTraining" else made.logits
        ours = load_model(source.path)(ids, **{name.replace("input_", ""): tensor for name, tensor in more.items()})
    assert (logits - ours).abs().max() < 1e-5
    if isinstance(config, EncoderDecoder):
        assert json.loads((export.path / "generation_config.json").read_text())["decoder_start_token_id"] == END


def test_an_export_that_differs_is_not_made(make, run_stage, tmp_path):
    with pytest.raises(ArtifactError, match=r"logits differ from ours by \d.*, more than 1e-30; nothing was exported"):
        run_stage(
            Export(model="@m", max_logit_difference=1e-30), {"model": make(MODELS["LlamaForCausalLM"])}, tmp_path / "o"
        )
    assert not list((tmp_path / "o").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (Decoder(logit_softcap=30.0), "LlamaForCausalLM would need logit_softcap=null"),
        (EncoderDecoder(positions="sinusoidal"), "T5ForConditionalGeneration would need positions=relative"),
        (Encoder(), "ModernBertForMaskedLM would need embedding_norm=true, norm=layernorm"),
        (Decoder(), None),
        (None, None),
    ],
)
def test_what_no_layout_computes_is_refused_before_it_is_trained(model, problem):
    found = list(Export(model="@m").check({"model": Pretrain(tokens="@t", steps=1, model=model)}, Local()))
    assert found == [] if problem is None else [("model", found[0][1])] == found and problem in found[0][1]


def test_a_classifier_is_refused():
    found = list(Export(model="@m").check({"model": Finetune(model="@p", data="x.jsonl")}, Local()))
    assert found == [("model", "wanted a language model, but fine-tuning makes a classifier")]
