"""The only door to transformers: a model goes out in Hugging Face's layout, checked, and comes in from it.

transformers is imported inside the functions, because importing it takes seconds. Nothing here uses the network.
"""

import copy
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import ArtifactError, ConfigError
from pipeline.models.config import CONFIG_FILE, WEIGHTS_FILE, Decoder, unexportable
from pipeline.models.transformer import Transformer


def export_hf(
    model: Transformer,
    tokenizer_file: Path,
    directory: Path,
    check_ids_BT: Tensor,
    eos_id: int | None = None,
    bos_id: int | None = None,
    pad_id: int | None = None,
) -> float:
    """Write a model and its tokenizer so that transformers' Auto classes load `directory`, and check that they do.

    The rows that pad the embedding are left out: there, `vocab_size` is the number of ids that exist. `tokenizer.json`
    is copied byte for byte.

    Returns:
        The largest difference between a logit of the model and one of what was written and loaded back, in fp32.

    Raises:
        ConfigError: If no layout computes this model.
        ArtifactError: If the tokenizer does not belong to the model, or does not come back the same.
    """
    if (reason := unexportable(model.config)) is not None:
        raise ConfigError(reason)
    special_ids = {"eos": eos_id, "bos": bos_id, "pad": pad_id}
    given_ids = {name: token_id for name, token_id in special_ids.items() if token_id is not None}
    _write_config(model, directory, special_ids)
    _write_tokenizer(tokenizer_file, directory, given_ids, model.config)
    save_file(_to_hf(model), directory / WEIGHTS_FILE, metadata={"format": "pt"})
    return _largest_difference(model, directory, check_ids_BT)


def import_hf(directory: Path) -> Transformer:
    """Return the model of a local directory in Llama's or GPT-2's layout, in its precision, ready to evaluate.

    Raises:
        ArtifactError: If there is no model, or one that our settings cannot describe exactly.
    """
    hf_model = _load(directory, "auto")
    config = _config_from_hf(directory / CONFIG_FILE, hf_model.config)
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(_from_hf(config, hf_model.state_dict()), assign=True)
    return model.eval()


class _Weight(NamedTuple):
    """One tensor there and the tensors here of which it is made, one below the other."""

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False


def _weights(config: Decoder) -> Iterator[_Weight]:
    """Yield every tensor of the layout that `config` has."""
    llama = config.positions == "rotary"
    yield _Weight("model.embed_tokens.weight" if llama else "transformer.wte.weight", ("embedding.weight",))
    if not llama:
        yield _Weight("transformer.wpe.weight", ("position_embedding.weight",))
    for layer in range(config.num_layers):
        yield from _llama_layer(config, layer) if llama else _gpt2_layer(layer)
    if llama:
        yield _Weight("model.norm.weight", ("norm.weight",))
    else:
        yield from (_Weight(f"transformer.ln_f.{kind}", (f"norm.{kind}",)) for kind in ("weight", "bias"))
    if not config.tie_embeddings:
        yield _Weight("lm_head.weight", ("head.weight",))


def _llama_layer(config: Decoder, layer: int) -> Iterator[_Weight]:
    theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
    yield _Weight(f"{theirs}.input_layernorm.weight", (f"{ours}.attention_norm.weight",))
    yield _Weight(f"{theirs}.post_attention_layernorm.weight", (f"{ours}.mlp_norm.weight",))
    attention = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out"}
    linear = {f"self_attn.{a}": f"attention.{b}" for a, b in attention.items()}
    linear |= {f"mlp.{name}_proj": f"mlp.{name}" for name in ("gate", "up", "down")}
    for a, b in linear.items():
        for kind in ("weight", "bias") if config.bias else ("weight",):
            yield _Weight(f"{theirs}.{a}.{kind}", (f"{ours}.{b}.{kind}",))


def _gpt2_layer(layer: int) -> Iterator[_Weight]:
    """Yield the tensors of one layer; its linear layers are stored the other way round, and q, k and v as one."""
    theirs, ours = f"transformer.h.{layer}", f"blocks.{layer}"
    linear = {
        "attn.c_attn": ("attention.query", "attention.key", "attention.value"),
        "attn.c_proj": ("attention.out",),
        "mlp.c_fc": ("mlp.up",),
        "mlp.c_proj": ("mlp.down",),
    }
    for kind in ("weight", "bias"):
        yield _Weight(f"{theirs}.ln_1.{kind}", (f"{ours}.attention_norm.{kind}",))
        yield _Weight(f"{theirs}.ln_2.{kind}", (f"{ours}.mlp_norm.{kind}",))
        for a, b in linear.items():
            yield _Weight(f"{theirs}.{a}.{kind}", tuple(f"{ours}.{name}.{kind}" for name in b), kind == "weight")


def _to_hf(model: Transformer) -> dict[str, Tensor]:
    ours, vocab_size = model.state_dict(), model.config.real_vocab_size
    weights = {}
    for weight in _weights(model.config):
        tensor = torch.cat([ours[name].cpu() for name in weight.ours])
        if weight.ours[0] in ("embedding.weight", "head.weight"):
            tensor = tensor[:vocab_size]
        weights[weight.theirs] = (tensor.T if weight.transposed else tensor).contiguous()
    return weights


def _from_hf(config: Decoder, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for weight in _weights(config):
        tensor = theirs[weight.theirs].T if weight.transposed else theirs[weight.theirs]
        if weight.ours[0] in ("embedding.weight", "head.weight"):
            padding = config.padded_vocab_size - len(tensor)
            tensor = torch.cat([tensor, tensor.new_zeros(padding, config.d_model)])
        parts = tensor.chunk(len(weight.ours))
        weights |= {
            name: part.clone(memory_format=torch.contiguous_format)
            for name, part in zip(weight.ours, parts, strict=True)
        }
    return weights


def _write_config(model: Transformer, directory: Path, special_ids: Mapping[str, int | None]) -> None:
    from transformers import AutoConfig, GenerationConfig

    config = model.config
    llama = config.positions == "rotary"
    ours = config.model_dump() | {"num_kv_heads": config.kv_heads, "d_ff": config.ff, "vocab_size": config.vocab_size}
    fields: dict[str, Any] = {theirs: ours[name] for name, theirs in _names(llama).items()}
    if llama:  # Llama has dropout on attention alone; evaluation needs none
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
        fields |= {"mlp_bias": config.bias, "architectures": ["LlamaForCausalLM"]}
    else:
        fields |= {"embd_pdrop": config.dropout, "attn_pdrop": config.dropout, "architectures": ["GPT2LMHeadModel"]}
    ids = {f"{name}_token_id": token_id for name, token_id in special_ids.items()}
    dtype = model.embedding.weight.dtype
    AutoConfig.for_model("llama" if llama else "gpt2", dtype=dtype, **fields, **ids).save_pretrained(directory)
    GenerationConfig(**ids).save_pretrained(directory)


def _names(llama: bool) -> dict[str, str]:
    """Return the settings that mean the same here and there: our name, then theirs."""
    shared = {"vocab_size": "vocab_size", "tie_embeddings": "tie_word_embeddings", "init_std": "initializer_range"}
    if llama:
        return shared | {
            "d_model": "hidden_size",
            "num_layers": "num_hidden_layers",
            "num_heads": "num_attention_heads",
            "num_kv_heads": "num_key_value_heads",
            "d_ff": "intermediate_size",
            "max_seq_len": "max_position_embeddings",
            "norm_eps": "rms_norm_eps",
            "bias": "attention_bias",
        }
    return shared | {
        "d_model": "n_embd",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "d_ff": "n_inner",
        "max_seq_len": "n_positions",
        "norm_eps": "layer_norm_epsilon",
        "dropout": "resid_pdrop",
    }


def _config_from_hf(path: Path, hf: Any) -> Decoder:
    """Return our settings for theirs; an ArtifactError names every one of theirs that we have no setting for."""
    if hf.model_type not in ("llama", "gpt2"):
        raise ArtifactError(f"{path}: model_type: wanted llama or gpt2, found {hf.model_type}")
    llama = hf.model_type == "llama"
    wanted = _wanted_of_llama(hf) if llama else _wanted_of_gpt2(hf)
    problems = [f"{path}: {name}: wanted {want}, found {found}" for name, want, found in wanted if want != found]
    if problems:
        raise ArtifactError("\n".join(problems))
    fields: dict[str, Any] = {name: getattr(hf, theirs) for name, theirs in _names(llama).items()}
    if llama:
        fields["rope_theta"] = hf.rope_parameters["rope_theta"]
    else:
        fields |= {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "bias": True}
    return Decoder(**fields)


def _wanted_of_llama(hf: Any) -> list[tuple[str, Any, Any]]:
    """Return what our layers compute and what the settings of theirs say: name, wanted, found."""
    return [
        ("hidden_act", "silu", hf.hidden_act),
        ("head_dim", hf.hidden_size // hf.num_attention_heads, hf.head_dim),
        ("mlp_bias", hf.attention_bias, hf.mlp_bias),
        ("rope_parameters.rope_type", "default", hf.rope_parameters["rope_type"]),
    ]


def _wanted_of_gpt2(hf: Any) -> list[tuple[str, Any, Any]]:
    return [
        ("activation_function", "gelu_new", hf.activation_function),
        ("scale_attn_weights", True, hf.scale_attn_weights),
        ("scale_attn_by_inverse_layer_idx", False, hf.scale_attn_by_inverse_layer_idx),
        ("embd_pdrop", hf.resid_pdrop, hf.embd_pdrop),
        ("attn_pdrop", hf.resid_pdrop, hf.attn_pdrop),
    ]


def _load(directory: Path, dtype: torch.dtype | str) -> Any:
    """Return transformers' own model of a local directory; nothing is fetched and none of its weights is made up."""
    from transformers import AutoModelForCausalLM

    try:
        with _no_progress_bar():
            hf_model, info = AutoModelForCausalLM.from_pretrained(
                directory, dtype=dtype, local_files_only=True, output_loading_info=True
            )
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{directory}: transformers cannot load it: {str(error).splitlines()[0]}") from None
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            raise ArtifactError(f"{directory / WEIGHTS_FILE}: {problem.replace('_', ' ')}: {sorted(info[problem])}")
    return hf_model.eval()


@torch.inference_mode()
def _largest_difference(model: Transformer, directory: Path, ids_BT: Tensor) -> float:
    ours = copy.deepcopy(model).cpu().float().eval()
    logits_BTV = ours(ids_BT.cpu())
    difference: float = (logits_BTV - _load(directory, torch.float32)(ids_BT.cpu()).logits).abs().max().item()
    return difference


def _write_tokenizer(source: Path, directory: Path, special_ids: Mapping[str, int], config: Decoder) -> None:
    """Copy `tokenizer.json`, write the file that says how to load it, and check that it loads as it was."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not source.is_file():
        raise ArtifactError(f"{source}: no such file; wanted a tokenizer in Hugging Face's format")
    try:
        vocabulary = PreTrainedTokenizerFast(tokenizer_file=str(source)).get_vocab()
    except Exception as error:  # the library raises no narrower one
        raise ArtifactError(f"{source}: not a tokenizer in Hugging Face's format ({error})") from None
    tokens = {token_id: token for token, token_id in vocabulary.items()}
    if max(tokens) >= config.real_vocab_size:
        raise ArtifactError(f"{source}: has the id {max(tokens)}, but the model's vocab_size is {config.vocab_size}")
    if unknown := [f"{name}_id {token_id}" for name, token_id in special_ids.items() if token_id not in tokens]:
        raise ArtifactError(f"{source}: has no {', '.join(unknown)}")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_seq_len,
        "clean_up_tokenization_spaces": False,
    }
    settings |= {f"{name}_token": tokens[token_id] for name, token_id in special_ids.items()}
    shutil.copyfile(source, directory / "tokenizer.json")
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    if AutoTokenizer.from_pretrained(directory, local_files_only=True).get_vocab() != vocabulary:
        raise ArtifactError(
            f"{directory}: transformers loads the tokenizer with another vocabulary than it was made with"
        )


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing a bar for each file that it loads."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()
