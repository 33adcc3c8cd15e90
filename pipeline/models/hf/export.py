"""The only door to transformers: a model goes out in Hugging Face's layout, and is loaded back to see that it is it.

transformers is imported inside the functions, because importing it takes seconds. Nothing here uses the network.
"""

import copy
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import ArtifactError, ConfigError
from pipeline.models.config import AnyModel
from pipeline.models.files import CONFIG_FILE, WEIGHTS_FILE
from pipeline.models.hf.classes import layout_of, unexportable
from pipeline.models.hf.config import to_hf_config
from pipeline.models.hf.layout import Layout, Pair
from pipeline.models.hf.load import ROWS_OF_IDS
from pipeline.models.hf.translate import t5_scales_logits
from pipeline.models.transformer import Transformer

# Special tokens that classes of tokenizers have a name for, as vocabularies spell them: <|mask|>, [MASK] or <mask>.
NAMED_TOKEN = re.compile(r"(?:<\|(\w+)\|>|\[(\w+)\]|<(\w+)>)")
NAMES = ("pad", "unk", "cls", "sep", "mask")
IDS_OF_CONFIG = {  # what each model's config.json says of special tokens
    "decoder": ("eos", "bos", "pad"),
    "encoder": ("eos", "bos", "pad", "cls", "sep"),
    "encoder_decoder": ("eos", "bos", "pad", "decoder_start"),
}


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

    The rows that pad the embedding are left out: there, `vocab_size` is the number of ids that exist. So are heads
    that predict further tokens. `tokenizer.json` is copied byte for byte; special tokens that it calls pad, cls, sep,
    mask and the like get that role. A decoder that reads an encoder starts with `eos_id`, as ours do.

    Returns:
        The largest difference between a logit of the model and one of what was written and loaded back, in fp32.

    Raises:
        ConfigError: If no layout computes this model.
        ArtifactError: If the tokenizer does not belong to the model, or does not come back the same.
    """
    if (layout := layout_of(model.config)) is None:
        raise ConfigError(str(unexportable(model.config)))
    tokens = _read_tokenizer(tokenizer_file, model.config)
    special_ids = _special_ids(tokenizer_file, tokens, {"eos": eos_id, "bos": bos_id, "pad": pad_id})
    _write_config(model, layout, directory, special_ids)
    _write_tokenizer(tokenizer_file, directory, {name: tokens[i] for name, i in special_ids.items()}, model.config)
    save_file(_to_hf(model, layout), directory / WEIGHTS_FILE, metadata={"format": "pt"})
    return _largest_difference(model, layout, directory, check_ids_BT.cpu())


def _to_hf(model: Transformer, layout: Layout) -> dict[str, Tensor]:
    ours, vocab_size = _scaled(model, layout), model.config.real_vocab_size
    state: dict[str, Tensor] = {}
    for pair in layout.pairs(model.config):
        parts = [ours[name][:vocab_size] if name in ROWS_OF_IDS else ours[name] for name in pair.ours]
        state |= _split(pair, torch.cat(parts, dim=pair.dim))
    for theirs, name in layout.absent.items():
        if name not in ours:
            state[theirs] = ours["embedding.weight"].new_zeros(1, model.config.d_model)
    return state


def _split(pair: Pair, tensor: Tensor) -> dict[str, Tensor]:
    tensors = list(tensor) if pair.stacked else [tensor.T if pair.transposed else tensor]
    return {name: part.contiguous() for name, part in zip(pair.theirs, tensors, strict=True)}


def _scaled(model: Transformer, layout: Layout) -> dict[str, Tensor]:
    """Return the weights on the CPU; they take up the scales that no layout has a setting for.

    Logits that are multiplied are the same as a last norm that is, and scores the same as queries that are.
    """
    config = model.config
    embedding, logits = config.embedding_scale or 1.0, model.output().scale
    if config.kind == "encoder_decoder" and t5_scales_logits(config):
        logits /= config.logit_scale or 1.0
    if config.tie_embeddings:
        logits /= embedding
    plain = config.head_dim**-0.5
    scores = (config.attention_scale or plain) / (layout.attention_scale or plain)
    scales = {
        r"^embedding\.": embedding,
        r"^head_transform\.norm\." if config.kind == "encoder" else r"^decoder\.norm\.": logits,
        r"\.query_norm\." if config.qk_norm else r"\.query\.": scores,
    }
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    for pattern, scale in scales.items():
        if scale != 1.0:
            state |= {name: tensor * scale for name, tensor in state.items() if re.search(pattern, name)}
    return state


def _write_config(model: Transformer, layout: Layout, directory: Path, special_ids: Mapping[str, int]) -> None:
    from transformers import GenerationConfig

    start = getattr(model.config, "decoder_start_id", None)
    known = {**special_ids, "decoder_start": special_ids.get("eos") if start is None else start}
    if layout.kind != "decoder":  # they are batched with padding, which is masked: any id will do
        known = {"pad": special_ids.get("eos"), **known}
    ids = {name: known.get(name) for name in IDS_OF_CONFIG[layout.kind]}
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    text = json.dumps(to_hf_config(model.config, layout, dtype, ids), indent=2, sort_keys=True)
    (directory / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    if layout.kind != "encoder":
        GenerationConfig(**{f"{name}_token_id": number for name, number in ids.items()}).save_pretrained(directory)


def _read_tokenizer(path: Path, config: AnyModel) -> dict[int, str]:
    """Return the vocabulary, after a check that all of its ids are the model's."""
    from transformers import PreTrainedTokenizerFast

    if not path.is_file():
        raise ArtifactError(f"{path}: no such file; wanted a tokenizer in Hugging Face's format")
    try:
        vocabulary = PreTrainedTokenizerFast(tokenizer_file=str(path)).get_vocab()
    except Exception as error:  # the library raises no narrower one
        raise ArtifactError(f"{path}: not a tokenizer in Hugging Face's format ({error})") from None
    tokens = {number: token for token, number in vocabulary.items()}
    if max(tokens) >= config.real_vocab_size:
        raise ArtifactError(f"{path}: has the id {max(tokens)}, but the model's vocab_size is {config.vocab_size}")
    return tokens


def _special_ids(path: Path, tokens: Mapping[int, str], given: Mapping[str, int | None]) -> dict[str, int]:
    """Return the ids of special tokens by role: those that are given, and those whose text is the name of a role."""
    special_ids = {}
    for added in json.loads(path.read_text(encoding="utf-8")).get("added_tokens", []):
        match = NAMED_TOKEN.fullmatch(added["content"])
        name = (match[match.lastindex or 0] if match else "").lower()
        if added["special"] and name in NAMES:
            special_ids[name] = added["id"]
    special_ids |= {name: number for name, number in given.items() if number is not None}
    if unknown := [f"{name}_id {number}" for name, number in special_ids.items() if number not in tokens]:
        raise ArtifactError(f"{path}: has no {', '.join(unknown)}")
    return special_ids


def _write_tokenizer(source: Path, directory: Path, special_tokens: Mapping[str, str], config: AnyModel) -> None:
    """Copy `tokenizer.json`, write the file that says how to load it, and check that it loads as it was."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_seq_len,
        "clean_up_tokenization_spaces": False,
    }
    settings |= {f"{name}_token": token for name, token in special_tokens.items()}
    shutil.copyfile(source, directory / "tokenizer.json")
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    loaded = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    if loaded.get_vocab() != PreTrainedTokenizerFast(tokenizer_file=str(source)).get_vocab():
        raise ArtifactError(
            f"{directory}: transformers loads the tokenizer with another vocabulary than it was made with"
        )


@torch.inference_mode()
def _largest_difference(model: Transformer, layout: Layout, directory: Path, ids_BT: Tensor) -> float:
    ours, theirs = copy.deepcopy(model).cpu().float().eval(), _load(directory, layout.architecture)
    if layout.kind == "encoder_decoder":
        decoder_ids = ids_BT.flip(1)
        pairs = [(ours(ids_BT, decoder_ids=decoder_ids), theirs(ids_BT, decoder_input_ids=decoder_ids).logits)]
    elif ours.pooler is None:
        pairs = [(ours(ids_BT), theirs(ids_BT).logits)]
    else:
        made = theirs(ids_BT)
        sentence_BC = ours.sentence_logits(ours.hidden(ids_BT))
        pairs = [(ours(ids_BT), made.prediction_logits), (sentence_BC, made.seq_relationship_logits)]
    return float(max((a - b).abs().max() for a, b in pairs))


def _load(directory: Path, architecture: str) -> Any:
    """Return transformers' own model of a local directory in fp32; none of its weights is made up."""
    import transformers

    try:
        with _no_progress_bar():
            hf_model, info = getattr(transformers, architecture).from_pretrained(
                directory, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{directory}: transformers cannot load it: {str(error).splitlines()[0]}") from None
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            raise ArtifactError(f"{directory / WEIGHTS_FILE}: {problem.replace('_', ' ')}: {sorted(info[problem])}")
    return hf_model.eval()


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
