"""The curves of training, from the metrics of model artifacts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.report.charts import Curve, Level, Mark, line_chart
from pipeline.report.entries import Entry, is_number
from pipeline.report.events import marks
from pipeline.report.groups import LOAD, SMOOTHED_FROM, draw, expert_loads, find_groups, has_helpers
from pipeline.report.markup import Html, el, join
from pipeline.report.scales import Point, smooth


@dataclass(frozen=True)
class Measure:
    """How one number of a training step is drawn.

    Attributes:
        from_zero: Whether its axis begins at zero.
        is_noisy: Whether a smoothed curve is drawn over it.
    """

    title: str
    unit: str = ""
    from_zero: bool = False
    is_noisy: bool = False


MEASURES = {
    "loss": Measure("Loss", "nats", is_noisy=True),
    "lr": Measure("Learning rate", from_zero=True),
    "tokens_per_s": Measure("Throughput", "tokens/s", from_zero=True, is_noisy=True),
    "grad_norm": Measure("Gradient norm", "before clipping", from_zero=True, is_noisy=True),
    "data_wait_fraction": Measure("Waiting for data", "fraction of a step", from_zero=True, is_noisy=True),
    "validation_bits_per_byte": Measure("Bits per byte", "of held-out text"),
}
OTHER = Measure("")
ALONE, BASELINE = "", "baseline"
LOSSES = ("loss", "validation_loss", "valid_loss")  # drawn in one chart

Runs = dict[str, dict[str, list[Point]]]  # points by run ("" alone, or "finetune", "baseline") and measure


def curves(entry: Entry) -> Html | None:
    """Draw everything that a training logged; null if it logged nothing."""
    runs = read_runs(entry.metrics)
    names = dict.fromkeys(name for run in runs.values() for name in run)
    if not names:
        return None
    grouped = find_groups(runs[ALONE]) if ALONE in runs else []
    taken = {*LOSSES, *(name for group in grouped for name in group.names)}
    first = [_loss_chart(entry, runs)] if set(LOSSES) & set(names) else []
    groups = [draw(group, runs[ALONE], tokens_per_step(entry), _span(entry, runs)) for group in grouped]
    known = [name for name in MEASURES if name in names and name not in taken]
    others = [name for name in names if name not in MEASURES and name not in taken and not name.startswith(LOAD)]
    drawn = [_chart(entry, runs, name) for name in [*known, *others] if _is_curve(runs, name)]
    charts = el("div", first, groups, drawn, class_="charts")
    loads = expert_loads(runs.get(ALONE, {}))
    return charts if loads is None else join([charts, loads])


def read_runs(rows: Sequence[dict[str, float]]) -> Runs:
    """Sort metrics by run and measure; where there are several runs, the steps of each count from its own first."""
    runs: Runs = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "time") and is_number(value) and math.isfinite(value):
                run, _, measure = name.rpartition("/")
                runs.setdefault(run, {}).setdefault(measure, []).append((row["step"], value))
    if len(runs) > 1:
        for measures in runs.values():
            before = min(points[0][0] for points in measures.values()) - 1
            for measure, points in measures.items():
                measures[measure] = [(step - before, value) for step, value in points]
    return runs


def tokens_per_step(entry: Entry) -> float | None:
    """Return how many tokens a step of a training took, where its statistics say so."""
    tokens, steps = entry.numbers.get("tokens"), entry.numbers.get("steps")
    return tokens / steps if tokens and steps else None


def _is_curve(runs: Runs, name: str) -> bool:
    """Return whether a measure has points to draw: known ones always, others if there are several."""
    return name in MEASURES or any(len(run.get(name, ())) > 1 for run in runs.values())


def _loss_chart(entry: Entry, runs: Runs) -> Html:
    """Draw the loss of training and of validation."""
    drawn: list[Curve] = []
    alone = len(runs) == 1
    for colour, (run, measures) in enumerate(_ordered(runs), 1):
        drawn += _curve(run, "loss", measures.get("loss", []), colour)
        for name in () if has_helpers(measures) else LOSSES[1:]:
            if name in measures:
                label = f"{run} validation" if run else "validation"
                drawn.append(Curve(label, measures[name], 2 if alone else colour, "dots"))
    return el(
        "div",
        line_chart(
            "Loss",
            "nats",
            drawn,
            tokens_per_step=tokens_per_step(entry),
            span=_span(entry, runs),
            marks=marks(entry.events, "loss"),
        ),
        class_="wide",
    )


def _chart(entry: Entry, runs: Runs, name: str) -> Html:
    what, _, source = name.partition(".")
    title = what.replace("_", " ").capitalize() + (f" of {source}" if source else "")
    measure = MEASURES.get(name) or Measure(title)
    drawn = [
        curve
        for colour, (run, measures) in enumerate(_ordered(runs), 1)
        for curve in _curve(run, name, measures.get(name, []), colour)
    ]
    clip = entry.settings.get("clip_norm") if name == "grad_norm" else None
    level = Level(clip, f"clipped to {clip:g}") if clip else None
    passed: list[Mark] = marks(entry.events, "grad_norm") if name == "grad_norm" else []
    unit = _schedule(entry) if name == "lr" else measure.unit
    return line_chart(
        measure.title, unit, drawn, measure.from_zero, level, tokens_per_step(entry), _span(entry, runs), passed
    )


def _schedule(entry: Entry) -> str:
    """Return the name of the schedule that the rates of all steps draw."""
    kind = entry.settings.get("schedule", {}).get("kind")
    return f"{kind.replace('_', ' ')} schedule" if kind else ""


def _curve(run: str, name: str, points: Sequence[Point], colour: int) -> list[Curve]:
    """Return one curve, or where there is much noise a faint one and the smoothed one over it."""
    measure = MEASURES.get(name, OTHER)
    look: Literal["line", "dashed"] = "dashed" if run == BASELINE else "line"
    if "valid" in name:
        return [Curve(run or "validation", points, colour if run else 2, "dots")]
    if not measure.is_noisy or len(points) < SMOOTHED_FROM:
        return [Curve(run or "training", points, colour, look)]
    faint = Curve(f"{run} each step".strip(), points, colour, "faint", in_legend=not run)
    return [faint, Curve(f"{run} smoothed".strip(), smooth(points), colour, look, is_derived=True)]


def _span(entry: Entry, runs: Runs) -> tuple[float, float]:
    """Return the first and the last step of all, so that the charts of a training share one axis."""
    steps = [step for run in runs.values() for points in run.values() for step, _ in points]
    steps += [step for event in entry.events for step in (event.step, *event.skipped)]
    return min(steps), max(steps)


def _ordered(runs: Runs) -> list[tuple[str, dict[str, list[Point]]]]:
    """Return the runs with what is compared with, the baseline, at the end."""
    return sorted(runs.items(), key=lambda run: run[0] == BASELINE)
