import json
from pathlib import Path

import pytest
import transformers
import yaml

from pipeline.models.config import AnyModel, Decoder, Encoder, EncoderDecoder
from pipeline.models.hf.classes import LAYOUTS, hf_layout, unexportable
from pipeline.models.hf.config import read_hf_config
from pipeline.models.hf.layout import PLAIN
from pipeline.models.parts import ExpertChoice, Experts, Hash, TokenChoice
from pipeline.models.weights import weights
from pipeline.settings import Settings, decode

CONF = Path(__file__).parents[2] / "conf" / "model"
GPT2 = {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "bias": True}
BERT = GPT2 | {"norm_placement": "post", "embedding_norm": True, "token_types": 2}
NO_LAYOUT = {"moe_6m", "transformer_base"}  # DeepSeek's experts, and the original Transformer
# Settings that change nothing that a layout would have to compute, or that weights take up on export.
OF_TRAINING_OR_WEIGHTS = {
    "vocab_multiple",
    "dropout",
    "init_std",
    "mup_base_width",
    "predict_ahead",
    "attention_scale",
    "embedding_scale",
    "logit_scale",
    "experts.balance_loss",
    "experts.router_z_loss",
    "experts.count",
    "experts.d_ff",
}
# Settings that only other families or other settings give a meaning.
OF_OTHERS = {"relative_buckets", "relative_max_distance", "dense_layers", "decoder_start_id"}


class Model(Settings):
    model: AnyModel


def conf_models():
    return sorted(path.stem for path in CONF.glob("*.yaml"))


def read_conf(name):
    return decode(Model, {"model": yaml.safe_load((CONF / f"{name}.yaml").read_text())}).model


def test_layouts_are_found():
    assert hf_layout(Decoder(num_kv_heads=2, bias=True, tie_embeddings=False)) == "LlamaForCausalLM"
    assert hf_layout(Decoder(**GPT2)) == "GPT2LMHeadModel"
    assert hf_layout(Encoder(**BERT)) == "BertForMaskedLM"
    assert hf_layout(Encoder(**BERT, pooler=True)) == "BertForPreTraining"
    assert unexportable(Encoder(**BERT)) is None
    assert hf_layout(Decoder(experts=Experts(count=4))) == "MixtralForCausalLM"
    assert hf_layout(Decoder(experts=Experts(count=4), qk_norm=True)) == "Qwen3MoeForCausalLM"
    assert hf_layout(Decoder(num_kv_heads=4, head_width=64, sliding_window=4)) == "MistralForCausalLM"


@pytest.mark.parametrize("name", conf_models())
def test_every_model_of_conf_has_a_layout_but_for_those_that_are_known(name):
    assert (unexportable(read_conf(name)) is not None) == (name in NO_LAYOUT)


@pytest.mark.parametrize("name", sorted(set(conf_models()) - NO_LAYOUT))
def test_every_weight_has_its_place(name):
    config = read_conf(name)
    config = config.model_copy(update={"vocab_size": config.vocab_size or 1000})
    (layout,) = (layout for layout in LAYOUTS if layout.architecture == hf_layout(config))
    for fused in (False, True):
        placed = [ours for pair in layout.pairs(config, fused) for ours in pair.ours]
        assert sorted(placed) == sorted(weight.name for weight in weights(config))
        theirs = [name for pair in layout.pairs(config, fused) for name in pair.theirs]
        assert len(theirs) == len(set(theirs))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            Decoder(norm="layernorm"),
            "LlamaForCausalLM would need norm=rmsnorm; "
            "GPT2LMHeadModel would need bias=true, mlp=gelu or gelu_exact or relu, positions=learned",
        ),
        (Decoder(**GPT2, num_kv_heads=2), "GPT2LMHeadModel would need num_kv_heads=null;"),
        (Decoder(logit_softcap=30.0), "LlamaForCausalLM would need logit_softcap=null"),
        (
            Decoder(sliding_window=8, global_every=2),
            "MistralForCausalLM would need global_every=null; Qwen",
        ),
        (Decoder(experts=Experts(count=4, shared=1)), "MixtralForCausalLM would need experts.shared=0"),
        (Decoder(experts=Experts(count=4, router=Hash())), "would need experts.router=token_choice"),
        (
            Decoder(experts=Experts(count=4, router=TokenChoice(scores="sigmoid", capacity_factor=1.5))),
            "would need experts.router.capacity_factor=null, experts.router.scores=softmax",
        ),
        (Decoder(experts=Experts(count=4), dense_layers=1), "MixtralForCausalLM would need dense_layers=0"),
        (Decoder(positions="relative"), "LlamaForCausalLM would need positions=rotary"),
        (Encoder(experts=Experts(count=4, router=ExpertChoice())), "experts=null"),
        (Encoder(**BERT, qk_norm=True), "BertForMaskedLM would need qk_norm=false"),
        (
            EncoderDecoder(positions="sinusoidal", norm_placement="post", mlp="relu", norm="layernorm", bias=True),
            "T5ForConditionalGeneration would need bias=false, norm=rmsnorm, norm_placement=pre, positions=relative",
        ),
    ],
)
def test_models_without_a_layout_are_told_what_the_nearest_need(config, message):
    assert hf_layout(config) is None
    assert message in unexportable(config)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.architecture)
def test_no_setting_is_forgotten(layout):
    """A setting that nobody thought of would go out as if it were not there."""
    family = {"decoder": Decoder, "encoder": Encoder, "encoder_decoder": EncoderDecoder}[layout.kind]
    known = {*layout.same, *PLAIN, *layout.computes, *OF_TRAINING_OR_WEIGHTS, *OF_OTHERS, "kind", "rope_theta"}
    assert set(family.model_fields) - known == set()
    if "experts" in layout.computes:
        inner = {f"experts.{name}" for name in Experts.model_fields}
        inner |= {f"experts.router.{name}" for name in TokenChoice.model_fields}
        said = {"experts.router.kind", "experts.router.top_k", "experts.router.renormalize"}
        assert inner - known - said == set()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.architecture)
def test_what_a_config_does_not_say_is_the_default_of_its_class(layout, tmp_path):
    short, full = tmp_path / "short", tmp_path / "full"
    getattr(transformers, layout.architecture).config_class().save_pretrained(full)
    short.mkdir()
    (short / "config.json").write_text("{}")
    for directory in (short, full):
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": [layout.architecture]}))
    assert read_hf_config(short) == read_hf_config(full)
