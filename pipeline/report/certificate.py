"""What a certificate says: how far each layout ended from one process."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.entries import Entry
from pipeline.report.markup import Child, Html, el, join
from pipeline.report.numerals import plural

ERRORS = {"loss": "Loss", "grad_norm": "Gradient norm", "weights": "Weights"}
LEGEND = (
    "Errors are relative, against a single process in plain PyTorch and fp64: of the worst step's loss and gradient "
    "norm, and of the worst parameter by what it has learned. In brackets: the most that rounding may do."
)


def certificates(entries: Sequence[Entry]) -> Html | None:
    """Show the worst error of each precision beside its bound, and every layout that was tried."""
    proven = [entry for entry in entries if entry.certificate]
    drawn = [el("div", el("h3", entry.name) if len(proven) > 1 else None, _certificate(entry)) for entry in proven]
    return join(drawn) if drawn else None


def _certificate(entry: Entry) -> Html:
    rows: Sequence[Mapping[str, Any]] = entry.certificate["rows"]
    bounds: Mapping[str, Mapping[str, float]] = entry.certificate["bounds"]
    summary = _table(
        ("Precision", "Layouts", *ERRORS.values()),
        (
            _worst(precision, [row for row in rows if row["precision"] == precision], bounds[precision])
            for precision in bounds
        ),
    )
    every = _table(
        ("Layout", *ERRORS.values(), "Worst parameter"),
        ([row["layout"], *(_error(row[name]) for name in ERRORS), el("code", row["worst"])] for row in rows),
    )
    heading = el("summary", el("b", f"All {plural(len(rows), 'row')}"), " ", el("span", "random numbers too"))
    return el("div", summary, el("p", LEGEND, class_="quiet"), el("details", heading, every))


def _worst(precision: str, rows: Sequence[Mapping[str, Any]], bound: Mapping[str, float]) -> list[Child]:
    """Return the cells of one precision."""
    worst = {name: max((row[name] for row in rows), default=None) for name in ERRORS}
    cells = ([_error(worst[name]), " ", el("small", f"({bound[name]:.0e})")] for name in ERRORS)
    return [precision, len(rows), *cells]


def _error(error: float | None) -> str:
    return "" if error is None else f"{error:.1e}"


def _table(headings: Sequence[str], rows: Any) -> Html:
    head = el("tr", (el("th", heading, scope="col") for heading in headings))
    body = (el("tr", el("th", first, scope="row"), (el("td", cell) for cell in others)) for first, *others in rows)
    return el("div", el("table", el("thead", head), el("tbody", body), class_="layouts"), class_="scroll")
