"""What every chart stands in: a titled figure, a scale from values to places, and axes with round ticks.

Places are in percent of the plot, so that a chart takes any width and its letters keep their size. Labels stand
outside the plot, in the padding that the style sheet leaves for them.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.report.markup import Child, Html, el
from pipeline.report.scales import tick_labels


@dataclass(frozen=True)
class Scale:
    """From values to places: in percent of the plot from the left, and from the top.

    Attributes:
        y_ticks: The first and the last are the ends of the axis.
        log: Whether the horizontal axis is logarithmic.
    """

    x_low: float
    x_high: float
    y_ticks: Sequence[float]
    log: bool = False

    def x(self, value: float) -> float:
        """Return the place of an x."""
        if self.log:
            return 100 * math.log(value / self.x_low) / math.log(self.x_high / self.x_low)
        return 100 * (value - self.x_low) / (self.x_high - self.x_low)

    def y(self, value: float) -> float:
        """Return the place of a y, on the edge if it lies beyond."""
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return min(100.0, max(0.0, 100 * (high - value) / (high - low)))


def figure(title: str, unit: str, plot: Child, legend: Child = None, note: str | None = None) -> Html:
    """Return a chart with its title, and a note under it."""
    caption = el("figcaption", el("b", title), " ", el("span", unit, class_="unit"), legend)
    return el("figure", caption, plot, el("p", note, class_="note") if note else None, class_="chart")


def plot(drawing: Child, label: str, below: Sequence[str], class_: str = "") -> Html:
    """Return a drawing with room for the labels around it.

    Args:
        label: What the drawing shows, for those who cannot see it.
        below: The unit of each row of labels under it.
    """
    rows = [el("span", unit) for unit in below]
    frame = el("svg", drawing, class_="frame", role="img", aria_label=label)
    return el("div", frame, el("div", rows, class_="x-unit"), class_=f"plot rows-{len(rows)} {class_}".strip())


def y_axis(scale: Scale) -> Html:
    """Draw the horizontal grid and its labels."""
    drawn = []
    for value, label in zip(scale.y_ticks, tick_labels(scale.y_ticks), strict=True):
        height = place(scale.y(value))
        drawn.append(el("line", x1="0", x2="100%", y1=height, y2=height, class_="base" if value == 0 else None))
        drawn.append(el("text", label, x="0", y=height, dx="-8", dy="4"))
    return el("g", drawn, class_="axis y")


def x_axis(scale: Scale, values: Iterable[float], *rows: Sequence[str]) -> Html:
    """Draw ticks under the plot, with one or more rows of labels."""
    drawn = []
    for number, value in enumerate(values):
        where = place(scale.x(value))
        drawn.append(el("line", x1=where, x2=where, y1="100%", y2="100%", class_="tick"))
        drawn += [el("text", labels[number], x=where, y="100%", dy=20 + 17 * row) for row, labels in enumerate(rows)]
    return el("g", drawn, class_="axis x")


def hit(left: float, width: float, *lines: str) -> Html:
    """Return a column of the plot that tells `lines` to a pointer."""
    title = el("title", "\n".join(lines))
    return el("rect", title, x=place(left), width=place(width), y="0", height="100%", class_="hit")


def place(value: float) -> str:
    """Return a place or a length in percent as an attribute."""
    return f"{value:.2f}".rstrip("0").rstrip(".") + "%"
