"""Hugging Face datasets: JSONL, map in batches with `tokenizers`, saved: python datasets_map.py INPUT OUT TOKENIZER."""

import json
import sys

import numpy as np
from datasets import load_dataset
from tokenizers import Tokenizer

source, out, directory = sys.argv[1:]
tokenizer = Tokenizer.from_file(f"{directory}/tokenizer.json")
tokenizer.encode_special_tokens = True
end = tokenizer.token_to_id("<|endoftext|>")


def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
    """Return the ids of some texts."""
    return {"input_ids": [[*row.ids, end] for row in tokenizer.encode_batch_fast(rows["text"])]}


data = load_dataset("json", data_files=source, split="train", cache_dir=f"{out}/cache")
data = data.map(encode, batched=True, remove_columns=data.column_names)
data.save_to_disk(f"{out}/tokens")
lengths = (len(row) for batch in data.with_format("arrow").iter(1000) for row in batch["input_ids"])
print(json.dumps({"tokens": int(np.fromiter(lengths, np.int64).sum())}))
