"""Charts in SVG: curves over steps, histograms on a logarithmic axis, and bars."""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Literal

from pipeline.report.frame import Scale, figure, hit, place, plot, x_axis, y_axis
from pipeline.report.markup import Html, el
from pipeline.report.numerals import amount, number, percent, plural, short
from pipeline.report.scales import Point, log_bins, log_ticks, thin, tick_labels, ticks, value_ticks

INNER = 1000  # width and height of the inner drawing, which is stretched over the plot
MAX_COLUMNS = 80  # how many columns of a chart answer to a pointer
MAX_DOTS = 60  # more dots than this would touch


@dataclass(frozen=True)
class Curve:
    """Points of one curve.

    Attributes:
        colour: Number of its colour in the style sheet.
        look: A faint or a strong line, a dashed one, or dots joined by a line.
        in_legend: Whether the legend names it.
        is_derived: Whether it was computed from another curve of the chart.
    """

    label: str
    points: Sequence[Point]
    colour: int = 1
    look: Literal["faint", "line", "dashed", "dots"] = "line"
    in_legend: bool = True
    is_derived: bool = False


@dataclass(frozen=True)
class Level:
    """A dashed line across a chart, to compare with; left out where it is far from the curves."""

    value: float
    label: str


@dataclass(frozen=True)
class Mark:
    """Steps to point out: a band from the first to the last of them, whose value is a ring if it is known."""

    step: float
    first: float
    value: float | None
    words: str


@dataclass(frozen=True)
class Bar:
    """One bar of a list; `words` say its value."""

    label: str
    value: float
    words: str
    colour: int = 1


def line_chart(
    title: str,
    unit: str,
    curves: Sequence[Curve],
    from_zero: bool = False,
    level: Level | None = None,
    tokens_per_step: float | None = None,
    span: tuple[float, float] | None = None,
    marks: Sequence[Mark] = (),
) -> Html:
    """Draw curves over steps.

    Args:
        from_zero: Let the axis of values begin at zero.
        tokens_per_step: Gives the axis a second row of labels, in tokens.
        span: First and last step to show; null shows those of the curves.
        marks: What to point out; they lie in the span.
    """
    values = [y for curve in curves for _, y in curve.points]
    measured = [y for curve in curves if not curve.is_derived for _, y in curve.points]
    thinned = [replace(curve, points=thin(curve.points)) for curve in curves if curve.points]
    low, high = _step_range(*(span or _ends(thinned)))
    scale = Scale(low, high, value_ticks(values, from_zero))
    steps = ticks(low, high, whole=True)
    rows = [tick_labels(steps)]
    if tokens_per_step:
        rows.append([short(step * tokens_per_step) for step in steps])
    drawing = [
        y_axis(scale),
        x_axis(scale, steps, *rows),
        el("g", (_band(scale, mark) for mark in marks), class_="passed") if marks else None,
        _draw_level(scale, level),
        el("svg", (_path(scale, c) for c in thinned), class_="data", viewBox=_BOX, preserveAspectRatio="none"),
        (_dots(scale, curve) for curve in thinned),
        el("g", (_ring(scale, mark) for mark in marks), class_="passed") if marks else None,
        el("g", _columns(scale, curves, tokens_per_step, marks), class_="hits"),
    ]
    below = ["step", "tokens"][: len(rows)]
    legend = _legend(curves, marks) if marks or sum(curve.in_legend for curve in curves) > 1 else None
    return figure(title, unit, plot(drawing, f"{title}, {unit}, by step", below), legend, _beyond(scale, measured))


def histogram(title: str, subtitle: str, counts: Mapping[int, int], unit: str, noun: str) -> Html:
    """Draw how many things have which size, on a logarithmic axis, with median, mean and 90th percentile (p90).

    Args:
        counts: How many there are of each size.
        unit: What sizes are counted in, in the plural.
        noun: One of the things.
    """
    bins, total = log_bins(counts), sum(counts.values())
    low, high = bins[0][0], bins[-1][1]
    scale = Scale(low, high, value_ticks([0, max(count for _, _, count in bins)]), log=True)
    sizes = log_ticks(low, high)
    drawing = [
        y_axis(scale),
        x_axis(scale, sizes, [short(size) for size in sizes]),
        el("g", (_bin(scale, *one) for one in bins if one[2]), class_="bins k1"),
        el("g", (_mark(scale, row, *mark) for row, mark in enumerate(_marks(counts))), class_="marks"),
        el("g", (_bin_hit(scale, total, unit, noun, *one) for one in bins), class_="hits"),
    ]
    return figure(title, subtitle, plot(drawing, f"{title}: {plural(total, noun)}", [unit], "marked"))


def bars(rows: Iterable[Bar], full: float) -> Html:
    """Draw bars under one another; one of value `full` takes the whole width."""
    drawn = (
        el("div", el("dt", bar.label), el("dd", el("div", meter(bar.value / full, bar.colour)), el("b", bar.words)))
        for bar in rows
    )
    return el("dl", drawn, class_="bars")


def meter(share: float, colour: int, title: str | None = None) -> Html:
    """Return a bar that takes `share` of the width of what holds it."""
    return el("i", style=f"width:{place(100 * min(1.0, share))}", class_=f"meter k{colour}", title=title)


_BOX = f"0 0 {INNER} {INNER}"


def _ends(curves: Sequence[Curve]) -> tuple[float, float]:
    steps = [x for curve in curves for x, _ in curve.points]
    return min(steps), max(steps)


def _step_range(low: float, high: float) -> tuple[float, float]:
    """Return the range of the axis of steps: from 0 if the first step is near it."""
    if low == high:
        return low - 1, high + 1
    return (0 if 0 < low <= high / 10 else low), high


def _path(scale: Scale, curve: Curve) -> Html | None:
    """Draw the line of a curve in the inner drawing."""
    if len(curve.points) < 2:
        return None
    to = INNER / 100
    places = " ".join(f"{scale.x(x) * to:.1f},{scale.y(y) * to:.1f}" for x, y in curve.points)
    return el("polyline", points=places, class_=f"{curve.look} k{curve.colour}")


def _dots(scale: Scale, curve: Curve) -> Html | None:
    """Draw the dots of a curve; one lone point is always a dot."""
    if len(curve.points) > 1 and (curve.look != "dots" or len(curve.points) > MAX_DOTS):
        return None
    places = ((place(scale.x(x)), place(scale.y(y))) for x, y in curve.points)
    return el("g", (el("circle", cx=x, cy=y, r="3.5") for x, y in places), class_=f"dots k{curve.colour}")


def _draw_level(scale: Scale, level: Level | None) -> Html | None:
    if level is None or not scale.y_ticks[0] <= level.value <= scale.y_ticks[-1]:
        return None
    height = place(scale.y(level.value))
    line = el("line", x1="0", x2="100%", y1=height, y2=height)
    return el("g", line, el("text", level.label, x="100%", y=height, dx="-4", dy="-6"), class_="level")


def _band(scale: Scale, mark: Mark) -> Html:
    """Draw the steps of a mark from half a step before to half a step after them, and a line at its own."""
    left, right = (min(100.0, max(0.0, scale.x(step))) for step in (mark.first - 0.5, mark.step + 0.5))
    at = place(scale.x(mark.step))
    band = el("rect", x=place(left), width=place(right - left), y="0", height="100%")
    return el("g", band, el("line", x1=at, x2=at, y1="0", y2="100%"))


def _ring(scale: Scale, mark: Mark) -> Html | None:
    if mark.value is None:
        return None
    return el("circle", cx=place(scale.x(mark.step)), cy=place(scale.y(mark.value)), r="4")


def _columns(
    scale: Scale, curves: Sequence[Curve], tokens_per_step: float | None, marks: Sequence[Mark]
) -> Iterable[Html]:
    """Cut the plot into columns around some of the steps; each tells the points of the curves that lie in it."""
    curves = [curve for curve in curves if curve.points]
    steps = sorted({x for curve in curves for x, _ in curve.points})
    first = {x for curve in curves if curve.look == "dots" for x, _ in thin(curve.points, MAX_COLUMNS)}
    chosen = sorted(first | set(steps[:: -(-len(steps) // MAX_COLUMNS)]))
    middles = [(a + b) / 2 for a, b in pairwise(chosen)]
    for step, left, right in zip(chosen, [scale.x_low, *middles], [*middles, scale.x_high], strict=True):
        seen = f" ({amount(step * tokens_per_step)} tokens)" if tokens_per_step else ""
        lines = [f"step {step:,.0f}{seen}"]
        for curve in curves:
            x, y = _nearest(curve.points, step)
            if left <= x <= right:
                elsewhere = f" at step {x:,.0f}" if x != step and not curve.is_derived else ""
                lines.append(f"{curve.label} {number(y)}{elsewhere}")
        lines += [mark.words for mark in marks if left <= mark.step < right or mark.step == right == scale.x_high]
        yield hit(scale.x(left), scale.x(right) - scale.x(left), *lines)


def _nearest(points: Sequence[Point], x: float) -> Point:
    """Return the point whose x is nearest; points are in the order of their x."""
    after = bisect_left(points, (x, float("-inf")))
    around = points[max(0, after - 1) : after + 1]
    return min(around, key=lambda point: abs(point[0] - x))


def _legend(curves: Sequence[Curve], marks: Sequence[Mark]) -> Html:
    named = [curve for curve in curves if curve.in_legend]
    entries = [el("span", el("i", class_=f"{c.look} k{c.colour}"), c.label) for c in named]
    passed = el("span", el("i", class_="passed"), "passed over") if marks else None
    return el("span", entries, passed, class_="legend")


def _beyond(scale: Scale, values: Sequence[float]) -> str | None:
    """Say what lies beyond the range of the axis."""
    above = [value for value in values if value > scale.y_ticks[-1]]
    below = [value for value in values if value < scale.y_ticks[0]]
    notes = []
    if above:
        notes.append(f"{plural(len(above), 'value')} above the top, the highest {number(max(above))}")
    if below:
        notes.append(f"{plural(len(below), 'value')} below the bottom, the lowest {number(min(below))}")
    return "; ".join(notes) + "." if notes else None


def _bin(scale: Scale, first: int, after: int, count: int) -> Html:
    left, top = scale.x(first), scale.y(count)
    width = max(0.1, scale.x(after) - left - 0.15)  # a gap between neighbours
    return el("rect", x=place(left), width=place(width), y=place(top), height=place(100 - top))


def _bin_hit(scale: Scale, total: int, unit: str, noun: str, first: int, after: int, count: int) -> Html:
    sizes = f"{first:,}" if after == first + 1 else f"{first:,} to {after - 1:,}"
    left = scale.x(first)
    return hit(left, scale.x(after) - left, f"{sizes} {unit}", f"{plural(count, noun)}, {percent(count / total)}")


def _marks(counts: Mapping[int, int]) -> list[tuple[str, float]]:
    """Return the (name, size) to mark in a histogram, the smallest first."""
    mean = sum(size * count for size, count in counts.items()) / sum(counts.values())
    marks = [("median", _size_at(counts, 0.5)), ("mean", mean), ("p90", _size_at(counts, 0.9))]
    return sorted(marks, key=lambda mark: mark[1])


def _size_at(counts: Mapping[int, int], share: float) -> int:
    """Return the smallest size that `share` of the things do not exceed."""
    sizes = sorted(counts)
    passed = list(accumulate(counts[size] for size in sizes))
    return sizes[bisect_left(passed, share * passed[-1])]


def _mark(scale: Scale, row: int, name: str, size: float) -> Html:
    """Draw a line from the bottom to its label, which stands in its own row above the plot."""
    at = scale.x(max(size, scale.x_low))
    anchor, dx = ("end", "-5") if at > 75 else ("start", "5")
    text = el(
        "text", f"{name} ", el("tspan", amount(size)), x=place(at), dx=dx, y=str(16 * row - 38), text_anchor=anchor
    )
    return el("g", el("line", x1=place(at), x2=place(at), y1=str(16 * row - 48), y2="100%"), text)
