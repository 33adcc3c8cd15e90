"""What the tests share: a tiny job, made once."""

import os
from pathlib import Path

# Two workers share the processors, and models are tiny: threads that wait for one another cost more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from support import MODEL_TASKS, run_pipeline


@pytest.fixture(scope="session")
def tiny_tokens(tmp_path_factory) -> Path:
    """The tokens of the tiny job."""
    root = tmp_path_factory.mktemp("tokens") / "artifacts"
    run_pipeline("job=tiny", f"root={root}", *(f"~tasks.{task}" for task in (*MODEL_TASKS, "report")))
    return (root / "jobs/tiny/tokenize").resolve()


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory) -> Path:
    """The root of a finished tiny job. Tests that change it copy it first."""
    root = tmp_path_factory.mktemp("tiny") / "artifacts"
    run_pipeline("job=tiny", f"root={root}")
    return root
