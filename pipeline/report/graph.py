"""The graph of a job: tasks in layers from left to right, joined by arrows.

The layout is that of Sugiyama et al. (1981): a task stands one layer after the last of what it needs; an arrow that
passes layers gets a lane in each; lanes and tasks of a layer are ordered by the mean place of their neighbours.
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
GAP_X, GAP_Y = 30, 18
MARGIN = 11  # of a task, around its text
LINE = 16  # height of a line of text
LANE = 12  # height of an arrow that passes a layer
EDGE = 4  # around the whole drawing
LETTERS = 22  # that have room in a line


@dataclass
class Node:
    """A task, or a lane of an arrow, in its layer.

    Attributes:
        lines: The text of a task: of each line, its class in the style sheet and its words; a lane has none.
        is_outside: Whether it is an input that no task of the report made.
        y: The middle of it.
    """

    lines: Sequence[tuple[str, str]] = ()
    layer: int = 0
    is_outside: bool = False
    y: float = 0.0
    before: list["Node"] = field(default_factory=list)
    after: list["Node"] = field(default_factory=list)

    @property
    def height(self) -> float:
        """How much room it takes in its layer."""
        return 2 * MARGIN + LINE * len(self.lines) if self.lines else LANE

    @property
    def x(self) -> float:
        """Its left side."""
        return EDGE + self.layer * (WIDTH + GAP_X)


def graph(entries: Sequence[Entry]) -> Html:
    """Draw the tasks and what feeds what; inputs from outside the report are drawn with a dashed line."""
    nodes = _nodes(entries)
    arrows = _connect(nodes, entries)
    layers = _layers([*nodes.values(), *(lane for arrow in arrows for lane in arrow[1:-1])])
    _arrange(layers)
    width = max(node.x for node in nodes.values()) + WIDTH + EDGE
    height = max(node.y + node.height / 2 for layer in layers for node in layer) + EDGE
    head = el("path", d="M0,0 L7,3.5 L0,7 z")
    drawing = el(
        "svg",
        el("defs", el("marker", head, id="head", markerWidth=7, markerHeight=7, refX="6.5", refY="3.5", orient="auto")),
        (el("path", d=_line(arrow), class_="arrow", marker_end="url(#head)") for arrow in arrows),
        map(_draw, nodes.values()),
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        style=f"max-width:{1.1 * width:.0f}px;min-width:{0.9 * width:.0f}px",
        role="img",
        aria_label="Graph of the job: " + "; ".join(_sentence(entry, nodes) for entry in entries),
    )
    return el("div", drawing, class_="graph scroll", tabindex=0)


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
    lines = [("name", _cut(entry.name)), ("kind", taken)]
    lines += [("amount", line) for line in _wrap(entry.amount)]
    return lines + [("result", line) for line in _wrap(entry.result)]


def _name(record: InputRecord) -> str:
    """Return the name that an artifact from outside has in its path."""
    return _cut(PurePosixPath(record.path).name.removesuffix(f"-{record.fingerprint}"))


def _connect(nodes: Mapping[str, Node], entries: Sequence[Entry]) -> list[list[Node]]:
    """Join the nodes, give each its layer, and return every arrow as the nodes and lanes that it passes."""
    pairs = dict.fromkeys((need, entry.fingerprint) for entry in entries for need in entry.needs.values())
    for _ in nodes:  # a path is no longer than there are nodes
        for source, target in pairs:
            nodes[target].layer = max(nodes[target].layer, nodes[source].layer + 1)
    arrows = []
    for source, target in pairs:
        first, last = nodes[source], nodes[target]
        lanes = [Node(layer=n) for n in range(first.layer + 1, last.layer)]
        arrow = [first, *lanes, last]
        for left, right in pairwise(arrow):
            left.after.append(right)
            right.before.append(left)
        arrows.append(arrow)
    return arrows


def _layers(nodes: Iterable[Node]) -> list[list[Node]]:
    layers: dict[int, list[Node]] = {}
    for node in nodes:
        layers.setdefault(node.layer, []).append(node)
    return [layers[number] for number in sorted(layers)]


def _arrange(layers: Sequence[list[Node]]) -> None:
    """Give every node its height: each layer in the middle of the drawing, neighbours near each other."""
    for layer in layers:
        _stack(layer)
    for sweep in range(8):
        forth = sweep % 2 == 0
        for layer in layers if forth else reversed(layers):
            layer.sort(key=lambda node: _mean(node.before if forth else node.after, node.y))
            _stack(layer)
    top = min(layer[0].y - layer[0].height / 2 for layer in layers) - EDGE
    for layer in layers:
        for node in layer:
            node.y -= top


def _stack(layer: Sequence[Node]) -> None:
    """Set the nodes of a layer under one another, in their order, around zero."""
    top = -(sum(node.height for node in layer) + GAP_Y * (len(layer) - 1)) / 2
    for node in layer:
        node.y = top + node.height / 2
        top += node.height + GAP_Y


def _mean(nodes: Sequence[Node], otherwise: float) -> float:
    return sum(node.y for node in nodes) / len(nodes) if nodes else otherwise


def _line(arrow: Sequence[Node]) -> str:
    """Return the path of an arrow: straight through its lanes, curved between layers."""
    path = f"M{arrow[0].x + WIDTH:.1f},{arrow[0].y:.1f}"
    for left, right in pairwise(arrow):
        middle = right.x - GAP_X / 2
        path += f" C{middle:.1f},{left.y:.1f} {middle:.1f},{right.y:.1f} {right.x:.1f},{right.y:.1f}"
        if right is not arrow[-1]:
            path += f" H{right.x + WIDTH:.1f}"
    return path


def _draw(node: Node) -> Html:
    """Draw a task."""
    x, top = node.x, node.y - node.height / 2
    box = el("rect", x=f"{x:.1f}", y=f"{top:.1f}", width=WIDTH, height=f"{node.height:.0f}", rx=7)
    lines = (
        el("text", words, x=f"{x + MARGIN:.1f}", y=f"{top + MARGIN + LINE * (row + 0.75):.1f}", class_=style)
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
