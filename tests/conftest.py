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


def pytest_terminal_summary(terminalreporter) -> None:
    """Says loudly what was skipped for want of a SLURM, for a folded line among passes is easily missed."""
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if "NOT TESTED" in str(report.longrepr)]
    if skipped:
        terminalreporter.section("NOT TESTED", sep="!", red=True)
    for reason in sorted({report.longrepr[2] for report in skipped}):
        terminalreporter.write_line(reason.removeprefix("Skipped: "))
    for report in skipped:
        terminalreporter.write_line(f"  {report.nodeid}")
