"""A triton that is not there: Megatron-LM wants it when it is imported, and uses it on a GPU only."""

import importlib.abc
import importlib.machinery
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch._inductor.select_algorithm  # noqa: F401 - torch itself is to see that there is none


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
        module.__version__ = "3.0.0"  # type: ignore[attr-defined]


def _answer(name: str) -> MagicMock:
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock()
