"""Measures of training that belong into one chart: losses by term and by source, and what routers do."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.report.charts import Bar, Curve, Level, bars, line_chart
from pipeline.report.markup import Html, el
from pipeline.report.scales import Point, smooth

SMOOTHED_FROM = 40  # points; fewer are few enough to be read one by one
COLOURS = 5  # that differ; the sixth is grey
ROUTER_LOSSES = ("balance", "router_z")
LOAD = "router.load."
LAST_SHARE = 0.1  # of the steps, over which the load of an expert is averaged

Measures = Mapping[str, Sequence[Point]]


@dataclass(frozen=True)
class Group:
    """Measures that are drawn in one chart.

    Attributes:
        lines: Name of each measured at every step, and how the legend calls it.
        dots: The same of those measured now and then; one of the same label has the same colour.
    """

    title: str
    unit: str
    lines: Mapping[str, str] = field(default_factory=dict)
    dots: Mapping[str, str] = field(default_factory=dict)
    level: Level | None = None

    @property
    def names(self) -> set[str]:
        """The measures that it takes."""
        return {*self.lines, *self.dots}


def has_helpers(names: Iterable[str]) -> bool:
    """Return whether what is minimized holds terms that are no part of the loss that is validated."""
    return any(name.startswith(("loss.ahead_", "loss.distill", "loss.balance", "loss.router_z")) for name in names)


def find_groups(names: Iterable[str]) -> list[Group]:
    """Return the groups that some measures make."""
    known = dict.fromkeys(names)
    terms = [name.removeprefix("loss.") for name in known if name.startswith("loss.")]
    helpers = [term for term in terms if term in ROUTER_LOSSES]
    told = [term for term in terms if term not in ROUTER_LOSSES]
    validated = {f"validation_loss.{term}": _words(term) for term in told if f"validation_loss.{term}" in known}
    if has_helpers(known) and told and not validated and "validation_loss" in known:
        validated = {"validation_loss": _words(told[0])}
    sources = _by_source(known, "validation_loss", validated)
    bits = _by_source(known, "validation_bits_per_byte", {})
    loads = [name for name in ("router.load_max", "router.load_min") if name in known]
    found = [
        Group("Loss by term", "nats", {f"loss.{term}": _words(term) for term in told}, validated),
        Group("Validation loss by source", "nats per token", dots=sources),
        Group("Bits per byte", "of held-out text", dots=bits),
        Group("Losses of the router", "before their weights", {f"loss.{term}": _words(term) for term in helpers}),
        Group(
            "Load of an expert",
            "by the even load",
            {name: "largest" if name.endswith("max") else "smallest" for name in loads},
            level=Level(1.0, "even"),
        ),
        Group("Entropy of the router", "1 is uniform", _alone(known, "router.entropy")),
        Group("Dropped by the router", "fraction", _alone(known, "router.dropped_fraction")),
    ]
    return [group for group in found if group.names]


def draw(group: Group, measures: Measures, tokens_per_step: float | None, span: tuple[float, float]) -> Html:
    """Draw a group."""
    labels = dict.fromkeys([*group.lines.values(), *group.dots.values()])
    colours = {label: 1 + number % COLOURS for number, label in enumerate(labels)}
    drawn: list[Curve] = []
    for name, label in group.lines.items():
        drawn += _line(label, measures.get(name, ()), colours[label])
    for name, label in group.dots.items():
        known = label in group.lines.values()
        drawn.append(Curve(f"{label} validation" if known else label, measures.get(name, ()), colours[label], "dots"))
    from_zero = group.title.startswith(("Load", "Dropped"))
    return line_chart(group.title, group.unit, drawn, from_zero, group.level, tokens_per_step, span)


def expert_loads(measures: Measures) -> Html | None:
    """Show the load of every expert at the end of training, by layer; null if it was not logged."""
    layers: dict[int, dict[int, float]] = {}
    for name, points in measures.items():
        if name.startswith(LOAD):
            layer, expert = map(int, name.removeprefix(LOAD).split("."))
            last = [value for _, value in points[-max(1, round(LAST_SHARE * len(points))) :]]
            layers.setdefault(layer, {})[expert] = sum(last) / len(last)
    if not layers:
        return None
    full = max(load for experts in layers.values() for load in experts.values())
    drawn = (
        el("div", el("h4", f"Layer {layer + 1} with experts ", el("small", "by the even load")), _bars(experts, full))
        for layer, experts in sorted(layers.items())
    )
    return el("div", drawn, class_="grid loads")


def _bars(experts: Mapping[int, float], full: float) -> Html:
    rows = (Bar(f"expert {expert}", load, f"{load:.2f}") for expert, load in sorted(experts.items()))
    return bars(rows, full or 1.0)


def _by_source(known: Mapping[str, None], name: str, taken: Mapping[str, str]) -> dict[str, str]:
    """Return a measure of each source, and of all together; nothing where there are no sources."""
    prefix = f"{name}."
    sources = {n: n.removeprefix(prefix).replace(".", " ") for n in known if n.startswith(prefix) and n not in taken}
    return {name: "all", **sources} if sources and name in known else sources


def _alone(known: Mapping[str, None], name: str) -> dict[str, str]:
    return {name: name} if name in known else {}


def _line(label: str, points: Sequence[Point], colour: int) -> list[Curve]:
    """Return one curve, or where there are many points a faint one and the smoothed one over it."""
    if len(points) < SMOOTHED_FROM:
        return [Curve(label, points, colour)]
    faint = Curve(f"{label} each step", points, colour, "faint", in_legend=False)
    return [faint, Curve(label, smooth(points), colour, is_derived=True)]


def _words(name: str) -> str:
    return name.replace("_", " ")
