"""Imports point down only, heavy libraries have one door each, and start-up loads none of them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "pipeline"

LAYERS = [  # from the top; modules of one layer may import one another, but for the three neighbours
    {"__main__", "rank"},
    {"allocation", "compose", "execute", "jobs", "operate", "perform", "plan"}
    | {"preflight", "probe", "sync", "trace", "verify", "worker"},
    {"launch", "stages"},
    {"training", "report"},
    {"text", "models", "parallel"},
    {"stage", "track"},
    {"artifact", "code", "env", "progress", "proof", "remote"},
    {"settings"},
    {"errors"},
]
NEIGHBOURS = {"text", "models", "parallel"}

DOORS = {
    "hydra": {"compose"},
    "omegaconf": {"compose"},
    "deepspeed": {"parallel.engine", "parallel.gathering"},
    "wandb": {"track"},
    "datasets": {"text.readers"},
    "pyarrow": {"text.arrow", "text.token_parts"},
    "tokenizers": {"text.tokenizers", "text.trainers"},
    "awkward": {"text.engine"},
    "gigatoken": {"text.engine"},
    "transformers": {"models.hf.export"},
    "fsspec": {"remote"},
}

MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent != PACKAGE)


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def level(module: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if module.split(".")[0] in names)


def imports(path: Path, where=ast.walk) -> set[str]:
    found = set()
    for node in where(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by full name"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_point_down(path):
    module = dotted(path)
    for name in imports(path):
        package, _, other = name.partition(".")
        if package != "pipeline" or not other or other == "__version__":
            continue
        family, top = other.split(".")[0], module.split(".")[0]
        if not any(family in names for names in LAYERS):
            continue  # a name of the package itself
        assert level(other) >= level(module), f"{module} imports {other}, which is above it"
        if {family, top} <= NEIGHBOURS:
            assert family == top, f"{module} imports its neighbour {other}"


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_a_heavy_library_has_one_door(path):
    for name in imports(path):
        doors = DOORS.get(name.split(".")[0])
        assert doors is None or dotted(path) in doors, f"{dotted(path)} imports {name}; its door is {doors}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "stages").glob("*.py")), ids=lambda path: path.stem)
def test_stages_import_nothing_heavy_at_the_top(path):
    heavy = {"torch", "numpy", "safetensors", *DOORS}
    found = {name.split(".")[0] for name in imports(path, where=lambda tree: tree.body)}
    assert not found & heavy


def test_planning_loads_nothing_heavy():
    heavy = ["torch", "numpy", "pyarrow", "deepspeed", "datasets", "transformers", "tokenizers", "wandb", "safetensors"]
    heavy += ["fsspec", "hydra"]
    code = f"import sys, pipeline, pipeline.plan, pipeline.verify; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
