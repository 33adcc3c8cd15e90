"""The steps of a training that the guard let change nothing: marks in its charts, and a table of why."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal

from pipeline.report.charts import Mark
from pipeline.report.entries import Entry
from pipeline.report.markup import Child, Html, el, join
from pipeline.report.numerals import number, plural
from pipeline.training.ledger import Event, Piece

MAX_ROWS = 100  # events in the table
MAX_PIECES = 64  # of documents, of one event
HEADS = ("Step", "What was wrong", "What was done", "Documents of its batch")


def marks(events: Sequence[Event], measure: Literal["loss", "grad_norm"]) -> list[Mark]:
    """Return the marks of events in a chart of the loss or of the norm of the gradient."""
    found = []
    for event in events:
        value = event.loss if measure == "loss" else event.grad_norm
        whose = f"{event.training} " if event.training else ""
        words = f"{whose}step {event.step:,}: {event.reason}; {describe(event)}"
        found.append(Mark(event.step, min(event.skipped, default=event.step), value, words))
    return found


def table(entry: Entry) -> Html | None:
    """Return a table of the events of a training; null if there were none."""
    if not entry.events:
        return None
    several = len({event.training for event in entry.events}) > 1
    head = el("tr", (el("th", title, scope="col") for title in HEADS))
    rows = (_row(event, several) for event in entry.events[:MAX_ROWS])
    left_out = len(entry.events) - MAX_ROWS
    return join(
        [
            el("h4", "Steps that were passed over ", el("small", plural(len(entry.events), "event"))),
            el("div", el("table", el("thead", head), el("tbody", rows), class_="events"), class_="scroll"),
            el("p", f"{left_out:,} more are in ledger.jsonl.", class_="note") if left_out > 0 else None,
        ]
    )


def describe(event: Event) -> str:
    """Say what was done about an event."""
    steps = "it was passed over" if event.skipped == [event.step] else f"passed over {_steps(event.skipped)}"
    return steps if event.rolled_back_to is None else f"back to step {event.rolled_back_to:,}, {steps}"


def _row(event: Event, several: bool) -> Html:
    known = (("loss", event.loss), ("gradient norm", event.grad_norm))
    measured = ", ".join(f"{name} {number(value)}" for name, value in known if value is not None)
    step = f"{event.step:,}"
    cells: list[Child] = [
        [f"{event.reason} ", el("small", measured)],
        describe(event),
        _documents(event) if event.documents else "not known",
    ]
    first = el("th", step, [" ", el("small", event.training)] if several else None, scope="row")
    return el("tr", first, (el("td", cell) for cell in cells))


def _documents(event: Event) -> Html:
    """Return what opens to a list of the documents of the bad batch."""
    shown, left_out = event.documents[:MAX_PIECES], event.num_documents - MAX_PIECES
    lines = el("table", el("tbody", map(_piece, shown)))
    more = f"and {left_out:,} more: python -m pipeline trace lists all" if left_out > 0 else None
    return el(
        "details",
        el("summary", plural(event.num_documents, "piece")),
        lines,
        el("p", more, class_="note") if more else None,
    )


def _piece(piece: Piece) -> Html:
    source, identity, begin, end = piece
    return el("tr", el("td", source), el("td", el("code", identity)), el("td", f"tokens {begin:,} to {end:,}"))


def _steps(steps: Sequence[int]) -> str:
    """Return steps in words: "step 7", "steps 5 to 7", "steps 1, 3 to 4"."""
    return f"step{'' if len(steps) == 1 else 's'} {', '.join(_ranges(sorted(steps)))}"


def _ranges(steps: Sequence[int]) -> Iterator[str]:
    edges = [0, *(after for after, (a, b) in enumerate(pairwise(steps), 1) if b > a + 1), len(steps)]
    for begin, end in pairwise(edges):
        first, last = steps[begin], steps[end - 1]
        yield f"{first:,}" if first == last else f"{first:,} to {last:,}"
