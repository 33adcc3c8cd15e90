"""The graph of a job: tasks in layers, joined by arrows, from left to right or, for narrow screens, downwards.

The layout is that of Sugiyama et al. (1981): a task stands one layer after the last of what it needs; an arrow that
passes layers gets a lane in each; lanes and tasks of a layer are ordered by the mean place of their neighbours.
Lengths are counted along the flow and across it, and turned into x and y at the end.
"""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import PurePosixPath

from pipeline.artifact import InputRecord
from pipeline.report.entries import Entry
from pipeline.report.markup import Html, el
from pipeline.report.numerals import duration

WIDTH = 158  # of a task
BETWEEN_LAYERS, BETWEEN_TASKS = 30, 18
MARGIN = 11  # of a task, around its text
LINE = 16  # height of a line of text
LANE = 12  # room of an arrow that passes a layer
EDGE = 4  # around the whole drawing
LETTERS, NAME_LETTERS = 22, 17  # that have room in a line, and in the name at its top
SWEEPS = 8


@dataclass
class Node:
    """A task, or a lane of an arrow, in its layer.

    Attributes:
        lines: The text of a task: of each line, its class in the style sheet and its words; a lane has none.
        is_outside: Whether it is an input that no task of the report made.
        start: Where its layer begins along the flow, and
        length: how long it is there.
        middle: Its middle across the flow.
    """

    lines: Sequence[tuple[str, str]] = ()
    is_outside: bool = False
    layer: int = 0
    start: float = 0.0
    length: float = 0.0
    middle: float = 0.0
    before: list["Node"] = field(default_factory=list)
    after: list["Node"] = field(default_factory=list)

    @property
    def height(self) -> float:
        """The height of its text with the margins."""
        return 2 * MARGIN + LINE * len(self.lines)

    def breadth(self, down: bool) -> float:
        """Return the room that it takes across the flow."""
        return (WIDTH if down else self.height) if self.lines else LANE


def graph(entries: Sequence[Entry]) -> Html:
    """Draw the tasks and what feeds what; inputs from outside the report are drawn with a dashed line."""
    return el("div", _drawing(entries, down=False), _drawing(entries, down=True), class_="graph scroll", tabindex=0)


def _drawing(entries: Sequence[Entry], down: bool) -> Html:
    nodes = _nodes(entries)
    arrows = _connect(nodes, entries)
    layers = _layers([*nodes.values(), *(lane for arrow in arrows for lane in arrow[1:-1])])
    _arrange(layers, down)
    along = max(node.start + node.length for node in nodes.values()) + EDGE
    across = max(node.middle + node.breadth(down) / 2 for layer in layers for node in layer) + EDGE
    width, height = (across, along) if down else (along, across)
    head = el("path", d="M0,0 L7,3.5 L0,7 z")
    name = "head-down" if down else "head"
    lines = (el("path", d=_line(arrow, down), class_="arrow", marker_end=f"url(#{name})") for arrow in arrows)
    return el(
        "svg",
        el("defs", el("marker", head, id=name, markerWidth=7, markerHeight=7, refX="6.5", refY="3.5", orient="auto")),
        lines,
        (_draw(node, down) for node in nodes.values()),
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        style=f"width:{width:.0f}px" if down else f"max-width:{1.1 * width:.0f}px;min-width:{0.9 * width:.0f}px",
        class_="down" if down else "across",
        role="img",
        aria_label="Graph of the job: " + "; ".join(_sentence(entry, nodes) for entry in entries),
    )


def _nodes(entries: Sequence[Entry]) -> dict[str, Node]:
    """Return a node for every task and for every input that no task of the report made, by fingerprint."""
    nodes: dict[str, Node] = {}
    for entry in entries:
        for record in entry.artifact.manifest.inputs.values():
            lines = [("name", _name(record)), ("kind", "not in this report")]
            nodes.setdefault(record.fingerprint, Node(lines, is_outside=True))
        nodes[entry.fingerprint] = Node(_lines(entry))
    return nodes


def _lines(entry: Entry) -> list[tuple[str, str]]:
    """Return the text of a task: its name, its kind where that is another word, how long it took, what it did."""
    taken = duration(entry.seconds)
    if entry.kind != entry.name:
        taken = f"{_cut(entry.kind, LETTERS - len(taken) - 3)} · {taken}"
    lines = [("name", _cut(entry.name, NAME_LETTERS)), ("kind", taken)]
    lines += [("amount", line) for line in _wrap(entry.amount)]
    return lines + [("result", line) for line in _wrap(entry.result)]


def _name(record: InputRecord) -> str:
    """Return the name that an artifact from outside has in its path."""
    return _cut(PurePosixPath(record.path).name.removesuffix(f"-{record.fingerprint}"), NAME_LETTERS)


def _connect(nodes: Mapping[str, Node], entries: Sequence[Entry]) -> list[list[Node]]:
    """Join the nodes, give each its layer, and return every arrow as the nodes and lanes that it passes."""
    pairs = dict.fromkeys((need, entry.fingerprint) for entry in entries for need in entry.needs.values())
    for _ in nodes:  # a path is no longer than there are nodes
        for source, target in pairs:
            nodes[target].layer = max(nodes[target].layer, nodes[source].layer + 1)
    arrows = []
    for source, target in pairs:
        first, last = nodes[source], nodes[target]
        arrow = [first, *(Node(layer=number) for number in range(first.layer + 1, last.layer)), last]
        for one, other in pairwise(arrow):
            one.after.append(other)
            other.before.append(one)
        arrows.append(arrow)
    return arrows


def _layers(nodes: Iterable[Node]) -> list[list[Node]]:
    layers: dict[int, list[Node]] = {}
    for node in nodes:
        layers.setdefault(node.layer, []).append(node)
    return [layers[number] for number in sorted(layers)]


def _arrange(layers: Sequence[list[Node]], down: bool) -> None:
    """Give every node its place: neighbours near each other, layers in the middle or, downwards, at the left."""
    start = float(EDGE)
    for layer in layers:
        length = max(node.height for node in layer) if down else WIDTH
        for node in layer:
            node.start, node.length = start, length
        start += length + BETWEEN_LAYERS
        _stack(layer, down)
    for sweep in range(SWEEPS):
        forth = sweep % 2 == 0
        for layer in layers if forth else reversed(layers):
            layer.sort(key=lambda node: _mean(node.before if forth else node.after, node.middle))
            _stack(layer, down)
    shift = EDGE - min(layer[0].middle - layer[0].breadth(down) / 2 for layer in layers)
    for layer in layers:
        for node in layer:
            node.middle += shift


def _stack(layer: Sequence[Node], down: bool) -> None:
    """Set the nodes of a layer beside one another in their order."""
    whole = sum(node.breadth(down) for node in layer) + BETWEEN_TASKS * (len(layer) - 1)
    edge = 0.0 if down else -whole / 2
    for node in layer:
        node.middle = edge + node.breadth(down) / 2
        edge += node.breadth(down) + BETWEEN_TASKS


def _mean(nodes: Sequence[Node], otherwise: float) -> float:
    return sum(node.middle for node in nodes) / len(nodes) if nodes else otherwise


def _line(arrow: Sequence[Node], down: bool) -> str:
    """Return the path of an arrow: straight through its lanes, curved between layers."""

    def point(along: float, across: float) -> str:
        return f"{across:.1f},{along:.1f}" if down else f"{along:.1f},{across:.1f}"

    first = arrow[0]
    end = first.start + (first.height if down else first.length)
    path = f"M{point(end, first.middle)}"
    for one, other in pairwise(arrow):
        if end < one.start + one.length:
            end = one.start + one.length
            path += f" L{point(end, one.middle)}"
        bend = (end + other.start) / 2
        path += f" C{point(bend, one.middle)} {point(bend, other.middle)} {point(other.start, other.middle)}"
        end = other.start
    return path


def _draw(node: Node, down: bool) -> Html:
    """Draw a task."""
    x, y = (node.middle - WIDTH / 2, node.start) if down else (node.start, node.middle - node.height / 2)
    box = el("rect", x=f"{x:.1f}", y=f"{y:.1f}", width=WIDTH, height=f"{node.height:.0f}", rx=7)
    lines = (
        el("text", words, x=f"{x + MARGIN:.1f}", y=f"{y + MARGIN + LINE * (row + 0.75):.1f}", class_=style)
        for row, (style, words) in enumerate(node.lines)
    )
    return el("g", box, lines, class_="node outside" if node.is_outside else "node")


def _wrap(words: str) -> list[str]:
    """Return words as at most three lines that have room."""
    lines = textwrap.wrap(words, LETTERS)
    return lines if len(lines) <= 3 else [*lines[:2], _cut(" ".join(lines[2:]))]


def _cut(line: str, letters: int = LETTERS) -> str:
    """Return as much of a line as has room."""
    return line if len(line) <= letters else line[: letters - 1].rstrip() + "…"


def _sentence(entry: Entry, nodes: Mapping[str, Node]) -> str:
    sources = dict.fromkeys(nodes[fingerprint].lines[0][1] for fingerprint in entry.needs.values())
    return f"{entry.name} from {' and '.join(sources)}" if sources else entry.name
