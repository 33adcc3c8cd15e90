"""Settings that Hugging Face's classes say otherwise than we do, each as a pair of functions: theirs → ours and back.

Settings that differ by name only are data in `decoders` and `encoders`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import ArtifactError
from pipeline.models.config import GATED, AnyModel
from pipeline.models.parts import TokenChoice

Fields = dict[str, Any]

# Their activation functions by ours; the first is the one that is written.
ACTIVATIONS = {
    "silu": ("silu", "swish"),
    "gelu": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
    "gelu_exact": ("gelu", "gelu_python"),
    "relu": ("relu",),
}
MLP_OF_GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_exact": "geglu_exact"}
ACTIVATION_OF_MLP = {mlp: activation for activation, mlp in MLP_OF_GATED.items()}


@dataclass
class Theirs:
    """Their `config.json` as it is read: what it does not say is their class's default, and problems are collected.

    Attributes:
        tensors: The names of the weights that lie beside it; empty if there are none yet.
    """

    path: Path
    data: Mapping[str, Any]
    defaults: Mapping[str, Any]
    tensors: frozenset[str] = frozenset()
    problems: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> Any:
        if name in self.data:
            return self.data[name]
        if name not in self.defaults:
            raise ArtifactError(f"{self.path}: {name}: missing")
        return self.defaults[name]

    def want(self, name: str, wanted: object) -> None:
        """Note a problem unless their setting has the one value that we compute with."""
        if self[name] != wanted:
            self.refuse(name, wanted, self[name])

    def refuse(self, name: str, wanted: object, found: object) -> None:
        """Note a problem."""
        self.problems.append(f"{self.path}: {name}: wanted {wanted}, found {found}")


@dataclass(frozen=True)
class Part:
    """A translation of some settings: ours to theirs, and theirs to ours."""

    write: Callable[[AnyModel], Fields]
    read: Callable[[Theirs], Fields]


def activation(name: str, gated: bool) -> Part:
    """Return the translation of the activation function, which they keep in `name`."""

    def write(config: AnyModel) -> Fields:
        return {name: ACTIVATIONS[ACTIVATION_OF_MLP.get(config.mlp, config.mlp)][0]}

    def read(theirs: Theirs) -> Fields:
        return {"mlp": _mlp(theirs, name, theirs[name], gated)}

    return Part(write, read)


def _mlp(theirs: Theirs, name: str, found: str, gated: bool) -> str | None:
    """Return our name of a feed-forward layer; a problem if we have none."""
    known = {alias: ours for ours, aliases in ACTIVATIONS.items() for alias in aliases}
    mlps = {
        alias: MLP_OF_GATED.get(ours) if gated else ours for alias, ours in known.items() if ours != "silu" or gated
    }
    if mlps.get(found) is None:
        theirs.refuse(name, " or ".join(alias for alias, mlp in mlps.items() if mlp), found)
    return mlps.get(found)


def _read_mlp_bias(theirs: Theirs) -> Fields:
    theirs.want("mlp_bias", theirs["attention_bias"])
    return {}


MLP_BIAS = Part(lambda config: {"mlp_bias": config.bias}, _read_mlp_bias)


def _write_experts(config: AnyModel, count: str, width: str) -> Fields:
    experts = config.experts
    assert experts is not None
    assert isinstance(experts.router, TokenChoice)
    return {
        count: experts.count,
        "num_experts_per_tok": experts.router.top_k,
        width: experts.d_ff or config.ff,
        "router_aux_loss_coef": experts.balance_loss,
    }


def _read_experts(theirs: Theirs, count: str) -> Fields:
    router = {"kind": "token_choice", "top_k": theirs["num_experts_per_tok"]}
    return {"count": theirs[count], "router": router, "balance_loss": float(theirs["router_aux_loss_coef"])}


MIXTRAL_EXPERTS = Part(
    lambda config: _write_experts(config, "num_local_experts", "intermediate_size"),
    lambda theirs: {"experts": _read_experts(theirs, "num_local_experts")},
)


def _write_qwen3(config: AnyModel) -> Fields:
    fields = _write_experts(config, "num_experts", "moe_intermediate_size")
    renormalize = config.experts.router.renormalize  # type: ignore[union-attr]  # looked at above
    return fields | {"norm_topk_prob": renormalize, "mlp_only_layers": list(range(config.dense_layers))}


def _read_qwen3(theirs: Theirs) -> Fields:
    dense = theirs["mlp_only_layers"] or []
    if dense != list(range(len(dense))):
        theirs.refuse("mlp_only_layers", "the first layers", dense)
    experts = _read_experts(theirs, "num_local_experts" if "num_local_experts" in theirs.data else "num_experts")
    experts |= {"d_ff": theirs["moe_intermediate_size"]}
    experts["router"]["renormalize"] = theirs["norm_topk_prob"]
    return {"experts": experts, "dense_layers": len(dense)}


QWEN3_EXPERTS = Part(_write_qwen3, _read_qwen3)


def t5_scales_logits(config: AnyModel) -> bool:
    """Return whether the logits are multiplied with what T5's first version multiplies them with."""
    return config.logit_scale is not None and abs(config.logit_scale * config.d_model**0.5 - 1) < 1e-9


def _write_t5(config: AnyModel) -> Fields:
    act = "gelu_python" if config.mlp == "geglu_exact" else None  # plain "gated-gelu" is the approximation there
    act = act or ACTIVATIONS[ACTIVATION_OF_MLP.get(config.mlp, config.mlp)][0]
    act = "gelu" if config.mlp == "geglu" else act
    return {
        "feed_forward_proj": f"gated-{act}" if config.mlp in GATED else act,
        "scale_decoder_outputs": t5_scales_logits(config),
    }


def _read_t5(theirs: Theirs) -> Fields:
    """Read the feed-forward layer, and what their two versions do otherwise.

    Note: their `tie_word_embeddings` once said both whether the output layer is the embedding and whether logits are
    scaled. Today they write true for all, and the weights tell; an output layer in the file of a model whose logits are
    scaled is the embedding once more.
    """
    said_tied = theirs["tie_word_embeddings"] is not False
    scaled = theirs.data.get("scale_decoder_outputs", said_tied)
    tied = said_tied
    if theirs.tensors:
        tied = "lm_head.weight" not in theirs.tensors or (said_tied and scaled)
    found: str = theirs["feed_forward_proj"]
    act = "gelu_new" if found == "gated-gelu" else found.removeprefix("gated-")
    return {
        "mlp": _mlp(theirs, "feed_forward_proj", act, found.startswith("gated-")),
        "logit_scale": theirs["d_model"] ** -0.5 if scaled else None,
        "tie_embeddings": tied,
    }


T5 = Part(_write_t5, _read_t5)
TOKEN_TYPES = Part(  # a model without gets one whose embedding is zero
    lambda config: {"type_vocab_size": max(getattr(config, "token_types", 0), 1)},
    lambda theirs: {"token_types": theirs["type_vocab_size"]},
)


def _write_modern_bert(config: AnyModel) -> Fields:
    act = ACTIVATIONS[ACTIVATION_OF_MLP[config.mlp]][0]
    every = {} if config.global_every is None else {"global_attn_every_n_layers": config.global_every}
    biases = dict.fromkeys(("mlp_bias", "norm_bias", "classifier_bias"), config.bias)
    return {"classifier_activation": act, **every, **biases}


def _read_modern_bert(theirs: Theirs) -> Fields:
    theirs.want("classifier_activation", theirs["hidden_activation"])
    for name in ("mlp_bias", "norm_bias", "classifier_bias"):
        theirs.want(name, theirs["attention_bias"])
    return {}


MODERN_BERT = Part(_write_modern_bert, _read_modern_bert)
