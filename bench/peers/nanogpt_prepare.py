"""What nanoGPT's prepare scripts do: JSONL, map one document at a time with tiktoken, one file of uint16.

python nanogpt_prepare.py INPUT OUT TOKENIZER
"""

import json
import sys

import numpy as np
import tiktoken
from datasets import load_dataset

source, out, directory = sys.argv[1:]
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # of GPT-2
SHOWN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
HIDDEN = [byte for byte in range(256) if byte not in SHOWN]
BYTES = {chr(byte): byte for byte in SHOWN} | {chr(256 + number): byte for number, byte in enumerate(HIDDEN)}

with open(f"{directory}/tokenizer.json", encoding="utf-8") as file:
    vocabulary = json.load(file)["model"]["vocab"]
end = vocabulary.pop("<|endoftext|>", len(vocabulary))
ranks = {bytes(BYTES[character] for character in token): number for token, number in vocabulary.items()}
encoding = tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": end})


def encode(row: dict[str, str]) -> dict[str, list[int] | int]:
    """Return the ids of a text."""
    ids = [*encoding.encode_ordinary(row["text"]), end]
    return {"ids": ids, "len": len(ids)}


data = load_dataset("json", data_files=source, split="train", cache_dir=f"{out}/cache")
data = data.map(encode, remove_columns=data.column_names)
total = int(np.sum(data["len"], dtype=np.uint64))
values = np.memmap(f"{out}/train.bin", dtype=np.uint16, mode="w+", shape=(total,))
place, shards = 0, min(1024, len(data))
for number in range(shards):
    shard = data.shard(num_shards=shards, index=number, contiguous=True).with_format("numpy")
    ids = np.concatenate(shard["ids"])
    values[place : place + len(ids)] = ids
    place += len(ids)
values.flush()
print(json.dumps({"tokens": total}))
