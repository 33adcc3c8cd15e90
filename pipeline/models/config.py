"""The settings of a model; nothing here imports torch. What follows from them by arithmetic is in `weights`."""

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.errors import ConfigError
from pipeline.models.parts import AnyScaling, ExpertChoice, Experts, TokenChoice
from pipeline.settings import Choice

GATED = ("swiglu", "geglu", "geglu_exact")  # kinds of feed-forward layers that have a gate


class Shape(Choice):
    """What all families share. The defaults are Llama's choices.

    Attributes:
        vocab_size: Number of ids; null takes it from the tokens.
        vocab_multiple: The embedding's rows are padded up to a multiple of this, for speed and so that ranks can share
            them; ids stay what they are.
        num_kv_heads: Key and value heads. Null is as many as `num_heads`; fewer is grouped-query attention
            (Ainslie et al. 2023, arXiv:2305.13245).
        head_width: Size of a head; null is d_model / num_heads.
        d_ff: Width of the feed-forward layer. Null is 4 * d_model, and with a gate 8/3 * d_model rounded up to a
            multiple of 64, which has about as many parameters.
        norm_placement: "pre" norms what a layer reads, "post" the sum of what it read and wrote, as the original
            Transformer does (Vaswani et al. 2017, arXiv:1706.03762).
        positions: "relative" adds a learned number for each distance to the attention's scores (Raffel et al. 2020,
            arXiv:1910.10683); "sinusoidal" is the original Transformer's.
        local_rope_theta: `rope_theta` of the layers with a window; null is the same.
        sliding_window: Positions that a layer sees, its own included: those before it, or half of them on either side
            in an encoder. Null sees all.
        global_every: With a window, layers 0, n, 2n, … see all; null has a window everywhere.
        qk_norm: RMSNorm over each head's queries and keys (Dehghani et al. 2023, arXiv:2302.05442).
        attention_scale: What scores are multiplied with; null is 1 / sqrt(head width).
        mlp: gelu and geglu are the tanh approximation, the exact ones are BERT's and ModernBERT's.
        experts: Makes the feed-forward layers mixtures of experts.
        dense_layers: So many of the first layers have no experts.
        bias: Of the linear layers and of layernorm; the output layer has none.
        tie_embeddings: Whether the output layer is the embedding.
        embedding_norm: Whether the embedded tokens are normed; the first layer then needs no norm before attention.
        embedding_scale: What they are multiplied with; null is 1.
        logit_scale: What the logits are multiplied with; null is 1.
        logit_softcap: Logits are squashed to this size by tanh (Gemma 2, arXiv:2408.00118); null does not.
        init_std: Deviation of the first weights, GPT-2's (Radford et al. 2019); the layers that write to the residual
            stream get it / sqrt(2 * num_layers).
        mup_base_width: Maximal update parametrization (Yang et al. 2022, arXiv:2203.03466): the learning rate and the
            deviations that are best at this d_model stay so at any other. Null is without.
    """

    vocab_size: int | None = Field(default=None, gt=0)
    vocab_multiple: int = Field(default=64, gt=0)
    d_model: int = Field(default=256, gt=0)
    num_layers: int = Field(default=4, gt=0)
    num_heads: int = Field(default=4, gt=0)
    num_kv_heads: int | None = Field(default=None, gt=0)
    head_width: int | None = Field(default=None, gt=0)
    d_ff: int | None = Field(default=None, gt=0)
    max_seq_len: int = Field(default=512, gt=0)
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = Field(default=1e-5, gt=0)
    norm_placement: Literal["pre", "post"] = "pre"
    positions: Literal["rotary", "learned", "sinusoidal", "relative"] = "rotary"
    rope_theta: float = Field(default=10000.0, gt=0)
    rope_scaling: AnyScaling | None = None
    local_rope_theta: float | None = Field(default=None, gt=0)
    sliding_window: int | None = Field(default=None, gt=1)
    global_every: int | None = Field(default=None, gt=1)
    relative_buckets: int = Field(default=32, ge=4, multiple_of=4)
    relative_max_distance: int = Field(default=128, gt=1)
    qk_norm: bool = False
    attention_scale: float | None = Field(default=None, gt=0)
    mlp: Literal["swiglu", "geglu", "geglu_exact", "gelu", "gelu_exact", "relu"] = "swiglu"
    experts: Experts | None = None
    dense_layers: int = Field(default=0, ge=0)
    bias: bool = False
    tie_embeddings: bool = True
    embedding_norm: bool = False
    embedding_scale: float | None = Field(default=None, gt=0)
    logit_scale: float | None = Field(default=None, gt=0)
    logit_softcap: float | None = Field(default=None, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    init_std: float = Field(default=0.02, gt=0)
    mup_base_width: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if problems := list(self._problems()):
            raise ValueError("; ".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        """Yield what does not fit together."""
        if self.head_width is None and self.d_model % self.num_heads:
            yield f"d_model ({self.d_model}) must be a multiple of num_heads ({self.num_heads}), or set head_width"
        elif self.positions == "rotary" and self.head_dim % 2:
            width = f"d_model / num_heads ({self.d_model} / {self.num_heads} = {self.head_dim})"
            width = width if self.head_width is None else f"head_width ({self.head_width})"
            yield f"positions 'rotary' turns pairs, so {width} must be even"
        if self.num_heads % self.kv_heads:
            yield f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})"
        if self.positions != "rotary" and (self.rope_scaling or self.local_rope_theta):
            yield f"rope_scaling and local_rope_theta need positions 'rotary', found '{self.positions}'"
        if self.sliding_window is None and (self.global_every or self.local_rope_theta):
            yield "global_every and local_rope_theta need a sliding_window"
        if self.positions == "sinusoidal" and self.d_model % 2:
            yield f"positions 'sinusoidal' come in pairs, so d_model ({self.d_model}) must be even"
        if self.experts is not None:
            yield from self._problems_of_experts(self.experts)
        elif self.dense_layers:
            yield "dense_layers needs experts"

    def _problems_of_experts(self, experts: Experts) -> Iterator[str]:
        router = experts.router
        if self.mlp not in GATED or self.bias:
            yield f"experts need a gate and no bias: mlp {', '.join(GATED)} and bias false"
        if self.dense_layers >= self.num_layers:
            yield f"dense_layers ({self.dense_layers}) leaves no layer of {self.num_layers} for experts"
        if isinstance(router, TokenChoice) and router.top_k > experts.count:
            yield f"experts.router.top_k ({router.top_k}) is more than experts.count ({experts.count})"
        if isinstance(router, ExpertChoice) and self.kind != "encoder":
            yield "experts.router 'expert_choice' lets a token know what follows it; only an encoder can have it"
        if experts.balance_bias_rate is not None and not isinstance(router, TokenChoice):
            yield "experts.balance_bias_rate needs the router 'token_choice'"

    @property
    def real_vocab_size(self) -> int:
        """Return the number of ids that exist.

        Raises:
            ConfigError: If it is null and nobody has taken it from the tokens yet.
        """
        if self.vocab_size is None:
            raise ConfigError("vocab_size: not known yet; set it, or give the tokens it is to be taken from")
        return self.vocab_size

    @property
    def padded_vocab_size(self) -> int:
        """Return the number of rows of the embedding; ConfigError if `vocab_size` is null."""
        return _round_up(self.real_vocab_size, self.vocab_multiple)

    @property
    def kv_heads(self) -> int:
        """Return the number of key and value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_dim(self) -> int:
        """Return the size of one head."""
        return self.head_width or self.d_model // self.num_heads

    @property
    def gated(self) -> bool:
        """Return whether the feed-forward layers have a gate."""
        return self.mlp in GATED

    @property
    def ff(self) -> int:
        """Return the width of the feed-forward layer."""
        if self.d_ff is not None:
            return self.d_ff
        return _round_up(-(-8 * self.d_model // 3), 64) if self.gated else 4 * self.d_model

    @property
    def width_ratio(self) -> float:
        """Return how many times as wide the model is as the one whose learning rate it has; 1 without μP."""
        return 1.0 if self.mup_base_width is None else self.d_model / self.mup_base_width

    def is_local(self, layer: int) -> bool:
        """Return whether a layer sees only its window."""
        if self.sliding_window is None:
            return False
        return self.global_every is None or layer % self.global_every != 0

    def has_experts(self, layer: int) -> bool:
        """Return whether the feed-forward layer is a mixture of experts."""
        return self.experts is not None and layer >= self.dense_layers

    def num_params(self) -> int:
        """Return the exact number of parameters, padding rows of the embedding included."""
        from pipeline.models.weights import num_params

        return num_params(self)  # type: ignore[arg-type]  # one of the three

    def flops_per_token(self, seq_len: int) -> int:
        """Return the operations of training on one token, forward and backward; see `weights.flops_per_token`."""
        from pipeline.models.weights import flops_per_token

        return flops_per_token(self, seq_len)  # type: ignore[arg-type]


class Decoder(Shape):
    """A causal Transformer: GPT-2, Llama and what came after them, by settings.

    Attributes:
        predict_ahead: Heads that predict the tokens after the next one, each a layer of its own on the last one
            (Gloeckle et al. 2024, arXiv:2404.19737); they are for training, and are not exported.
    """

    kind: Literal["decoder"] = "decoder"
    predict_ahead: int = Field(default=0, ge=0)


class Encoder(Shape):
    """A Transformer that sees what follows too: BERT and modern encoders.

    Attributes:
        token_types: Number of segments that tokens are told apart by (Devlin et al. 2019, arXiv:1810.04805).
        pooler: Whether there is a head that says of a pair of texts whether they belong together.
        head_transform: Whether a linear layer, the activation and a norm come before the output layer.
        head_bias: Whether each id has a bias in the output layer.
    """

    kind: Literal["encoder"] = "encoder"
    token_types: int = Field(default=0, ge=0)
    pooler: bool = False
    head_transform: bool = True
    head_bias: bool = True


class EncoderDecoder(Shape):
    """An encoder, and a decoder that reads what it makes: T5 and the original Transformer.

    Attributes:
        num_decoder_layers: Null is as many as `num_layers`, which are the encoder's.
        decoder_start_id: What the decoder reads first; null is the id that ends a text.
    """

    kind: Literal["encoder_decoder"] = "encoder_decoder"
    num_decoder_layers: int | None = Field(default=None, gt=0)
    decoder_start_id: int | None = Field(default=None, ge=0)

    @property
    def decoder_layers(self) -> int:
        """Return the number of the decoder's layers."""
        return self.num_decoder_layers or self.num_layers


AnyModel = Annotated[Decoder | Encoder | EncoderDecoder, Field(discriminator="kind")]


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
