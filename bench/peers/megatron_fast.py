"""Megatron-LM's tools/preprocess_data_fast.py, as it is: python megatron_fast.py CHECKOUT INPUT OUT TOKENIZER.

Its tree wants CUDA when it is imported: triton is replaced by nothing, and the arguments of training, of which the
tool needs the tokenizer's, by these alone.
"""

import argparse
import json
import runpy
import sys
from pathlib import Path
from types import ModuleType

from no_triton import Nothing

checkout, source, out, directory = sys.argv[1:]


def add_tokenizer_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the arguments that the tool reads."""
    parser.add_argument("--tokenizer-type")
    parser.add_argument("--tokenizer-model")
    parser.add_argument("--use-gigatoken", action="store_true")
    parser.set_defaults(
        chat_template=None,
        vocab_file=None,
        merge_file=None,
        special_tokens=None,
        metadata_path=None,
        pad_vocab_size=False,
        tokenizer_hf_no_use_fast=False,
        tokenizer_hf_no_include_special_tokens=True,
        trust_remote_code=False,
    )
    return parser


sys.meta_path.insert(0, Nothing())
sys.path.insert(0, checkout)
for name in ("megatron.training", "megatron.training.arguments"):
    sys.modules[name] = ModuleType(name)
sys.modules["megatron.training.arguments"]._add_tokenizer_args = add_tokenizer_args
tool = f"{checkout}/tools/preprocess_data_fast.py"
options = {"--tokenizer-type": "HuggingFaceTokenizer", "--tokenizer-model": directory, "--input": source}
sys.argv = [tool, *(word for option in options.items() for word in option), "--output-prefix", f"{out}/megatron"]
sys.argv += ["--use-gigatoken", "--append-eod"]
runpy.run_path(tool, run_name="__main__")
print(json.dumps({"tokens": Path(f"{out}/megatron_text_document.bin").stat().st_size // 2}))
