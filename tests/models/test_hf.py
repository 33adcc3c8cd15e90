import json

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from pipeline.errors import ArtifactError, ConfigError
from pipeline.models.config import Decoder
from pipeline.models.hf import export_hf, import_hf
from pipeline.models.transformer import Transformer, init_weights

VOCAB_SIZE = 270  # 256 bytes and more; 320 rows with padding
SMALL = {"vocab_size": VOCAB_SIZE, "d_model": 32, "num_layers": 2, "num_heads": 4, "max_seq_len": 32}
GPT2 = {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "bias": True, "dropout": 0.25}
VARIANTS = [
    {},
    {"num_kv_heads": 2, "tie_embeddings": False, "bias": True, "rope_theta": 500.0, "norm_eps": 1e-3, "d_ff": 40},
    GPT2,
    GPT2 | {"d_ff": 40, "norm_eps": 1e-3},
]
# Logits of size one, through a handful of layers whose sums the two implementations do in another order, in fp32.
PARITY = 1e-5


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|end|>", "<|pad|>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat and the hat, then the other cat"] * 3, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def make(**changes):
    """Return a model all of whose weights matter: norms that are not one, biases that are not zero."""
    model = Transformer(Decoder(**(SMALL | changes)))
    init_weights(model, 0)
    torch.manual_seed(0)
    randomize(model)
    return model.eval()


@torch.no_grad()
def randomize(model):
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))


def random_ids():
    return torch.randint(VOCAB_SIZE, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("changes", VARIANTS)
@torch.no_grad()
def test_a_model_goes_out_and_comes_back(tmp_path, tokenizer_file, changes):
    model = make(**changes)
    assert export_hf(model, tokenizer_file, tmp_path, random_ids(), eos_id=0, pad_id=1) < PARITY
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    assert theirs.config.vocab_size == VOCAB_SIZE
    assert (theirs.generation_config.eos_token_id, theirs.generation_config.pad_token_id) == (0, 1)
    assert (theirs(random_ids()).logits - model(random_ids())).abs().max() < PARITY
    back = import_hf(tmp_path)
    assert torch.equal(back(random_ids()), model(random_ids()))
    explicit = model.config.model_copy(update={"num_kv_heads": model.config.kv_heads, "d_ff": model.config.ff})
    assert back.config in (explicit, explicit.model_copy(update={"num_kv_heads": None}))
    assert all(weight.is_contiguous() for weight in back.state_dict().values())


def test_the_tokenizer_goes_out_as_it_is(tmp_path, tokenizer_file):
    export_hf(make(), tokenizer_file, tmp_path, random_ids(), eos_id=0)
    assert (tmp_path / "tokenizer.json").read_bytes() == tokenizer_file.read_bytes()
    theirs, ours = (
        AutoTokenizer.from_pretrained(tmp_path, local_files_only=True),
        Tokenizer.from_file(str(tokenizer_file)),
    )
    text = "  The  cat,\nthen ü 猫 .<|end|>x"
    assert theirs(text)["input_ids"] == ours.encode(text).ids
    assert theirs.decode(theirs(text)["input_ids"]) == text
    assert (theirs.eos_token, theirs.eos_token_id, theirs.pad_token_id) == ("<|end|>", 0, None)
    assert theirs.model_max_length == 32


def test_a_model_goes_out_in_its_precision(tmp_path, tokenizer_file):
    model = make().bfloat16()
    assert export_hf(model, tokenizer_file, tmp_path, random_ids(), eos_id=0) < PARITY
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    back = import_hf(tmp_path)
    assert back.embedding.weight.dtype == torch.bfloat16
    assert torch.equal(back.embedding.weight[:VOCAB_SIZE], model.embedding.weight[:VOCAB_SIZE])
    assert back.embedding.weight[VOCAB_SIZE:].eq(0).all()


LLAMA = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rope_parameters": {"rope_type": "default", "rope_theta": 777.0},
}
THEIR_GPT2 = {"vocab_size": VOCAB_SIZE, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}


def save_theirs(model, directory):
    torch.manual_seed(0)
    randomize(model)
    model.save_pretrained(directory)
    return model.eval()


@pytest.mark.parametrize(
    "model_of",
    [
        lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
        lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)),
        lambda: GPT2LMHeadModel(GPT2Config(**THEIR_GPT2)),
        lambda: GPT2LMHeadModel(GPT2Config(**THEIR_GPT2, n_inner=40, tie_word_embeddings=False)),
    ],
)
@torch.no_grad()
def test_their_models_come_in(tmp_path, model_of):
    theirs = save_theirs(model_of(), tmp_path)
    ours = import_hf(tmp_path)
    assert (ours(random_ids()) - theirs(random_ids()).logits).abs().max() < PARITY
    assert ours.config.num_params() == sum(p.numel() for p in ours.parameters())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LlamaConfig(**(LLAMA | {"hidden_act": "relu"})), r"config\.json: hidden_act: wanted silu, found relu"),
        (LlamaConfig(**LLAMA, head_dim=16), "head_dim: wanted 8, found 16"),
        (LlamaConfig(**LLAMA, mlp_bias=True), "mlp_bias: wanted False, found True"),
        (
            LlamaConfig(**(LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}})),
            r"rope_parameters\.rope_type: wanted default, found linear",
        ),
        (GPT2Config(**THEIR_GPT2, activation_function="relu"), "activation_function: wanted gelu_new, found relu"),
        (GPT2Config(**THEIR_GPT2, scale_attn_weights=False), "scale_attn_weights: wanted True, found False"),
        (GPT2Config(**THEIR_GPT2, attn_pdrop=0.3), "attn_pdrop: wanted 0.1, found 0.3"),
    ],
)
def test_models_that_ours_cannot_be_are_refused_by_name(tmp_path, config, message):
    save_theirs(AutoModelForCausalLM.from_config(config), tmp_path)
    with pytest.raises(ArtifactError, match=message):
        import_hf(tmp_path)


def test_a_model_of_another_kind_is_refused(tmp_path):
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
    OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=16)).save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match="model_type: wanted llama or gpt2, found opt"):
        import_hf(tmp_path)


def test_an_incomplete_directory_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="transformers cannot load it: "):
        import_hf(tmp_path)
    model = GPT2LMHeadModel(GPT2Config(**THEIR_GPT2))
    weights = {k: v for k, v in model.state_dict().items() if "ln_f" not in k and k != "lm_head.weight"}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ArtifactError, match=r"model\.safetensors: missing keys: \['transformer\.ln_f\.bias'"):
        import_hf(tmp_path)


def test_what_cannot_go_out_is_refused(tmp_path, tokenizer_file):
    with pytest.raises(ConfigError, match="no Hugging Face layout computes this model"):
        export_hf(make(norm="layernorm"), tokenizer_file, tmp_path, random_ids())
    with pytest.raises(ArtifactError, match=r"has the id 269, but the model's vocab_size is 100"):
        export_hf(make(vocab_size=100), tokenizer_file, tmp_path, random_ids())
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: has no eos_id 270, pad_id 300"):
        export_hf(make(), tokenizer_file, tmp_path, random_ids(), eos_id=270, pad_id=300)
    with pytest.raises(ArtifactError, match=r"none\.json: no such file; wanted a tokenizer"):
        export_hf(make(), tmp_path / "none.json", tmp_path, random_ids())
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"other\.json: not a tokenizer in Hugging Face's format"):
        export_hf(make(), tmp_path / "other.json", tmp_path, random_ids())
