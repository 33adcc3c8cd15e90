"""Measures that share a chart, and what a report says of models that are not causal."""

import json
import re

import pytest
from made_up import Job

from pipeline.report.curves import curves
from pipeline.report.groups import find_groups
from pipeline.report.page import render
from pipeline.report.summary import sentence, tiles


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path / "artifacts")


def trained(job, name="model", stats=None, **measures):
    rows = (json.dumps({"step": step, **measures}) + "\n" for step in range(1, 6))
    numbers = {"parameters": 10, "tokens": 100, "steps": 5} | (stats or {})
    stage = {"kind": "pretrain", "n": name}
    return job.add(name, "model", stage, stats=numbers, files={"metrics.jsonl": "".join(rows)}, result="loss 1.5")


def titles(html):
    return re.findall(r"<figcaption><b>([^<]+)</b> <span class=\"unit\">([^<]*)<", html)


def test_the_losses_of_all_sources_are_in_one_chart_with_one_unit(job):
    measures = {"loss": 3.0, "validation_loss": 2.0, "validation_bits_per_byte": 1.0}
    for source, loss in {"web": 2.5, "code": 1.5}.items():
        measures |= {f"validation_loss.{source}": loss, f"validation_bits_per_byte.{source}": loss / 2}
    html = curves(trained(job, **measures))
    assert titles(html) == [
        ("Loss", "nats"),
        ("Validation loss by source", "nats per token"),
        ("Bits per byte", "of held-out text"),
    ]
    assert html.count("web 2.500") == html.count("web 1.250") == 5


def test_the_terms_of_a_loss_share_a_chart_with_their_validation(job):
    terms = {"loss.masked": 5.0, "loss.next_sentence": 0.7}
    validated = {"validation_loss.masked": 5.5, "validation_loss.next_sentence": 0.6}
    html = curves(trained(job, loss=5.7, validation_loss=6.1, **terms, **validated))
    assert titles(html) == [("Loss", "nats"), ("Loss by term", "nats")]
    assert "masked validation 5.500" in html
    assert "next sentence 0.700" in html


def test_sources_with_terms_are_told_apart(job):
    names = ["loss.masked", "validation_loss", "validation_loss.web", "validation_loss.web.masked"]
    by_term, by_source = find_groups(names)
    assert (by_term.title, by_term.names) == ("Loss by term", {"loss.masked"})
    assert set(by_source.dots.values()) == {"all", "web", "web masked"}


def test_what_routers_do_is_drawn(job):
    loads = {f"router.load.{layer}.{expert}": layer + expert / 4 for layer in (0, 1) for expert in (0, 1, 2)}
    router = {"router.load_max": 1.5, "router.load_min": 0.5, "router.entropy": 0.9, "router.dropped_fraction": 0.0}
    html = curves(trained(job, loss=5.0, **{"loss.next_token": 4.9, "loss.balance": 2.0}, **router, **loads))
    assert [title for title, _ in titles(html)] == [
        "Loss",
        "Loss by term",
        "Losses of the router",
        "Load of an expert",
        "Entropy of the router",
        "Dropped by the router",
    ]
    assert "largest 1.500\nsmallest 0.500" in html
    assert "Layer 2 with experts" in html
    assert "<dt>expert 2</dt>" in html
    assert "<b>1.25</b>" in html


def test_the_loss_of_a_model_that_is_not_causal_is_shown_by_term(job):
    scored = {"loss": 5.6, "loss.masked": 4.9, "loss.next_sentence": 0.7, "perplexity": 134.0, "predicted": 800}
    job.add("exam", "report", {"kind": "evaluate"}, stats=scored, files={"metrics.json": "{}"})
    html = render("Exam", job.all)
    assert "Loss on held-out text, nats" in html
    assert "<dt>next sentence</dt>" in html
    spans = {"loss": 3.5, "perplexity": 33.1, "objective": "span_corruption"}
    job.add("spans", "report", {"kind": "evaluate", "n": 2}, stats=spans, files={"metrics.json": "{}"})
    assert "<dt>span corruption</dt>" in render("Exam", job.all)


def test_several_models_are_each_told_of(job):
    for name in ("bert", "t5"):
        trained(job, name, loss=1.0)
    said = sentence(job.all).replace("\N{NARROW NO-BREAK SPACE}", " ")
    assert said == ("bert: 10 parameters learned 100 tokens, loss 1.5; t5: 10 parameters learned 100 tokens, loss 1.5.")
    assert [label for label, _, _ in tiles(job.all)][:2] == ["parameters of bert", "parameters of t5"]
    assert sentence(job.pick("t5")).startswith("10 parameters learned 100 tokens, loss 1.5.")


def test_what_only_helps_to_learn_is_not_drawn_over_the_validation(job):
    html = curves(trained(job, loss=9.0, validation_loss=4.5, **{"loss.next_token": 4.6, "loss.ahead_1": 4.4}))
    first, second, *_ = html.split("<figure")[1:]
    assert "validation" not in first
    assert "next token validation 4.500" in second
