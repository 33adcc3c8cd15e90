import json

import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.errors import ArtifactError, ConfigError
from pipeline.models.config import Decoder, Encoder, EncoderDecoder
from pipeline.models.hf.classes import hf_layout
from pipeline.models.hf.export import export_hf
from pipeline.models.hf.load import import_hf
from pipeline.models.initial import init_weights
from pipeline.models.parts import Experts, LinearScaling, Llama3Scaling, TokenChoice, YarnScaling
from pipeline.models.transformer import Transformer

VOCAB_SIZE = 270  # 256 bytes and more; 320 rows with padding
SMALL = {"vocab_size": VOCAB_SIZE, "d_model": 32, "num_layers": 2, "num_heads": 4, "max_seq_len": 32}
GPT2 = {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "bias": True, "dropout": 0.25}
LLAMA3 = Llama3Scaling(factor=4.0, original_max_seq_len=8, high_freq_factor=2.0)
QWEN3 = {"qk_norm": True, "sliding_window": 5, "global_every": 2, "head_width": 12}
SIX = Experts(count=6, d_ff=24, router=TokenChoice(top_k=3, renormalize=False))
BERT = GPT2 | {"norm_placement": "post", "mlp": "gelu_exact", "embedding_norm": True, "token_types": 2, "pooler": True}
MODERN = {"norm": "layernorm", "mlp": "geglu_exact", "embedding_norm": True}
T5 = {"positions": "relative", "mlp": "geglu", "d_ff": 40}
DECODERS = [
    (Decoder, {}, "LlamaForCausalLM"),
    (
        Decoder,
        {"num_kv_heads": 2, "tie_embeddings": False, "bias": True, "rope_theta": 500.0, "norm_eps": 1e-3, "d_ff": 40},
        "LlamaForCausalLM",
    ),
    (Decoder, {"rope_scaling": LLAMA3, "head_width": 12}, "LlamaForCausalLM"),
    (Decoder, {"rope_scaling": YarnScaling(factor=2.0, original_max_seq_len=16), "mlp": "geglu"}, "LlamaForCausalLM"),
    (Decoder, GPT2, "GPT2LMHeadModel"),
    (Decoder, GPT2 | {"d_ff": 40, "norm_eps": 1e-3, "tie_embeddings": False, "mlp": "relu"}, "GPT2LMHeadModel"),
    (Decoder, {"sliding_window": 7, "num_kv_heads": 1}, "MistralForCausalLM"),
    (Decoder, QWEN3, "Qwen3ForCausalLM"),
    (Decoder, {"experts": Experts(count=4, d_ff=40), "sliding_window": 9}, "MixtralForCausalLM"),
    (Decoder, {"experts": SIX, "dense_layers": 1, "qk_norm": True, "sliding_window": 9}, "Qwen3MoeForCausalLM"),
]
OTHERS = [
    (Encoder, BERT, "BertForPreTraining"),
    (Encoder, BERT | {"token_types": 0, "pooler": False, "mlp": "relu"}, "BertForMaskedLM"),
    (Encoder, MODERN, "ModernBertForMaskedLM"),
    (
        Encoder,
        MODERN
        | {"sliding_window": 6, "global_every": 2, "local_rope_theta": 100.0, "tie_embeddings": False, "bias": True}
        | {"rope_scaling": LinearScaling(factor=2.0), "head_bias": False},
        "ModernBertForMaskedLM",
    ),
    (EncoderDecoder, T5, "T5ForConditionalGeneration"),
    (
        EncoderDecoder,
        T5 | {"attention_scale": 1.0, "mlp": "relu", "num_decoder_layers": 3, "logit_scale": 32**-0.5},
        "T5ForConditionalGeneration",
    ),
    (EncoderDecoder, T5 | {"tie_embeddings": False, "mlp": "geglu_exact"}, "T5ForConditionalGeneration"),
]
# Scales that no layout has: weights take them up.
SCALES = {"attention_scale": 0.3, "embedding_scale": 3.0, "logit_scale": 0.7, "mup_base_width": 16}
SCALED = [
    (Decoder, SCALES | {"tie_embeddings": True}, "LlamaForCausalLM"),
    (Decoder, SCALES | QWEN3 | {"tie_embeddings": False}, "Qwen3ForCausalLM"),
    (Decoder, SCALES | GPT2, "GPT2LMHeadModel"),
    (Encoder, SCALES | BERT, "BertForPreTraining"),
    (EncoderDecoder, SCALES | T5, "T5ForConditionalGeneration"),
    (EncoderDecoder, SCALES | T5 | {"logit_scale": 32**-0.5}, "T5ForConditionalGeneration"),
]
# Logits of size one, through a handful of layers whose sums the two implementations do in another order, in fp32.
PARITY = 1e-5
# T5 does not scale the scores of its attention, so that its softmax is steeper and rounding goes further.
T5_PARITY = 1e-4


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json", "<|end|>", "<|stuff|>")


def make_tokenizer(path, *special_tokens):
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=list(special_tokens), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the cat and the hat, then the other cat"] * 3, trainer)
    tokenizer.save(str(path))
    return path


def make(family=Decoder, **changes):
    """Return a model all of whose weights matter: norms that are not one, biases that are not zero."""
    model = Transformer(family(**(SMALL | changes)))
    init_weights(model, 0)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def random_ids():
    return torch.randint(VOCAB_SIZE, (2, 20), generator=torch.Generator().manual_seed(0))


def forward(model):
    more = {"decoder_ids": random_ids()[:, :9]} if model.config.kind == "encoder_decoder" else {}
    return model(random_ids(), **more)


def load_theirs(directory):
    """Return the model as its users load it, and whether a weight was missing or left over."""
    (architecture,) = json.loads((directory / "config.json").read_text())["architectures"]
    model_class = getattr(transformers, architecture)
    model, info = model_class.from_pretrained(directory, local_files_only=True, output_loading_info=True)
    return model.eval(), [key for kind, keys in info.items() if kind.endswith("_keys") for key in keys]


@pytest.mark.parametrize(("family", "changes", "architecture"), DECODERS + OTHERS + SCALED)
@torch.no_grad()
def test_a_model_goes_out_and_comes_back(tmp_path, tokenizer_file, family, changes, architecture):
    model = make(family, **changes)
    limit = T5_PARITY if family is EncoderDecoder else PARITY
    assert hf_layout(model.config) == architecture
    assert export_hf(model, tokenizer_file, tmp_path, random_ids(), eos_id=0, pad_id=1) < limit
    files = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    files |= set() if family is Encoder else {"generation_config.json"}
    assert {path.name for path in tmp_path.iterdir()} == files
    theirs, wrong = load_theirs(tmp_path)
    assert (type(theirs).__name__, wrong) == (architecture, [])
    assert theirs.config.vocab_size == VOCAB_SIZE
    back = import_hf(tmp_path)
    assert (forward(back) - forward(model)).abs().max() < limit
    assert all(weight.is_contiguous() for weight in back.state_dict().values())
    if not changes.keys() & SCALES.keys() and family is not EncoderDecoder and architecture != "BertForMaskedLM":
        assert torch.equal(forward(back), forward(model))
        assert back.config == as_it_comes_back(model.config, architecture)


def as_it_comes_back(config, architecture):
    """Return the settings with every width said."""
    config = config.model_copy(update={"d_ff": config.ff})
    if architecture != "MixtralForCausalLM":
        return config
    return config.model_copy(
        update={"d_ff": config.experts.d_ff, "experts": config.experts.model_copy(update={"d_ff": None})}
    )


def test_heads_that_predict_further_stay_here(tmp_path, tokenizer_file):
    model = make(predict_ahead=2)
    assert export_hf(model, tokenizer_file, tmp_path, random_ids(), eos_id=0) < PARITY
    assert load_theirs(tmp_path)[1] == []
    assert import_hf(tmp_path).config.predict_ahead == 0


def test_a_decoder_that_reads_an_encoder_starts_with_the_end_of_text(tmp_path, tokenizer_file):
    model = make(EncoderDecoder, **T5)
    export_hf(model, tokenizer_file, tmp_path, random_ids(), eos_id=1, bos_id=1, pad_id=0)
    theirs, _ = load_theirs(tmp_path)
    assert theirs.generation_config.decoder_start_token_id == theirs.config.decoder_start_token_id == 1
    made = theirs.generate(random_ids(), max_new_tokens=4, do_sample=False, eos_token_id=-1)
    ids = torch.full((2, 1), 1)
    for _ in range(4):
        ids = torch.cat([ids, model(random_ids(), decoder_ids=ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(made, ids)


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


def test_special_tokens_get_the_role_that_they_are_called(tmp_path):
    names = ["<|endoftext|>", "[CLS]", "[SEP]", "<|MASK|>", "<pad>", "<|im_start|>"]
    source = make_tokenizer(tmp_path / "source.json", *names)
    tokenizer = Tokenizer.from_file(str(source))
    tokenizer.add_tokens([AddedToken("<unk>", special=False)])  # an ordinary token has no role
    tokenizer.save(str(source))
    model = make(Encoder, **MODERN, vocab_size=VOCAB_SIZE + 1)
    out = tmp_path / "out"
    out.mkdir()
    export_hf(model, source, out, random_ids(), eos_id=0)
    theirs = AutoTokenizer.from_pretrained(out, local_files_only=True)
    found = (theirs.eos_token, theirs.cls_token, theirs.sep_token, theirs.mask_token, theirs.pad_token)
    assert found == ("<|endoftext|>", "[CLS]", "[SEP]", "<|MASK|>", "<pad>")
    assert theirs.unk_token is None
    config = json.loads((out / "config.json").read_text())
    ids = [config[f"{name}_token_id"] for name in ("eos", "cls", "sep", "pad", "bos")]
    assert ids == [0, 1, 2, 4, None]


def test_a_model_goes_out_in_its_precision(tmp_path, tokenizer_file):
    model = make().bfloat16()
    assert export_hf(model, tokenizer_file, tmp_path, random_ids(), eos_id=0) < PARITY
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True).dtype == torch.bfloat16
    back = import_hf(tmp_path)
    assert back.embedding.weight.dtype == torch.bfloat16
    assert torch.equal(back.embedding.weight[:VOCAB_SIZE], model.embedding.weight[:VOCAB_SIZE])
    assert back.embedding.weight[VOCAB_SIZE:].eq(0).all()


def test_stretched_positions_are_said_in_the_old_words_too(tmp_path, tokenizer_file):
    """A reader that does not know rope_parameters would leave the scaling out without a word."""
    export_hf(make(rope_scaling=LLAMA3), tokenizer_file, tmp_path, random_ids(), eos_id=0)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == 10000.0
    assert config["rope_scaling"] == config["rope_parameters"] == {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        "low_freq_factor": 1.0,
        "high_freq_factor": 2.0,
    }  # fmt: skip


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
