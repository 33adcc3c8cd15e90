"""Every weight of a model as data: name, shape, how tensor parallelism cuts it, and how often a token is multiplied
with it. Parameters and operations are counted from this list; a test compares it with the torch module.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from pipeline.models.config import AnyModel, Decoder, Encoder, EncoderDecoder
from pipeline.models.parts import ExpertChoice, Experts, TokenChoice

SENTENCE_CLASSES = 2


@dataclass(frozen=True)
class Weight:
    """One parameter.

    Attributes:
        cut: The dimension along which the ranks of a tensor-parallel group share it: the output features of a
            column-parallel layer, the input features of a row-parallel one, the ids of the vocabulary, heads, or the
            width of experts. Null is held whole by every rank (Shoeybi et al. 2019, arXiv:1909.08053).
        uses: Matrix products with it for each token of its side, on average; 0 for what is looked up or multiplied
            element by element.
        side: Whose tokens: "input" or "target" (the decoder's, of an encoder-decoder).
        summed: When the gradient of a weight that every rank holds whole is only a part on each: "heads" where a rank
            has only its heads, "sequence" where with sequence parallelism it has only its positions; null is never.
    """

    name: str
    shape: tuple[int, ...]
    cut: int | None = None
    uses: float = 0.0
    side: str = "input"
    summed: Literal["heads", "sequence"] | None = None


def weights(config: AnyModel) -> Iterator[Weight]:
    """Yield every parameter of a model."""
    d_model, rows = config.d_model, config.padded_vocab_size
    tied_uses = 1.0 if config.tie_embeddings else 0.0
    last = "target" if isinstance(config, EncoderDecoder) else "input"
    yield Weight("embedding.weight", (rows, d_model), cut=0, uses=tied_uses, side=last)
    if config.positions == "learned":
        yield Weight("position_embedding.weight", (config.max_seq_len, d_model))
    if isinstance(config, Encoder) and config.token_types:
        yield Weight("token_type_embedding.weight", (config.token_types, d_model))
    if config.embedding_norm:
        yield from _norm(config, "embedding_norm")
    if not isinstance(config, Decoder):
        yield from _stack(config, "encoder", config.num_layers, "input")
    if isinstance(config, Decoder):
        yield from _stack(config, "decoder", config.num_layers, "input")
        yield from _ahead(config)
    if isinstance(config, EncoderDecoder):
        yield from _stack(config, "decoder", config.decoder_layers, "target")
    if isinstance(config, Encoder):
        yield from _encoder_heads(config)
    if not config.tie_embeddings:
        yield Weight("head.weight", (rows, d_model), cut=0, uses=1, side=last)


def num_params(config: AnyModel) -> int:
    """Return the exact number of parameters, padding rows of the embedding included."""
    return sum(prod(weight.shape) for weight in weights(config))


def active_params(config: AnyModel) -> int:
    """Return the parameters that a token is multiplied with: all those of matrices but for the experts it misses."""
    return round(sum(prod(weight.shape) * weight.uses for weight in weights(config)))


def flops_per_token(config: AnyModel, seq_len: int, target_len: int | None = None) -> int:
    """Return the floating-point operations of training for each of `seq_len` input tokens, forward and backward.

    6 for every weight of a matrix product (the output layer counts, looking up an embedding does not) and 12 * width of
    all heads * positions seen for each layer's attention: PaLM (Chowdhery et al. 2022, arXiv:2204.02311), appendix B.
    As there, attention counts all of `seq_len` although a causal mask spares half; a layer with a window counts the
    window. What an encoder-decoder does for its targets is shared out among the input tokens.

    Args:
        target_len: Targets of each row of an encoder-decoder; null is as many as there are inputs.
    """
    targets = (seq_len if target_len is None else target_len) if isinstance(config, EncoderDecoder) else 0
    tokens = {"input": seq_len, "target": targets}
    products = sum(6 * prod(weight.shape) * weight.uses * tokens[weight.side] for weight in weights(config))
    heads = 12 * config.num_heads * config.head_dim
    window = config.sliding_window or seq_len
    seen = [min(seq_len, window) if config.is_local(layer) else seq_len for layer in range(config.num_layers)]
    pairs = seq_len * sum(seen)
    if isinstance(config, Decoder):
        last = min(seq_len, window) if config.is_local(config.num_layers) else seq_len
        pairs += seq_len * last * config.predict_ahead
    if isinstance(config, EncoderDecoder):
        seen = [min(targets, window) if config.is_local(layer) else targets for layer in range(config.decoder_layers)]
        pairs += targets * (sum(seen) + seq_len * config.decoder_layers)
    return round((products + heads * pairs) / seq_len)


def tensor_problems(config: AnyModel, degree: int, lengths: Sequence[int] = ()) -> Iterator[str]:
    """Yield why a model cannot be cut among `degree` tensor-parallel ranks.

    Args:
        lengths: Of the sequences that these ranks share, with sequence parallelism.
    """
    if config.num_heads % degree or config.kv_heads % degree:
        yield f"num_heads ({config.num_heads}) and num_kv_heads ({config.kv_heads}) must be multiples of {degree}"
    if config.padded_vocab_size % degree:
        yield f"the padded vocabulary ({config.padded_vocab_size}) must be a multiple of {degree}; set vocab_multiple"
    widths = {"d_ff": config.ff}
    if config.experts is not None:
        widths |= {"experts.d_ff": config.experts.d_ff or config.ff}
    yield from (f"{name} ({width}) must be a multiple of {degree}" for name, width in widths.items() if width % degree)
    if odd := [length for length in lengths if length % degree]:
        yield f"sequences of {odd[0]} positions cannot be shared by {degree} ranks; take lengths that divide"


def _stack(config: AnyModel, name: str, num_layers: int, side: str) -> Iterator[Weight]:
    for layer in range(num_layers):
        yield from _block(config, f"{name}.blocks.{layer}", layer, side)
    if config.positions == "relative":
        yield Weight(f"{name}.relative.weight", (config.relative_buckets, config.num_heads), cut=1)
    if config.norm_placement == "pre":
        yield from _norm(config, f"{name}.norm")


def _block(config: AnyModel, name: str, layer: int, side: str) -> Iterator[Weight]:
    first_is_normed = config.embedding_norm and layer == 0 and config.norm_placement == "pre"
    if not first_is_normed:
        yield from _norm(config, f"{name}.attention_norm", "sequence")
    yield from _attention(config, f"{name}.attention", side, side)
    if side == "target":
        yield from _norm(config, f"{name}.cross_norm", "sequence")
        yield from _attention(config, f"{name}.cross", "target", "input")
    yield from _norm(config, f"{name}.mlp_norm", "sequence")
    if config.experts is not None and config.has_experts(layer):
        yield from _experts(config, config.experts, f"{name}.mlp", side)
    else:
        yield from _mlp(config, f"{name}.mlp", config.ff, side)


def _ahead(config: Decoder) -> Iterator[Weight]:
    """Yield the blocks that look ahead, which do without sequence parallelism."""
    for number in range(config.predict_ahead):
        for weight in _block(config, f"ahead.{number}", config.num_layers, "input"):
            yield replace(weight, summed=None) if weight.summed == "sequence" else weight


def _attention(config: AnyModel, name: str, side: str, kv_side: str) -> Iterator[Weight]:
    """Yield the weights of attention; its keys and values are made of tokens of `kv_side`."""
    width, kv_width = config.num_heads * config.head_dim, config.kv_heads * config.head_dim
    yield from _linear(config, f"{name}.query", config.d_model, width, 0, side)
    yield from _linear(config, f"{name}.key", config.d_model, kv_width, 0, kv_side)
    yield from _linear(config, f"{name}.value", config.d_model, kv_width, 0, kv_side)
    if config.qk_norm:
        yield Weight(f"{name}.query_norm.weight", (config.head_dim,), summed="heads")
        yield Weight(f"{name}.key_norm.weight", (config.head_dim,), summed="heads")
    yield from _linear(config, f"{name}.out", width, config.d_model, 1, side)


def _mlp(config: AnyModel, name: str, width: int, side: str) -> Iterator[Weight]:
    if config.gated:
        yield from _linear(config, f"{name}.gate", config.d_model, width, 0, side)
    yield from _linear(config, f"{name}.up", config.d_model, width, 0, side)
    yield from _linear(config, f"{name}.down", width, config.d_model, 1, side)


def _experts(config: AnyModel, experts: Experts, name: str, side: str) -> Iterator[Weight]:
    width, count, router = experts.d_ff or config.ff, experts.count, experts.router
    used = 1.0  # experts of a token
    if isinstance(router, TokenChoice):
        used = router.top_k
    elif isinstance(router, ExpertChoice):
        used = min(router.capacity_factor, count)
    if isinstance(router, TokenChoice | ExpertChoice):
        yield Weight(f"{name}.router.weight", (count, config.d_model), uses=1, side=side)
    for part, shape, cut in (
        ("gate", (count, width, config.d_model), 1),
        ("up", (count, width, config.d_model), 1),
        ("down", (count, config.d_model, width), 2),
    ):
        yield Weight(f"{name}.experts.{part}", shape, cut, used / count, side)
    if experts.shared:
        yield from _mlp(config, f"{name}.shared", experts.shared * width, side)


def _encoder_heads(config: Encoder) -> Iterator[Weight]:
    if config.head_transform:
        yield from _linear(config, "head_transform.dense", config.d_model, config.d_model, None, "input")
        yield from _norm(config, "head_transform.norm")
    if config.head_bias:
        yield Weight("head_bias", (config.padded_vocab_size,), cut=0)
    if config.pooler:
        for name, width in (("pooler", config.d_model), ("sentence_head", SENTENCE_CLASSES)):
            yield Weight(f"{name}.weight", (width, config.d_model))
            yield Weight(f"{name}.bias", (width,))


def _linear(config: AnyModel, name: str, fan_in: int, fan_out: int, cut: int | None, side: str) -> Iterator[Weight]:
    """Yield a linear layer; a bias is cut as the output features are, and else added after the ranks' sum."""
    yield Weight(f"{name}.weight", (fan_out, fan_in), cut, 1, side)
    if config.bias:
        yield Weight(f"{name}.bias", (fan_out,), 0 if cut == 0 else None, summed="sequence" if cut == 1 else None)


def _norm(config: AnyModel, name: str, summed: Literal["sequence"] | None = None) -> Iterator[Weight]:
    yield Weight(f"{name}.weight", (config.d_model,), summed=summed)
    if config.norm == "layernorm" and config.bias:
        yield Weight(f"{name}.bias", (config.d_model,), summed=summed)
