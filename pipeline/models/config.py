"""The settings of a model, and all that follows from them by arithmetic; nothing here imports torch."""

import json
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.errors import ArtifactError, ConfigError
from pipeline.settings import Choice, Settings, decode

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


class Decoder(Choice):
    """A causal Transformer. The defaults are Llama's choices; GPT-2's can be had by settings.

    Attributes:
        vocab_size: Number of ids; null takes it from the tokens.
        vocab_multiple: The embedding's rows are padded up to a multiple of this, for speed and so that ranks can share
            them; ids stay what they are.
        num_kv_heads: Key and value heads. Null is as many as `num_heads`; fewer is grouped-query attention
            (Ainslie et al. 2023, arXiv:2305.13245).
        d_ff: Width of the feed-forward layer. Null is 4 * d_model for gelu, and for swiglu 8/3 * d_model rounded up to
            a multiple of 64, which has about as many parameters.
        mlp: gelu is the tanh approximation, as in GPT-2.
        bias: Of the linear layers and of layernorm; the output layer never has one.
        tie_embeddings: Whether the output layer is the embedding.
        init_std: Deviation of the first weights, GPT-2's (Radford et al. 2019); the layers that write to the residual
            stream get it / sqrt(2 * num_layers).
    """

    kind: Literal["decoder"] = "decoder"
    vocab_size: int | None = Field(default=None, gt=0)
    vocab_multiple: int = Field(default=64, gt=0)
    d_model: int = Field(default=256, gt=0)
    num_layers: int = Field(default=4, gt=0)
    num_heads: int = Field(default=4, gt=0)
    num_kv_heads: int | None = Field(default=None, gt=0)
    d_ff: int | None = Field(default=None, gt=0)
    max_seq_len: int = Field(default=512, gt=0)
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = Field(default=1e-5, gt=0)
    positions: Literal["rotary", "learned"] = "rotary"
    rope_theta: float = Field(default=10000.0, gt=0)
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    bias: bool = False
    tie_embeddings: bool = True
    dropout: float = Field(default=0.0, ge=0, lt=1)
    init_std: float = Field(default=0.02, gt=0)

    @model_validator(mode="after")
    def _shapes_divide(self) -> Self:
        problems = []
        if self.d_model % self.num_heads:
            problems.append(f"d_model ({self.d_model}) must be a multiple of num_heads ({self.num_heads})")
        elif self.positions == "rotary" and self.head_dim % 2:
            problems.append(
                f"positions 'rotary' turns pairs, so d_model / num_heads ({self.d_model} / {self.num_heads} ="
                f" {self.head_dim}) must be even"
            )
        if self.num_heads % self.kv_heads:
            problems.append(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if problems:
            raise ValueError("; ".join(problems))
        return self

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
        return self.d_model // self.num_heads

    @property
    def ff(self) -> int:
        """Return the width of the feed-forward layer."""
        if self.d_ff is not None:
            return self.d_ff
        return 4 * self.d_model if self.mlp == "gelu" else _round_up(-(-8 * self.d_model // 3), 64)

    def num_params(self) -> int:
        """Return the exact number of parameters, padding rows of the embedding included."""
        kv_width = self.kv_heads * self.head_dim
        linear_biases = 2 * self.d_model + 2 * kv_width + (self._num_mlp_matrices - 1) * self.ff + self.d_model
        norm = self.d_model * (2 if self.bias and self.norm == "layernorm" else 1)
        layer = self._layer_matmul_params() + linear_biases * self.bias + 2 * norm
        embeddings = self.padded_vocab_size * self.d_model * (1 if self.tie_embeddings else 2)
        positions = self.max_seq_len * self.d_model if self.positions == "learned" else 0
        return embeddings + positions + self.num_layers * layer + norm

    def flops_per_token(self, seq_len: int) -> int:
        """Return the floating-point operations of training on one token, forward and backward.

        6 for every weight of a matrix product (the output layer counts, looking up an embedding does not) and
        12 * num_layers * d_model * seq_len for attention: PaLM (Chowdhery et al. 2022, arXiv:2204.02311), appendix B.
        As there, attention counts all of seq_len although the causal mask spares half.
        """
        weights = self.num_layers * self._layer_matmul_params() + self.padded_vocab_size * self.d_model
        return 6 * weights + 12 * self.num_layers * self.d_model * seq_len

    @property
    def _num_mlp_matrices(self) -> int:
        return 3 if self.mlp == "swiglu" else 2

    def _layer_matmul_params(self) -> int:
        kv_width = self.kv_heads * self.head_dim
        attention = 2 * self.d_model * (self.d_model + kv_width)
        return attention + self._num_mlp_matrices * self.d_model * self.ff


class ModelFile(Settings):
    """What a saved model's `config.json` holds.

    Attributes:
        labels: The names of a classifier's classes, in the order of its outputs; null is a language model.
    """

    format: Literal[1] = 1
    model: Decoder
    labels: list[str] | None = None


def read_config(directory: Path) -> ModelFile:
    """Read the `config.json` of a saved model.

    Raises:
        ArtifactError: If there is none, or it is not one of ours.
    """
    path = directory / CONFIG_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{directory}: no {CONFIG_FILE}; wanted a saved model") from None
    except ValueError as error:
        raise ArtifactError(f"{path}: not JSON ({error}); save the model again") from None
    if not isinstance(data, dict):
        raise ArtifactError(f"{path}: wanted a JSON object, found {type(data).__name__}")
    try:
        return decode(ModelFile, data)
    except ConfigError as error:
        raise ArtifactError("\n".join(f"{path}: {problem}" for problem in error.problems)) from None


def hf_layout(config: Decoder) -> Literal["llama", "gpt2"] | None:
    """Return which of Hugging Face's layouts computes exactly what this model computes, or None."""
    if not _differs_from_llama(config):
        return "llama"
    return None if _differs_from_gpt2(config) else "gpt2"


def unexportable(config: Decoder) -> str | None:
    """Return why a model cannot be exported to Hugging Face's layouts, or None if it can."""
    if hf_layout(config) is not None:
        return None
    llama, gpt2 = ", ".join(_differs_from_llama(config)), ", ".join(_differs_from_gpt2(config))
    return f"no Hugging Face layout computes this model: Llama's would need {llama}; GPT-2's would need {gpt2}"


def _differs_from_llama(config: Decoder) -> list[str]:
    """Return the settings that Llama's layout would need to be otherwise; `bias` and grouped queries it has."""
    wanted = {"norm": "rmsnorm", "positions": "rotary", "mlp": "swiglu"}
    return [f"{name}={value}" for name, value in wanted.items() if getattr(config, name) != value]


def _differs_from_gpt2(config: Decoder) -> list[str]:
    wanted = {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "bias": True, "tie_embeddings": True}
    differs = [f"{name}={str(value).lower()}" for name, value in wanted.items() if getattr(config, name) != value]
    return differs + (["num_kv_heads=null"] if config.kv_heads != config.num_heads else [])


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
