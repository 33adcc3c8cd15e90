"""The certificate as a user makes it: on four processes, and into the report."""

import json

import pytest
from support import run_pipeline

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("prove_whole")]


def test_every_layout_of_four_ranks_is_certified_and_reported(tmp_path):
    done = run_pipeline("stage=prove", "run.ranks=4", f"root={tmp_path}")
    assert "WRONG" not in done.stdout
    (path,) = (tmp_path / "certificate").iterdir()
    rows = json.loads((path / "certificate.json").read_text())["rows"]
    named = {row["layout"] for row in rows}
    assert all(name in done.stdout for name in named)
    for zero in range(4):
        for mesh in ("data 4 x tensor 1", "data 2 x tensor 2", "data 1 x tensor 4", "data 2 x tensor 1"):
            assert any(name.startswith(f"fp32 zero {zero}, {mesh}") for name in named)
    for choice in ("fp64", "bf16", "sequence", "full recomputation", "selective recomputation", "offload cpu"):
        assert any(choice in name for name in named)
    again = run_pipeline("stage=prove", "run.ranks=4", f"root={tmp_path}")
    assert "nothing to run" in again.stdout
    run_pipeline("stage=report", f"stage.tasks={{layouts: {path}}}", f"root={tmp_path}")
    (page,) = (tmp_path / "report").glob("*/index.html")
    text = page.read_text()
    assert f"All {len(rows)} rows" in text
    assert all(name in text for name in named)


def test_what_is_no_rounding_fails_and_leaves_its_table(tmp_path):
    settings = ("stage.steps=4", "stage.optimizer.lr=1e6", f"root={tmp_path}")  # rounding grows into anything
    done = run_pipeline("stage=prove", "run.ranks=1", *settings, status=5)
    assert "WRONG: " in done.stdout
    assert "rows are not what one process does (" in done.stderr
    (path,) = (tmp_path / "certificate").iterdir()
    assert not (path / "manifest.json").exists()
    assert any(row["problems"] for row in json.loads((path / "certificate.json").read_text())["rows"])


def test_a_vocabulary_that_does_not_divide_is_refused_before_anything_runs(tmp_path):
    settings = ("stage.model={kind: decoder, vocab_size: 61, vocab_multiple: 1}", f"root={tmp_path}")
    done = run_pipeline("stage=prove", "run.ranks=4", *settings, status=2)
    for degree in (2, 4):
        problem = f"under tensor parallelism of {degree}, the padded vocabulary (61) must be a multiple of {degree}"
        assert f"stage.model: {problem}; set vocab_multiple" in done.stderr
    assert not (tmp_path / "certificate").exists()
