"""Megatron-LM's tools/preprocess_data_fast.py, as it is: python megatron_fast.py CHECKOUT INPUT OUT TOKENIZER.

Its tree wants CUDA when it is imported: triton is replaced by nothing, and the arguments of training, of which the
tool needs the tokenizer's, by these alone.
"""

import argparse
import importlib.abc
import importlib.machinery
import json
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch._inductor.select_algorithm  # noqa: F401 - torch itself is to see that there is no triton

checkout, source, out, directory = sys.argv[1:]


class Nothing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds triton and all that is in it, as something that answers to every name."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """Return where triton is: here."""
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "triton" else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Return a module that answers to every name."""
        return type("Module", (ModuleType,), {"__getattr__": lambda self, name: _answer(name)})(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Give it a version."""
        module.__version__ = "3.0.0"


def _answer(name: str) -> MagicMock:
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock()


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
