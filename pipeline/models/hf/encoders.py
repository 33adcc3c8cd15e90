"""Hugging Face's encoders and its encoder-decoder as data, as `decoders` has the decoders."""

from pipeline.models.hf import sight, translate
from pipeline.models.hf.decoders import SHARED, make_rules
from pipeline.models.hf.layout import ANYTHING, Layout, Rule

_IN_ENCODER, _IN_DECODER = "encoder.blocks.{i}.", "decoder.blocks.{i}."

_BERT_SAME = {
    "vocab_size": "vocab_size",
    "init_std": "initializer_range",
    "d_model": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "layer_norm_eps",
}
_BERT_COMPUTES = {
    "norm": ("layernorm",),
    "norm_placement": ("post",),
    "positions": ("learned",),
    "mlp": ("gelu_exact", "gelu", "relu"),
    "bias": (True,),
    "tie_embeddings": (True,),
    "embedding_norm": (True,),
    "token_types": ANYTHING,
    "head_transform": (True,),
    "head_bias": (True,),
}
_BERT_RULES = make_rules(
    {
        "bert.embeddings.word_embeddings": "embedding",
        "bert.embeddings.position_embeddings": "position_embedding",
        "bert.embeddings.token_type_embeddings": "token_type_embedding",
        "bert.embeddings.LayerNorm": "embedding_norm",
        "bert.pooler.dense": "pooler",
        "cls.predictions.transform.dense": "head_transform.dense",
        "cls.predictions.transform.LayerNorm": "head_transform.norm",
        "cls.predictions.bias": "head_bias",
        "cls.seq_relationship": "sentence_head",
    }
) + make_rules(
    {
        "attention.self.query": "attention.query",
        "attention.self.key": "attention.key",
        "attention.self.value": "attention.value",
        "attention.output.dense": "attention.out",
        "attention.output.LayerNorm": "attention_norm",
        "intermediate.dense": "mlp.up",
        "output.dense": "mlp.down",
        "output.LayerNorm": "mlp_norm",
    },
    "bert.encoder.layer.{i}.",
    _IN_ENCODER,
)
_BERT_DEFAULTS = {
    "vocab_size": 30522,
    "initializer_range": 0.02,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "type_vocab_size": 2,
    "hidden_dropout_prob": 0.1,
    "tie_word_embeddings": True,
    "is_decoder": False,
    "add_cross_attention": False,
    "position_embedding_type": "absolute",
}


def _bert(architecture: str, pooler: bool, ignored: tuple[str, ...]) -> Layout:
    return Layout(
        architecture=architecture,
        model_type="bert",
        kind="encoder",
        rules=_BERT_RULES,
        same=_BERT_SAME,
        computes=_BERT_COMPUTES | {"pooler": (pooler,)},
        parts=(translate.activation("hidden_act", gated=False), translate.TOKEN_TYPES),
        fixed={
            "tie_word_embeddings": True,
            "is_decoder": False,
            "add_cross_attention": False,
            "position_embedding_type": "absolute",
        },
        defaults=_BERT_DEFAULTS,
        dropouts=("hidden_dropout_prob", "attention_probs_dropout_prob"),
        prefix="bert.",
        copies={
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
        ignored=(r"embeddings\.position_ids$", *ignored),
        absent={"bert.embeddings.token_type_embeddings.weight": "token_type_embedding.weight"},
    )


BERT = _bert("BertForPreTraining", pooler=True, ignored=())
MASKED_BERT = _bert("BertForMaskedLM", pooler=False, ignored=(r"^bert\.pooler\.", r"^cls\.seq_relationship\."))
MODERN_BERT = Layout(
    architecture="ModernBertForMaskedLM",
    model_type="modernbert",
    kind="encoder",
    rules=make_rules(
        {
            "model.embeddings.tok_embeddings": "embedding",
            "model.embeddings.norm": "embedding_norm",
            "model.final_norm": "encoder.norm",
            "head.dense": "head_transform.dense",
            "head.norm": "head_transform.norm",
            "decoder": "head",
            "decoder.bias": "head_bias",
        }
    )
    + make_rules(
        {
            "attn_norm": "attention_norm",
            "attn.Wqkv": ("attention.query", "attention.key", "attention.value"),
            "attn.Wo": "attention.out",
            "mlp_norm": "mlp_norm",
            "mlp.Wi": ("mlp.gate", "mlp.up"),
            "mlp.Wo": "mlp.down",
        },
        "model.layers.{i}.",
        _IN_ENCODER,
    ),
    same=SHARED
    | {
        "d_model": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "d_ff": "intermediate_size",
        "max_seq_len": "max_position_embeddings",
        "norm_eps": "norm_eps",
        "bias": "attention_bias",
        "head_bias": "decoder_bias",
    },
    computes={
        "norm": ("layernorm",),
        "positions": ("rotary",),
        "mlp": ("geglu_exact", "geglu", "swiglu"),
        "bias": ANYTHING,
        "embedding_norm": (True,),
        "head_transform": (True,),
        "rope_scaling": ANYTHING,
        "local_rope_theta": ANYTHING,
        "sliding_window": ANYTHING,
        "global_every": ANYTHING,
    },
    parts=(
        sight.PAIR_ROPE,
        translate.activation("hidden_activation", gated=True),
        sight.HALF_WINDOW,
        translate.MODERN_BERT,
    ),
    defaults={
        "vocab_size": 50368,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "hidden_size": 768,
        "num_hidden_layers": 22,
        "num_attention_heads": 12,
        "intermediate_size": 1152,
        "max_position_embeddings": 8192,
        "norm_eps": 1e-5,
        "hidden_activation": "gelu",
        "classifier_activation": "gelu",
        "attention_bias": False,
        "mlp_bias": False,
        "norm_bias": False,
        "classifier_bias": False,
        "decoder_bias": True,
        "local_attention": 128,
        "embedding_dropout": 0.0,
        "global_attn_every_n_layers": 3,
        "global_rope_theta": 160000.0,
        "local_rope_theta": 10000.0,
    },
    dropouts=("embedding_dropout", "attention_dropout", "mlp_dropout"),
    copies={"decoder.weight": "model.embeddings.tok_embeddings.weight"},
)
_T5_ATTENTION = {"q": "query", "k": "key", "v": "value", "o": "out"}


def _t5_stack(name: str, inside: str, last: int) -> tuple[Rule, ...]:
    """Return the rules of a stack whose layers have the feed-forward layer as their part number `last`."""
    there = f"{name}.block.{{i}}.layer."
    own = {f"SelfAttention.{a}": f"attention.{b}" for a, b in _T5_ATTENTION.items()}
    return (
        *make_rules({f"{name}.final_layer_norm": f"{name}.norm"}),
        Rule(f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias", (f"{name}.relative",)),
        *make_rules(own | {"layer_norm": "attention_norm"}, f"{there}0.", inside),
        *make_rules({"layer_norm": "mlp_norm", "DenseReluDense.wo": "mlp.down"}, f"{there}{last}.", inside),
        *make_rules({"DenseReluDense.wi": "mlp.up"}, f"{there}{last}.", inside, gated=False),
        *make_rules(
            {"DenseReluDense.wi_0": "mlp.gate", "DenseReluDense.wi_1": "mlp.up"}, f"{there}{last}.", inside, gated=True
        ),
    )


T5 = Layout(
    architecture="T5ForConditionalGeneration",
    model_type="t5",
    kind="encoder_decoder",
    rules=make_rules({"shared": "embedding", "lm_head": "head"})
    + _t5_stack("encoder", _IN_ENCODER, last=1)
    + _t5_stack("decoder", _IN_DECODER, last=2)
    + make_rules(
        {f"EncDecAttention.{a}": f"cross.{b}" for a, b in _T5_ATTENTION.items()} | {"layer_norm": "cross_norm"},
        "decoder.block.{i}.layer.1.",
        _IN_DECODER,
    ),
    same={
        "vocab_size": "vocab_size",
        "tie_embeddings": "tie_word_embeddings",
        "d_model": "d_model",
        "num_layers": "num_layers",
        "num_decoder_layers": "num_decoder_layers",
        "num_heads": "num_heads",
        "head_width": "d_kv",
        "d_ff": "d_ff",
        "max_seq_len": "n_positions",
        "norm_eps": "layer_norm_epsilon",
        "relative_buckets": "relative_attention_num_buckets",
        "relative_max_distance": "relative_attention_max_distance",
    },
    computes={
        "norm": ("rmsnorm",),
        "positions": ("relative",),
        "mlp": ("relu", "gelu", "gelu_exact", "geglu", "geglu_exact", "swiglu"),
        "head_width": ANYTHING,
    },
    parts=(translate.T5,),
    fixed={"is_encoder_decoder": True},
    defaults={
        "vocab_size": 32128,
        "tie_word_embeddings": None,
        "d_model": 512,
        "num_layers": 6,
        "num_decoder_layers": None,
        "num_heads": 8,
        "d_kv": 64,
        "d_ff": 2048,
        "n_positions": 512,
        "layer_norm_epsilon": 1e-6,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "relu",
        "dropout_rate": 0.1,
        "is_encoder_decoder": True,
    },
    dropouts=("dropout_rate",),
    prefix="transformer.",
    copies={
        "lm_head.weight": "shared.weight",
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    },
    attention_scale=1.0,
    ignored=(r"layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",),
)
