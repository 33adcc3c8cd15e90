"""Small models of every family, with the settings that matter."""

import torch

from pipeline.models.config import Decoder, Encoder, EncoderDecoder
from pipeline.models.initial import init_weights
from pipeline.models.parts import ExpertChoice, Experts, Hash, Llama3Scaling, TokenChoice
from pipeline.models.transformer import Transformer

VOCAB_SIZE, MAX_SEQ_LEN = 50, 16
SMALL = {"vocab_size": VOCAB_SIZE, "d_model": 16, "num_layers": 2, "num_heads": 4, "max_seq_len": MAX_SEQ_LEN}
GPT2 = {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "bias": True}
SCALING = Llama3Scaling(factor=4.0, original_max_seq_len=8)

DECODERS = {
    "llama": {},
    "grouped": {"num_kv_heads": 2, "tie_embeddings": False, "bias": True, "d_ff": 24},
    "gpt2": GPT2,
    "one_key_head": {"norm": "layernorm", "num_kv_heads": 1},
    "qwen3": {"qk_norm": True, "head_width": 8, "num_kv_heads": 2, "rope_scaling": SCALING},
    "window": {"sliding_window": 3, "global_every": 2, "local_rope_theta": 100.0, "num_layers": 3},
    "capped": {"logit_softcap": 2.0, "logit_scale": 0.5, "embedding_scale": 4.0, "mlp": "geglu"},
    "relative": {"positions": "relative", "mlp": "relu", "norm_placement": "post"},
    "mixtral": {"experts": Experts(count=4, d_ff=8), "num_kv_heads": 2},
    "deepseek": {
        "experts": Experts(
            count=4, d_ff=8, shared=1, router=TokenChoice(scores="sigmoid"), balance_bias_rate=0.01, router_z_loss=0.1
        ),
        "dense_layers": 1,
    },
    "hash": {"experts": Experts(count=4, d_ff=8, router=Hash())},
    "ahead": {"predict_ahead": 2},
}
ENCODERS = {
    "bert": {
        "norm": "layernorm",
        "norm_placement": "post",
        "positions": "learned",
        "token_types": 2,
        "pooler": True,
        "bias": True,
        "mlp": "gelu_exact",
        "embedding_norm": True,
    },
    "modernbert": {
        "norm": "layernorm",
        "sliding_window": 4,
        "global_every": 2,
        "rope_theta": 160000.0,
        "local_rope_theta": 10000.0,
        "mlp": "geglu_exact",
        "embedding_norm": True,
    },
    "plain": {"head_transform": False, "head_bias": False, "tie_embeddings": False},
    "chosen": {"experts": Experts(count=2, d_ff=8, router=ExpertChoice(capacity_factor=1.0))},
}
ENCODER_DECODERS = {
    "t5": {"positions": "relative", "attention_scale": 1.0, "mlp": "geglu", "tie_embeddings": False},
    "vaswani": {
        "positions": "sinusoidal",
        "norm": "layernorm",
        "norm_placement": "post",
        "mlp": "relu",
        "bias": True,
        "embedding_scale": 4.0,
    },
    "deeper": {"num_decoder_layers": 3, "num_kv_heads": 2},
}
FAMILIES = {
    **{name: (Decoder, changes) for name, changes in DECODERS.items()},
    **{name: (Encoder, changes) for name, changes in ENCODERS.items()},
    **{name: (EncoderDecoder, changes) for name, changes in ENCODER_DECODERS.items()},
}


def make(name="llama", seed=0, std=0.2, **changes):
    """Return a model with weights large enough that nothing is nearly zero."""
    family, settings = FAMILIES[name]
    model = Transformer(family(**(SMALL | settings | {"init_std": std} | changes)))
    init_weights(model, seed)
    return model.eval()


def random_ids(rows=2, length=12, seed=0):
    return torch.randint(VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(seed))


def feed(model, rows=2, length=12, seed=0):
    """Return what a model of any family reads."""
    both = {"decoder_ids": random_ids(rows, length - 2, seed + 100)} if model.config.kind == "encoder_decoder" else {}
    return {"ids": random_ids(rows, length, seed), **both}
