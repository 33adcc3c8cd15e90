"""transformers' classes beside ours: the same weights give the same logits and the same gradients, both ways."""

import json

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.nn.functional import cross_entropy

from pipeline.models.config import Encoder, EncoderDecoder
from pipeline.models.hf.classes import LAYOUTS, layout_of
from pipeline.models.hf.config import read_hf_config
from pipeline.models.hf.export import export_hf
from pipeline.models.hf.load import ROWS_OF_IDS, import_hf

VOCAB = 70
T, U = 24, 11  # positions of a row, and of what an encoder-decoder's decoder reads
# Logits of size one, through a handful of layers whose sums the two implementations do in another order, in fp32.
PARITY = {"decoder": 1e-5, "encoder": 1e-5, "encoder_decoder": 1e-4}
GRADIENT_PARITY = 1e-4  # of the norm of a weight's gradient
# What a softmax does not see (a bias of the keys, the score of an only expert) has a gradient of zero but for rounding;
# so much of the largest gradient's norm is zero.
ZERO_GRADIENT = 1e-7

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
LLAMA = SIZES | {"num_key_value_heads": 2}
SCALED = {"original_max_position_embeddings": 16, "rope_theta": 500.0, "factor": 4.0}
LLAMA3 = SCALED | {"rope_type": "llama3", "low_freq_factor": 1.5, "high_freq_factor": 3.0}
YARN = SCALED | {"rope_type": "yarn", "beta_fast": 2.0, "beta_slow": 0.5}
EXPERTS = {"num_experts_per_tok": 2, "num_experts": 5, "moe_intermediate_size": 24}
GPT2 = {"vocab_size": VOCAB, "n_positions": 32, "n_embd": 32, "n_layer": 3, "n_head": 4}
BERT = SIZES | {"pad_token_id": None}
SPECIAL = {f"{name}_token_id": 1 for name in ("bos", "eos", "cls", "sep")}
MODERN = SIZES | SPECIAL | {"pad_token_id": None, "num_hidden_layers": 4, "local_attention": 8}
TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 900.0, "factor": 2.0},
    "sliding_attention": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0},
}
TWO_YARNS = {
    "full_attention": YARN | {"rope_theta": 900.0},
    "sliding_attention": YARN | {"rope_theta": 100.0},
}
T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 12, "d_ff": 48, "num_layers": 2, "num_heads": 4, "pad_token_id": 0}
CASES = [
    ("GPT2LMHeadModel", GPT2),
    ("GPT2LMHeadModel", GPT2 | {"n_inner": 40, "activation_function": "gelu", "tie_word_embeddings": False}),
    ("GPT2LMHeadModel", GPT2 | {"activation_function": "relu", "layer_norm_epsilon": 1e-3}),
    ("LlamaForCausalLM", LLAMA | {"rms_norm_eps": 1e-3, "rope_parameters": {"rope_type": "default", "rope_theta": 77}}),
    ("LlamaForCausalLM", LLAMA | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("LlamaForCausalLM", LLAMA | {"head_dim": 16, "hidden_act": "gelu_pytorch_tanh"}),
    ("LlamaForCausalLM", LLAMA | {"hidden_act": "gelu", "rope_parameters": SCALED | {"rope_type": "linear"}}),
    ("LlamaForCausalLM", LLAMA | {"rope_parameters": LLAMA3}),
    ("LlamaForCausalLM", LLAMA | {"rope_parameters": YARN}),
    ("MistralForCausalLM", LLAMA | {"sliding_window": 5}),
    ("MistralForCausalLM", LLAMA | {"sliding_window": None, "head_dim": 12, "tie_word_embeddings": True}),
    ("Qwen3ForCausalLM", LLAMA | {"head_dim": 16}),
    ("Qwen3ForCausalLM", LLAMA | {"head_dim": 8, "tie_word_embeddings": True, "rope_parameters": YARN}),
    ("Qwen3ForCausalLM", LLAMA | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0}),
    ("Qwen3ForCausalLM", LLAMA | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    ("MixtralForCausalLM", LLAMA | {"num_local_experts": 5, "num_experts_per_tok": 2}),
    ("MixtralForCausalLM", LLAMA | {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 5}),
    ("Qwen3MoeForCausalLM", LLAMA | EXPERTS),
    ("Qwen3MoeForCausalLM", LLAMA | EXPERTS | {"norm_topk_prob": True, "mlp_only_layers": [0], "head_dim": 16}),
    ("Qwen3MoeForCausalLM", LLAMA | EXPERTS | {"use_sliding_window": True, "sliding_window": 5}),
    ("BertForPreTraining", BERT),
    ("BertForPreTraining", BERT | {"hidden_act": "gelu_new", "type_vocab_size": 3, "layer_norm_eps": 1e-3}),
    ("BertForMaskedLM", BERT | {"hidden_act": "relu"}),
    ("ModernBertForMaskedLM", MODERN),
    ("ModernBertForMaskedLM", MODERN | {"layer_types": ["sliding_attention"] * 4, "decoder_bias": False}),
    (
        "ModernBertForMaskedLM",
        MODERN
        | dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"), True)
        | {"tie_word_embeddings": False, "rope_parameters": TWO_ROPES},
    ),
    ("ModernBertForMaskedLM", MODERN | {"num_hidden_layers": 1}),
    ("ModernBertForMaskedLM", MODERN | {"global_attn_every_n_layers": 2, "rope_parameters": TWO_YARNS}),
    ("T5ForConditionalGeneration", T5),
    (
        "T5ForConditionalGeneration",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 3},
    ),
    (
        "T5ForConditionalGeneration",
        T5 | {"feed_forward_proj": "gated-silu", "relative_attention_num_buckets": 8}
        | {"relative_attention_max_distance": 12},
    ),
]  # fmt: skip
CLASSES = [
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "Qwen3ForCausalLM",
    "MixtralForCausalLM",
    "Qwen3MoeForCausalLM",
    "BertForPreTraining",
    "BertForMaskedLM",
    "ModernBertForMaskedLM",
    "T5ForConditionalGeneration",
]


def make_theirs(architecture, settings):
    """Return a model of theirs in which every weight matters: theirs begin near zero, with norms of one."""
    model_class = getattr(transformers, architecture)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**settings))
    if architecture.startswith("T5") and settings.get("tie_word_embeddings") is False:
        model.lm_head.weight = torch.nn.Parameter(torch.empty(VOCAB, 32))  # their constructor ties it all the same
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 and not name.endswith("bias") else 0.0, 0.2)
    return model.eval()


def make_inputs(config, seed=0):
    """Return ids, and the other tensors of a pass by our names; no id is 0, which BERT gives no gradient."""
    chance = torch.Generator().manual_seed(seed)
    more = {}
    if isinstance(config, Encoder) and config.token_types:
        more["token_types"] = torch.randint(config.token_types, (2, T), generator=chance)
    if isinstance(config, EncoderDecoder):
        more["decoder_ids"] = torch.randint(1, VOCAB, (2, U), generator=chance)
    return torch.randint(1, VOCAB, (2, T), generator=chance), more


def run_theirs(model, ids, token_types=None, decoder_ids=None, mask=None):
    """Return their logits, and those of the sentence or null."""
    names = {"token_type_ids": token_types, "decoder_input_ids": decoder_ids, "attention_mask": mask}
    made = model(ids, **{name: tensor for name, tensor in names.items() if tensor is not None})
    if hasattr(made, "prediction_logits"):
        return made.prediction_logits, made.seq_relationship_logits
    return made.logits, None


def sentence_logits(model, ids, token_types, documents=None):
    return model.sentence_logits(model.encode(ids, documents, token_types)[0])


def difference(a, b):
    return (a - b).abs().max().item()


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    Tokenizer(WordLevel({"<|unk|>": 0, "<|endoftext|>": 1, "word": 2}, unk_token="<|unk|>")).save(str(path))
    return path


@pytest.fixture(params=CASES, ids=lambda case: case[0])
def pair(request, tmp_path):
    """Their model and ours, made of its files."""
    theirs = make_theirs(*request.param)
    theirs.save_pretrained(tmp_path)
    return theirs, import_hf(tmp_path)


def test_every_class_that_is_promised_has_cases():
    assert {case[0] for case in CASES} == {layout.architecture for layout in LAYOUTS} >= set(CLASSES)


@torch.no_grad()
def test_logits_are_equal(pair):
    theirs, ours = pair
    ids, more = make_inputs(ours.config)
    wanted, wanted_sentence = run_theirs(theirs, ids, **more)
    limit = PARITY[ours.config.kind]
    assert wanted.std() > 0.1, "logits near zero would prove nothing"
    assert difference(ours(ids, **more), wanted) < limit
    if wanted_sentence is not None:
        assert difference(sentence_logits(ours, ids, more["token_types"]), wanted_sentence) < limit
    assert ours.config.num_params() == sum(parameter.numel() for parameter in ours.parameters())


def test_gradients_are_equal(pair):
    theirs, ours = pair
    ids, more = make_inputs(ours.config)
    labels = torch.randint(VOCAB, (2, U if "decoder_ids" in more else T), generator=torch.Generator().manual_seed(1))
    labels[0, 3:6] = -100
    sentence = torch.tensor([1, 0])
    logits, of_sentence = run_theirs(theirs, ids, **more)
    loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    if of_sentence is None:
        sums = ours(ids, labels, **more)
        ours_loss = sums["tokens"]
    else:
        loss = loss + cross_entropy(of_sentence, sentence, reduction="sum")
        sums = ours(ids, labels, sentence=sentence, **more)
        ours_loss = sums["tokens"] + sums["sentence"]
    loss.backward()
    ours_loss.backward()
    assert ours_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    seen = compare_gradients(theirs, ours)
    assert seen == {name for name, _ in ours.named_parameters()}


@pytest.mark.parametrize("case", [("BertForPreTraining", BERT), ("ModernBertForMaskedLM", MODERN), CASES[-2]])
@torch.no_grad()
def test_padding_is_hidden_from_the_rest(tmp_path, case):
    """Their attention_mask and our documents give equal logits wherever there is no padding."""
    theirs = make_theirs(*case)
    theirs.save_pretrained(tmp_path)
    ours = import_hf(tmp_path)
    ids, more = make_inputs(ours.config)
    mask = torch.ones(2, T, dtype=torch.long)
    mask[1, 15:] = 0
    documents = torch.where(mask == 1, 0, -1)
    wanted, wanted_sentence = run_theirs(theirs, ids, **more, mask=mask)
    found = ours(ids, documents=documents, **more)
    real = torch.ones(2, U, dtype=torch.bool) if "decoder_ids" in more else mask == 1
    limit = PARITY[ours.config.kind]
    assert difference(found[real], wanted[real]) < limit
    assert difference(ours(ids, **more)[1, :U], wanted[1, :U]) > 100 * limit, "the mask must matter"
    if wanted_sentence is not None:
        assert difference(sentence_logits(ours, ids, more["token_types"], documents), wanted_sentence) < limit


def compare_gradients(theirs, ours):
    """Assert that all are equal, and return the names of ours that were compared."""
    parameters, gradients = dict(ours.named_parameters()), {}
    for pair in layout_of(ours.config).pairs(ours.config, fused=True):
        wanted = theirs.get_parameter(pair.theirs[0]).grad
        grads = [parameters[name].grad[:VOCAB] if name in ROWS_OF_IDS else parameters[name].grad for name in pair.ours]
        gradients[pair.ours] = torch.cat(grads, pair.dim), wanted.T if pair.transposed else wanted
    largest = max(wanted.norm() for _, wanted in gradients.values())
    for names, (found, wanted) in gradients.items():
        scale = max(wanted.norm(), ZERO_GRADIENT / GRADIENT_PARITY * largest)
        assert (found - wanted).norm() / scale < GRADIENT_PARITY, names
    return {name for names in gradients for name in names}


@torch.no_grad()
def test_ours_goes_back_as_it_came(pair, tmp_path, tokenizer_file):
    theirs, ours = pair
    directory = tmp_path / "back"
    directory.mkdir()
    ids, more = make_inputs(ours.config, seed=3)
    assert export_hf(ours, tokenizer_file, directory, ids, eos_id=1) < PARITY[ours.config.kind]
    (architecture,) = json.loads((directory / "config.json").read_text())["architectures"]
    assert architecture in (type(theirs).__name__, "LlamaForCausalLM")  # Mistral without a window is Llama
    again, info = getattr(transformers, architecture).from_pretrained(
        directory, local_files_only=True, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for wanted, found in zip(run_theirs(theirs, ids, **more), run_theirs(again.eval(), ids, **more), strict=True):
        assert wanted is None or difference(wanted, found) < PARITY[ours.config.kind]
    assert read_hf_config(directory) == ours.config
    assert torch.equal(import_hf(directory)(ids, **more), ours(ids, **more))
