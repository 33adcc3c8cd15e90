"""Tiny models of every family in Hugging Face's layout, with tokenizers, as others would have saved them."""

import json
import logging
from functools import cache
from pathlib import Path

DATA = Path(__file__).parent / "data"
TEXTS = [json.loads(line)["text"] for line in (DATA / "mini.jsonl").read_text().splitlines()]
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 48}
FAMILIES = {
    "llama": ("LlamaForCausalLM", SIZES | {"max_position_embeddings": 64, "num_key_value_heads": 1}),
    "gpt2": ("GPT2LMHeadModel", {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64}),
    "bert": ("BertForPreTraining", SIZES | {"max_position_embeddings": 64}),
    "modernbert": ("ModernBertForMaskedLM", SIZES | {"max_position_embeddings": 64, "local_attention": 8}),
    "t5": ("T5ForConditionalGeneration", {"d_model": 32, "d_kv": 16, "num_layers": 2, "num_heads": 2, "d_ff": 48}),
}


def write_hf(directory: Path, family: str, **settings) -> Path:
    """Write a model with random weights and a tokenizer of its kind, with a template, padding and truncation."""
    import torch
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    tokenizer, special = make_tokenizer(family)
    class_name, sizes = FAMILIES[family]
    model_class = getattr(transformers, class_name)
    ids = {f"{name}_token_id": tokenizer.token_to_id(token) for name, token in special.items()}
    if family == "bert":  # which says it nowhere but in its tokenizer
        ids = {"pad_token_id": ids["pad_token_id"]}
    if family == "modernbert":
        ids |= {"bos_token_id": ids["cls_token_id"], "eos_token_id": ids["sep_token_id"]}
    torch.manual_seed(0)
    shape = {"vocab_size": tokenizer.get_vocab_size(), **sizes, **ids, **settings.pop("config", {})}
    model = model_class(model_class.config_class(**shape))
    model.save_pretrained(directory, **settings)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{name}_token": token for name, token in special.items()}
    ).save_pretrained(directory)
    assert (directory / "tokenizer.json").is_file()
    return directory


def make_tokenizer(family: str):
    """Return a tokenizer, and its special tokens by what they are for."""
    import tokenizers

    text, special = _trained(family)
    return tokenizers.Tokenizer.from_str(text), special


@cache
def _trained(family: str) -> tuple[str, dict[str, str]]:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    if family in ("bert", "modernbert"):
        special = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=list(special.values()), show_progress=False)
    elif family == "t5":
        special = {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"}
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        sentinels = [f"<extra_id_{number}>" for number in range(10)]
        trainer = trainers.UnigramTrainer(
            vocab_size=400, special_tokens=[*special.values(), *sentinels], unk_token="<unk>", show_progress=False
        )
    else:
        special = {"bos": "<s>", "eos": "</s>"} if family == "llama" else {"eos": "<|endoftext|>"}
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=list(special.values()), initial_alphabet=alphabet, show_progress=False
        )
    tokenizer.train_from_iterator(TEXTS, trainer)
    closing = special.get("eos", special.get("sep"))
    template = processors.TemplateProcessing(
        single=f"$A {closing}", special_tokens=[(closing, tokenizer.token_to_id(closing))]
    )
    tokenizer.post_processor = template
    tokenizer.enable_truncation(60)
    pad = special.get("pad", "[PAD]")  # a decoder has none, so transformers adds one, for which the model has no row
    tokenizer.enable_padding(length=60, pad_token=pad, pad_id=tokenizer.token_to_id(pad) or 0)
    return tokenizer.to_str(), special
