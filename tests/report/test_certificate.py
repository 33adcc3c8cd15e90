"""The part of the page that says what layouts change."""

import pytest
from made_up import Job
from test_page import Page

from pipeline.report.page import render

BOUND = {"loss": 3e-6, "grad_norm": 2e-5, "weights": 2e-4}


def row(name, precision=None, **errors):
    numbers = {error: errors.get(error) for error in BOUND}
    worst = "embedding.weight" if precision else ""
    return {"layout": name, "precision": precision, **numbers, "worst": worst, "problems": [], "seconds": 1.0}


ROWS = [
    row("fp32 zero 1, data 2 x tensor 1", "fp32", loss=1e-7, grad_norm=2e-7, weights=9e-6),
    row("fp32 zero 3, data 1 x tensor 2", "fp32", loss=3e-8, grad_norm=5e-7, weights=1e-6),
    row("random numbers, data 2 x tensor 1"),
]


@pytest.fixture
def entry(tmp_path):
    certificate = {"bounds": {"fp32": BOUND}, "rows": ROWS}
    return Job(tmp_path).add("layouts", "certificate", {"kind": "prove"}, certificate=certificate)


def test_a_certificate_shows_the_worst_beside_its_bound_and_every_row(entry):
    text = Page(render("Layouts", [entry])).text
    assert "What layouts change" in text
    assert "fp32 2 1.0e-07 (3e-06) 5.0e-07 (2e-05) 9.0e-06 (2e-04)" in text
    assert "All 3 rows" in text
    assert "fp32 zero 3, data 1 x tensor 2 3.0e-08 5.0e-07 1.0e-06 embedding.weight" in text
    assert "random numbers, data 2 x tensor 1" in text


def test_a_page_without_certificates_has_no_such_part(tmp_path):
    other = Job(tmp_path).add("other", "report", {"kind": "evaluate"})
    assert "What layouts change" not in Page(render("None", [other])).text
