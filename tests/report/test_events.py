import json
import re

import pytest
from made_up import Job, metrics
from test_page import Page

from pipeline.errors import ArtifactError
from pipeline.report.events import MAX_PIECES, MAX_ROWS, describe, marks, table
from pipeline.report.page import render
from pipeline.settings import encode
from pipeline.training.ledger import LEDGER, Event

SPIKE = Event(
    step=31,
    reason="the loss is 9.25, against 5.94 before (33 robust standard deviations)",
    loss=9.25,
    grad_norm=2.0,
    z=33.3,
    policy="rollback",
    rolled_back_to=20,
    skipped=[29, 30, 31],
    documents=[("web", "<b>a/1</b>", 0, 1200), ("books", "\u202eb", 3, 5)],
    num_documents=2,
)
NAN = Event(
    step=47,
    reason="the loss is nan",
    loss=None,
    grad_norm=None,
    z=None,
    policy="skip",
    rolled_back_to=None,
    skipped=[47],
)


def plain(text):
    return Page(f"<p>{text}</p>").text


@pytest.fixture
def model(tmp_path):
    """Gives the entry of a training with some events, whose curves lack the steps that were passed over."""
    job = Job(tmp_path / "artifacts")

    def add(*events, rows=None, stage=None):
        passed = {step for event in events for step in event.skipped}
        rows = rows or metrics(60)
        kept = "".join(f"{row}\n" for row in rows.splitlines() if json.loads(row)["step"] not in passed)
        ledger = "".join(json.dumps(encode(event)) + "\n" for event in events)
        files = {"metrics.jsonl": kept} | ({LEDGER: ledger} if events else {})
        return job.add("model", "model", stage or {"kind": "pretrain"}, (), {"parameters": 9, "steps": 60}, files)

    return add


def chart(text, title):
    """Return the figure of that title."""
    return next(part for part in text.split("<figure")[1:] if f"<b>{title}</b>" in part).split("</figure>")[0]


def test_events_are_marked_in_the_charts_of_loss_and_norm_alone(model):
    text = render("Run", [model(SPIKE, NAN)])
    for title, rings in (("Loss", 1), ("Gradient norm", 1), ("Learning rate", 0), ("Throughput", 0)):
        drawn = chart(text, title)
        assert drawn.count("<rect x=") - drawn.count('class="hit"') == (2 if rings else 0), title
        assert drawn.count('r="4"') == rings  # what was not finite has no place in the chart
        assert ("passed over" in drawn) == bool(rings)
    band, other = re.findall(r'<rect x="([\d.]+)%" width="([\d.]+)%" y="0" height="100%"></rect>', chart(text, "Loss"))
    assert [float(band[0]), float(band[1])] == pytest.approx([100 * 28.5 / 60, 100 * 3 / 60], abs=0.01)
    assert [float(other[0]), float(other[1])] == pytest.approx([100 * 46.5 / 60, 100 * 1 / 60], abs=0.01)
    told = re.findall(r"<title>([^<]*)</title>", chart(text, "Loss"))
    assert sum("step 31: the loss is 9.25" in column for column in told) == 1
    assert sum("step 47: the loss is nan; it was passed over" in column for column in told) == 1


def test_a_table_says_what_was_wrong_what_was_done_and_which_documents_it_was(model):
    text = render("Run", [model(SPIKE, NAN)])
    page = Page(text)
    for words in (
        "Steps that were passed over 2 events",
        "31 the loss is 9.25, against 5.94 before (33 robust standard deviations) loss 9.250, gradient norm 2",
        "back to step 20, passed over steps 29 to 31 2 pieces web <b>a/1</b> tokens 0 to 1,200 books ‹U+202E›b tokens",
        "47 the loss is nan it was passed over not known",
    ):
        assert words in page.text, words
    assert "\u202e" not in text
    assert "<b>a/1" not in text


def test_a_training_without_events_has_neither_marks_nor_table(model):
    entry = model()
    text = render("Run", [entry])
    assert entry.events == []
    assert table(entry) is None
    assert "passed over" not in text
    assert 'class="passed"' not in text


def test_an_event_beyond_the_last_row_of_metrics_stays_in_the_chart(model):
    last = NAN.model_copy(update={"step": 60, "skipped": [60]})
    places = re.findall(
        r'<line x1="([\d.]+)%" x2="[\d.]+%" y1="0" y2="100%">', chart(render("R", [model(last)]), "Loss")
    )
    assert places == ["100"]


def test_events_of_two_trainings_say_which_they_are_of(model):
    rows = metrics(20, "baseline/") + metrics(20, "finetune/", first=20)
    events = [
        NAN.model_copy(update={"training": name, "step": step, "skipped": [step]})
        for name, step in (("baseline", 7), ("finetune", 9))
    ]
    drawn = render("Run", [model(*events, rows=rows, stage={"kind": "finetune"})])
    words = Page(drawn).text
    assert "7 baseline the loss is nan" in words
    assert "9 finetune the loss is nan" in words
    assert "finetune step 9: the loss is nan" in drawn


def test_what_is_much_is_cut_and_said_so(model):
    pieces = [("web", f"d{number}", 0, 1) for number in range(MAX_PIECES + 10)]
    many = SPIKE.model_copy(update={"documents": pieces, "num_documents": 5000})
    events = [
        many,
        *(NAN.model_copy(update={"step": step, "skipped": [step]}) for step in range(100, 100 + MAX_ROWS + 2)),
    ]
    words = plain(table(model(*events)))
    assert "5,000 pieces" in words
    assert f"d{MAX_PIECES - 1} " in words
    assert f"d{MAX_PIECES} " not in words
    assert "and 4,936 more: python -m pipeline trace lists all" in words
    assert "3 more are in ledger.jsonl." in words
    assert words.count("the loss is nan") == MAX_ROWS - 1


@pytest.mark.parametrize(
    ("skipped", "words"),
    [
        ([31], "back to step 20, it was passed over"),
        ([30, 31], "back to step 20, passed over steps 30 to 31"),
        ([27, 29, 30, 31], "back to step 20, passed over steps 27, 29 to 31"),
        ([1030], "back to step 20, passed over step 1,030"),
    ],
)
def test_steps_in_words(skipped, words):
    assert describe(SPIKE.model_copy(update={"skipped": skipped})) == words


def test_marks_know_the_value_of_their_chart():
    assert [mark.value for mark in marks([SPIKE, NAN], "loss")] == [9.25, None]
    assert [mark.value for mark in marks([SPIKE, NAN], "grad_norm")] == [2.0, None]
    assert [mark.first for mark in marks([SPIKE, NAN], "loss")] == [29, 47]


def test_a_damaged_ledger_is_refused(model):
    entry = model(SPIKE)
    (entry.artifact.path / LEDGER).write_text("{}\n")
    with pytest.raises(ArtifactError, match="damaged"):
        render("Run", [entry])
