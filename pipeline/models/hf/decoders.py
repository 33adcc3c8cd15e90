"""Hugging Face's decoders as data: the names of their tensors and settings beside ours. Nothing here imports torch."""

from collections.abc import Mapping
from typing import Any

from pipeline.models.hf import sight, translate
from pipeline.models.hf.layout import ANYTHING, Layout, Rule
from pipeline.models.hf.translate import Part

Names = Mapping[str, str | tuple[str, ...]]


def make_rules(names: Names, theirs: str = "", ours: str = "", **conditions: bool) -> tuple[Rule, ...]:
    """Return rules for names that begin with `theirs` there and with `ours` here."""
    tuples = {there: (here,) if isinstance(here, str) else here for there, here in names.items()}
    return tuple(
        Rule(theirs + there, tuple(ours + name for name in here), **conditions) for there, here in tuples.items()
    )


_LLAMA_ENDS = {"model.embed_tokens": "embedding", "model.norm": "decoder.norm", "lm_head": "head"}
_LLAMA_LAYER = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.o_proj": "attention.out",
    "self_attn.q_norm": "attention.query_norm",
    "self_attn.k_norm": "attention.key_norm",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}
_FUSED_EXPERTS: Names = {
    "mlp.gate": "mlp.router",
    "mlp.experts.gate_up_proj": ("mlp.experts.gate", "mlp.experts.up"),
    "mlp.experts.down_proj": "mlp.experts.down",
}
_MIXTRAL_EXPERTS = {
    "block_sparse_moe.gate": "mlp.router",
    "block_sparse_moe.experts.{e}.w1.weight": "mlp.experts.gate",
    "block_sparse_moe.experts.{e}.w3.weight": "mlp.experts.up",
    "block_sparse_moe.experts.{e}.w2.weight": "mlp.experts.down",
}
_QWEN3_EXPERTS = {
    "mlp.gate": "mlp.router",
    "mlp.experts.{e}.gate_proj.weight": "mlp.experts.gate",
    "mlp.experts.{e}.up_proj.weight": "mlp.experts.up",
    "mlp.experts.{e}.down_proj.weight": "mlp.experts.down",
}
_IN_LLAMA, _IN_DECODER = "model.layers.{i}.", "decoder.blocks.{i}."
_LLAMA_RULES = make_rules(_LLAMA_ENDS) + make_rules(_LLAMA_LAYER, _IN_LLAMA, _IN_DECODER)
_FUSED_RULES = make_rules(_FUSED_EXPERTS, _IN_LLAMA, _IN_DECODER, fused=True)
SHARED = {"vocab_size": "vocab_size", "tie_embeddings": "tie_word_embeddings", "init_std": "initializer_range"}
_LLAMA_SAME = SHARED | {
    "d_model": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_width": "head_dim",
    "d_ff": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
}
_LLAMA_COMPUTES = {
    "norm": ("rmsnorm",),
    "positions": ("rotary",),
    "mlp": ("swiglu", "geglu", "geglu_exact"),
    "num_kv_heads": ANYTHING,
    "head_width": ANYTHING,
    "rope_scaling": ANYTHING,
}
_LLAMA_DEFAULTS = {
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
}
_GPT2_LINEAR: Names = {
    "attn.c_attn": ("attention.query", "attention.key", "attention.value"),
    "attn.c_proj": "attention.out",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}
_GATED = translate.activation("hidden_act", gated=True)
_TOKEN_CHOICE = {
    "experts": ("set",),
    "experts.router": ("token_choice",),
    "experts.router.scores": ("softmax",),
    "experts.router.capacity_factor": (None,),
    "experts.shared": (0,),
    "experts.balance_bias_rate": (None,),
}


def _like_llama(
    architecture: str,
    model_type: str,
    computes: Mapping[str, tuple[Any, ...]],
    parts: tuple[Part, ...],
    defaults: Mapping[str, Any],
    rules: tuple[Rule, ...] = (),
    same: Mapping[str, str] | None = None,
    fixed: Mapping[str, Any] | None = None,
) -> Layout:
    """Return Llama's layout with what another class has beside it or otherwise."""
    return Layout(
        architecture=architecture,
        model_type=model_type,
        kind="decoder",
        rules=_LLAMA_RULES + rules,
        same={**_LLAMA_SAME, **(same or {})},
        computes={**_LLAMA_COMPUTES, **computes},
        parts=(sight.ROPE, _GATED, *parts),
        fixed=fixed or {},
        defaults={**_LLAMA_DEFAULTS, **defaults},
        copies={"lm_head.weight": "model.embed_tokens.weight"},
        ignored=(r"rotary_emb\.inv_freq$",),
    )


LLAMA = _like_llama(
    architecture="LlamaForCausalLM",
    model_type="llama",
    same={"bias": "attention_bias"},
    computes={"bias": ANYTHING},
    parts=(translate.MLP_BIAS,),
    defaults={"attention_bias": False, "mlp_bias": False},
)
GPT2 = Layout(
    architecture="GPT2LMHeadModel",
    model_type="gpt2",
    kind="decoder",
    rules=make_rules(
        {
            "transformer.wte": "embedding",
            "transformer.wpe": "position_embedding",
            "transformer.ln_f": "decoder.norm",
            "lm_head": "head",
        }
    )
    + make_rules({"ln_1": "attention_norm", "ln_2": "mlp_norm"}, "transformer.h.{i}.", _IN_DECODER)
    + make_rules(_GPT2_LINEAR, "transformer.h.{i}.", _IN_DECODER, transposed=True),
    same=SHARED
    | {
        "d_model": "n_embd",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "d_ff": "n_inner",
        "max_seq_len": "n_positions",
        "norm_eps": "layer_norm_epsilon",
    },
    computes={
        "norm": ("layernorm",),
        "positions": ("learned",),
        "mlp": ("gelu", "gelu_exact", "relu"),
        "bias": (True,),
    },
    parts=(translate.activation("activation_function", gated=False),),
    fixed={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    defaults={
        "vocab_size": 50257,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "n_positions": 1024,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "resid_pdrop": 0.1,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    dropouts=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    prefix="transformer.",
    copies={"lm_head.weight": "transformer.wte.weight"},
    ignored=(r"\.attn\.(masked_)?bias$",),
)
MISTRAL = _like_llama(
    architecture="MistralForCausalLM",
    model_type="mistral",
    computes={"sliding_window": ANYTHING},
    parts=(sight.WINDOW,),
    defaults={
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
)
QWEN3 = _like_llama(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    computes={"qk_norm": (True,), "sliding_window": ANYTHING, "global_every": ANYTHING},
    parts=(sight.TYPED_WINDOW,),
    fixed={"attention_bias": False},
    defaults={
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
)
MIXTRAL = _like_llama(
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    rules=make_rules(_MIXTRAL_EXPERTS, _IN_LLAMA, _IN_DECODER, fused=False) + _FUSED_RULES,
    computes=_TOKEN_CHOICE | {"sliding_window": ANYTHING, "experts.router.renormalize": (True,), "dense_layers": (0,)},
    parts=(sight.WINDOW, translate.MIXTRAL_EXPERTS),
    fixed={"router_jitter_noise": 0.0},
    defaults={
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
    },
)
QWEN3_MOE = _like_llama(
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    rules=make_rules(_QWEN3_EXPERTS, _IN_LLAMA, _IN_DECODER, fused=False) + _FUSED_RULES,
    computes=_TOKEN_CHOICE | {"qk_norm": (True,), "sliding_window": ANYTHING},
    parts=(sight.SWITCHED_WINDOW, translate.QWEN3_EXPERTS),
    fixed={"attention_bias": False, "decoder_sparse_step": 1},
    defaults={
        "vocab_size": 151936,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "intermediate_size": 6144,
        "max_position_embeddings": 32768,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.001,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
    },
)
