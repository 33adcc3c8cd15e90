import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MixtralConfig,
    MixtralForCausalLM,
    ModernBertConfig,
    OPTConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from pipeline.errors import ArtifactError
from pipeline.models.hf.config import read_hf_config
from pipeline.models.hf.load import import_hf

VOCAB = 70
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
GPT2 = {"vocab_size": VOCAB, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
EXPERTS = {"num_experts_per_tok": 2, "num_experts": 3, "moe_intermediate_size": 24, "num_key_value_heads": 2}
T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 12, "d_ff": 48, "num_layers": 2, "num_heads": 4}
ONES = {f"{name}_token_id": 1 for name in ("pad", "bos", "eos", "cls", "sep")}


def rope(kind, **details):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **details}}


def write_config(config, directory, architecture, **changes):
    config.save_pretrained(directory)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": [architecture]} | changes))


def save_theirs(model, directory):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return model.eval()


def make_llama(directory, **settings):
    return save_theirs(LlamaForCausalLM(LlamaConfig(**(SIZES | settings))), directory)


def random_ids():
    return torch.randint(VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def assert_equal(theirs, ours):
    assert (ours(random_ids()) - theirs(random_ids()).logits).abs().max() < 1e-5


def rename(directory, change):
    """Write the weights anew: `change` gets and gives a dict of tensors."""
    path = directory / "model.safetensors"
    save_file({name: tensor.clone() for name, tensor in change(load_file(path)).items()}, path)


@pytest.mark.parametrize(
    ("config", "architecture", "message"),
    [
        (
            LlamaConfig(**SIZES, hidden_act="relu"),
            "LlamaForCausalLM",
            "hidden_act: wanted silu or .*found relu",
        ),
        (LlamaConfig(**SIZES, mlp_bias=True), "LlamaForCausalLM", "mlp_bias: wanted False, found True"),
        (
            LlamaConfig(**SIZES, **rope("dynamic", factor=2.0)),
            "LlamaForCausalLM",
            r"rope_parameters\.rope_type: wanted default, linear, llama3 or yarn, found dynamic",
        ),
        (
            LlamaConfig(**SIZES, **rope("yarn", factor=2.0, original_max_position_embeddings=16, attention_factor=1.5)),
            "LlamaForCausalLM",
            r"rope_parameters\.attention_factor: wanted none, found 1\.5",
        ),
        (
            LlamaConfig(**SIZES, **rope("yarn", factor=2.0, original_max_position_embeddings=16, truncate=False)),
            "LlamaForCausalLM",
            r"rope_parameters\.truncate: wanted True, found False",
        ),
        (
            LlamaConfig(**SIZES, **rope("default", partial_rotary_factor=0.5)),
            "LlamaForCausalLM",
            r"rope_parameters\.partial_rotary_factor: wanted 1\.0, found 0\.5",
        ),
        (GPT2Config(**GPT2, activation_function="silu"), "GPT2LMHeadModel", "activation_function: wanted gelu_new or"),
        (
            GPT2Config(**GPT2, scale_attn_weights=False),
            "GPT2LMHeadModel",
            "scale_attn_weights: wanted True, found False",
        ),
        (
            GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True),
            "GPT2LMHeadModel",
            "scale_attn_by_inverse_layer_idx: wanted False, found True",
        ),
        (MistralConfig(**SIZES, hidden_act="tanh"), "MistralForCausalLM", "hidden_act: wanted silu"),
        (Qwen3Config(**SIZES, attention_bias=True), "Qwen3ForCausalLM", "attention_bias: wanted False, found True"),
        (
            Qwen3Config(**SIZES, use_sliding_window=True, layer_types=["sliding_attention", "full_attention"]),
            "Qwen3ForCausalLM",
            r"layer_types: wanted sliding_attention in all layers, or in all but 0, n, 2n, …, found",
        ),
        (MixtralConfig(**SIZES, router_jitter_noise=0.1), "MixtralForCausalLM", r"router_jitter_noise: wanted 0\.0"),
        (
            Qwen3MoeConfig(**SIZES, **EXPERTS, decoder_sparse_step=2),
            "Qwen3MoeForCausalLM",
            "decoder_sparse_step: wanted 1, found 2",
        ),
        (
            Qwen3MoeConfig(**SIZES, **EXPERTS, mlp_only_layers=[1]),
            "Qwen3MoeForCausalLM",
            r"mlp_only_layers: wanted the first layers, found \[1\]",
        ),
        (BertConfig(**SIZES, is_decoder=True), "BertForMaskedLM", "is_decoder: wanted False, found True"),
        (BertConfig(**SIZES, tie_word_embeddings=False), "BertForMaskedLM", "tie_word_embeddings: wanted True"),
        (BertConfig(**SIZES, hidden_act="silu"), "BertForPreTraining", "hidden_act: wanted gelu_new"),
        (
            ModernBertConfig(**SIZES, **ONES, norm_bias=True),
            "ModernBertForMaskedLM",
            "norm_bias: wanted False, found True",
        ),
        (
            ModernBertConfig(**SIZES, **ONES, classifier_activation="silu"),
            "ModernBertForMaskedLM",
            "classifier_activation: wanted gelu, found silu",
        ),
        (
            T5Config(**T5, feed_forward_proj="gated-relu"),
            "T5ForConditionalGeneration",
            "feed_forward_proj: wanted silu",
        ),
        (
            T5Config(**T5, relative_attention_num_buckets=6),
            "T5ForConditionalGeneration",
            "in our settings: relative_buckets: .* multiple of 4",
        ),
        (
            OPTConfig(hidden_size=16),
            "OPTForCausalLM",
            "architectures: wanted one of LlamaForCausalLM, .*T5ForConditionalGeneration; found OPTForCausalLM",
        ),
        (BertConfig(**SIZES), "BertModel", "architectures: wanted one of .*; found BertModel"),
    ],
)
def test_models_that_ours_cannot_be_are_refused_by_name(tmp_path, config, architecture, message):
    write_config(config, tmp_path, architecture)
    with pytest.raises(ArtifactError, match=r"config\.json: " + message):
        read_hf_config(tmp_path)


def test_weights_of_few_bits_are_refused(tmp_path):
    write_config(
        LlamaConfig(**SIZES), tmp_path, "LlamaForCausalLM", quantization_config={"quant_method": "gptq", "bits": 4}
    )
    with pytest.raises(ArtifactError, match="quantization_config: wanted none, found gptq"):
        read_hf_config(tmp_path)


def test_positions_that_bert_can_be_told_to_have_are_refused(tmp_path):
    write_config(BertConfig(**SIZES), tmp_path, "BertForMaskedLM", position_embedding_type="relative_key")
    with pytest.raises(ArtifactError, match="position_embedding_type: wanted absolute, found relative_key"):
        read_hf_config(tmp_path)


def test_all_problems_are_named_at_once(tmp_path):
    write_config(GPT2Config(**GPT2, activation_function="silu", scale_attn_weights=False), tmp_path, "GPT2LMHeadModel")
    with pytest.raises(ArtifactError) as error:
        read_hf_config(tmp_path)
    assert len(str(error.value).splitlines()) == 2


def test_settings_are_read_without_weights_and_without_torch(tmp_path):
    write_config(LlamaConfig(**SIZES, num_key_value_heads=2), tmp_path, "LlamaForCausalLM")
    code = (
        "import sys; from pathlib import Path; from pipeline.models.hf.config import read_hf_config;"
        "import pipeline.models.hf.classes;"
        f"print(read_hf_config(Path({str(tmp_path)!r})).num_kv_heads, {{'torch', 'transformers'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 set()"


def test_settings_in_the_words_of_older_versions(tmp_path):
    old = {name: value for name, value in LlamaConfig(**SIZES).to_dict().items() if name != "rope_parameters"}
    scaling = {"type": "linear", "factor": 2.0}
    old |= {"rope_theta": 500.0, "rope_scaling": scaling, "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(old))
    config = read_hf_config(tmp_path)
    assert (config.rope_theta, config.rope_scaling.kind, config.rope_scaling.factor) == (500.0, "linear", 2.0)
    modern = SIZES | {"architectures": ["ModernBertForMaskedLM"], "num_hidden_layers": 5}
    modern |= {"global_attn_every_n_layers": 2, "global_rope_theta": 300.0, "local_rope_theta": 30.0}
    (tmp_path / "config.json").write_text(json.dumps(modern))
    config = read_hf_config(tmp_path)
    assert (config.sliding_window, config.global_every) == (128, 2)
    assert (config.rope_theta, config.local_rope_theta) == (300.0, 30.0)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"} | GPT2))  # names no class
    assert read_hf_config(tmp_path).positions == "learned"


def test_t5s_versions_are_told_apart(tmp_path):
    first = read_after(tmp_path, {})
    assert (first.logit_scale, first.tie_embeddings, first.mlp) == (32**-0.5, True, "relu")
    second = read_after(tmp_path, {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"})
    assert (second.logit_scale, second.tie_embeddings, second.mlp) == (None, False, "geglu")
    saved_today = {"tie_word_embeddings": True, "scale_decoder_outputs": False}
    assert read_after(tmp_path, saved_today).logit_scale is None


@torch.no_grad()
def test_an_output_layer_of_t5_that_is_the_embedding_once_more(tmp_path):
    theirs = save_theirs(T5ForConditionalGeneration(T5Config(**T5)), tmp_path)
    rename(tmp_path, lambda weights: weights | {"lm_head.weight": weights["shared.weight"]})
    ours = import_hf(tmp_path)
    assert ours.config.tie_embeddings
    wanted = theirs(random_ids(), decoder_input_ids=random_ids()).logits
    assert (ours(random_ids(), decoder_ids=random_ids()) - wanted).abs().max() < 1e-4


def read_after(directory, settings):
    (directory / "config.json").write_text(
        json.dumps({"architectures": ["T5ForConditionalGeneration"]} | T5 | settings)
    )
    return read_hf_config(directory)


def test_weights_in_several_files(tmp_path):
    theirs = make_llama(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 2
    assert_equal(theirs, import_hf(tmp_path / "many"))
    next((tmp_path / "many").glob("model-00002*")).unlink()
    with pytest.raises(ArtifactError, match=r"index\.json: names model-00002-.*, which is not there; copy the model"):
        import_hf(tmp_path / "many")
    (tmp_path / "many" / "model.safetensors.index.json").write_text('{"metadata": {}}')
    with pytest.raises(ArtifactError, match=r"not an index of weights \(KeyError"):
        import_hf(tmp_path / "many")


def test_the_names_of_old_files(tmp_path):
    theirs = save_theirs(GPT2LMHeadModel(GPT2Config(**GPT2)), tmp_path)
    bias = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 32, 32) for layer in range(2)}
    rename(tmp_path, lambda weights: {k.removeprefix("transformer."): v for k, v in (weights | bias).items()})
    assert_equal(theirs, import_hf(tmp_path))


def test_berts_first_names(tmp_path):
    from transformers import BertForMaskedLM, BertForPreTraining

    theirs = save_theirs(BertForPreTraining(BertConfig(**SIZES)), tmp_path)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def named(name):
        for new, was in old.items():
            name = name.replace(new, was)
        return name

    rename(tmp_path, lambda weights: {named(name): tensor for name, tensor in weights.items()})
    ours = import_hf(tmp_path)
    with torch.no_grad():
        assert (ours(random_ids()) - theirs(random_ids()).prediction_logits).abs().max() < 1e-5
    write_config(BertConfig(**SIZES), tmp_path, "BertForMaskedLM")  # as the best known of them says
    ours, theirs = import_hf(tmp_path), BertForMaskedLM.from_pretrained(tmp_path)
    assert not ours.config.pooler
    assert_equal(theirs.eval(), ours)


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (MixtralForCausalLM, MixtralConfig(**SIZES, num_local_experts=3, num_key_value_heads=2)),
        (Qwen3MoeForCausalLM, Qwen3MoeConfig(**SIZES, **EXPERTS)),
    ],
)
def test_experts_in_one_tensor(tmp_path, model_class, config):
    theirs = save_theirs(model_class(config), tmp_path)
    theirs.save_pretrained(tmp_path, save_original_format=False)
    assert any(name.endswith("gate_up_proj") for name in load_file(tmp_path / "model.safetensors"))
    assert_equal(theirs, import_hf(tmp_path))


def test_copies_of_tied_weights(tmp_path):
    theirs = make_llama(tmp_path, tie_word_embeddings=True)
    rename(tmp_path, lambda weights: weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    assert_equal(theirs, import_hf(tmp_path))
    rename(tmp_path, lambda weights: weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 1})
    with pytest.raises(ArtifactError, match=r"'lm_head\.weight' is not the same as 'model\.embed_tokens\.weight'"):
        import_hf(tmp_path)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    make_llama(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    path = tmp_path / "model.safetensors"
    save_file(weights | {"model.layers.0.extra.weight": torch.ones(2)}, path)
    with pytest.raises(ArtifactError, match=r"unknown weight 'model\.layers\.0\.extra\.weight'"):
        import_hf(tmp_path)
    save_file({name: tensor for name, tensor in weights.items() if name != "model.norm.weight"}, path)
    with pytest.raises(ArtifactError, match=r"no weight 'model\.norm\.weight', which LlamaForCausalLM needs"):
        import_hf(tmp_path)
    save_file(weights | {"lm_head.weight": torch.ones(VOCAB + 1, 32)}, path)
    with pytest.raises(ArtifactError, match=r"'lm_head\.weight': wanted shape \(70, 32\), found \(71, 32\)"):
        import_hf(tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match=r"model\.safetensors: damaged"):
        import_hf(tmp_path)


def test_incomplete_directories_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"no config\.json; wanted a model in Hugging Face's layout"):
        import_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"config\.json: not JSON"):
        import_hf(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ArtifactError, match="wanted a JSON object, found list"):
        import_hf(tmp_path)
    write_config(LlamaConfig(**SIZES), tmp_path, "LlamaForCausalLM")
    with pytest.raises(ArtifactError, match=r"no model\.safetensors"):
        import_hf(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"a pickle, which can run any code when it is read; load it with transf"):
        import_hf(tmp_path)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("LlamaForCausalLM", {"architectures": 5}),
        ("LlamaForCausalLM", {"hidden_act": []}),
        ("LlamaForCausalLM", {"num_attention_heads": None, "head_dim": {}}),
        ("LlamaForCausalLM", {"hidden_size": 10**30}),
        ("LlamaForCausalLM", {"num_hidden_layers": 10**9}),
        ("LlamaForCausalLM", {"quantization_config": -1}),
        ("T5ForConditionalGeneration", {"d_model": -1}),
        ("T5ForConditionalGeneration", {"d_model": 0}),
        ("T5ForConditionalGeneration", {"feed_forward_proj": None}),
    ],
)
def test_settings_of_another_type_are_one_line(tmp_path, architecture, changes):
    write_config(
        T5Config() if architecture.startswith("T5") else LlamaConfig(**SIZES), tmp_path, architecture, **changes
    )
    with pytest.raises(ArtifactError, match=r"config\.json: "):
        read_hf_config(tmp_path)


def test_files_that_nest_or_lie_are_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("[" * 100_000)
    with pytest.raises(ArtifactError, match=r"config\.json: not JSON"):
        read_hf_config(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ArtifactError, match=r"config\.json: cannot be read"):
        read_hf_config(tmp_path)
    path.rmdir()
    make_llama(tmp_path)
    for header in (b'{"a": 5}', b'{"a": {"data_offsets": ["x", "y"]}}', b"[" * 100_000):
        (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(ArtifactError, match="damaged, or not in safetensors' format"):
            import_hf(tmp_path)


def test_weights_that_are_whole_numbers_are_refused(tmp_path):
    make_llama(tmp_path)
    rename(
        tmp_path, lambda weights: weights | {"model.embed_tokens.weight": weights["model.embed_tokens.weight"].long()}
    )
    with pytest.raises(ArtifactError, match=r"'embedding\.weight': wanted numbers with a fraction, found torch.int64"):
        import_hf(tmp_path)


def test_weights_come_in_one_precision(tmp_path):
    theirs = LlamaForCausalLM(LlamaConfig(**SIZES)).bfloat16()
    theirs.save_pretrained(tmp_path)
    rename(tmp_path, lambda weights: weights | {"model.norm.weight": weights["model.norm.weight"].float()})
    ours = import_hf(tmp_path)
    assert {weight.dtype for weight in ours.state_dict().values()} == {torch.bfloat16}
    assert not ours.training
