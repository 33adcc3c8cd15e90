"""What each task did, and everything that it was told: tables."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.report.charts import meter
from pipeline.report.entries import Entry, is_number
from pipeline.report.markup import Child, Html, el
from pipeline.report.numerals import duration, number, plural, size, when


def task_table(entries: Sequence[Entry]) -> Html:
    """Return a table of the tasks: what they made, their result, seconds, artifact and inputs."""
    names = {entry.fingerprint: entry.name for entry in entries}
    longest = max(entry.seconds for entry in entries) or 1.0
    head = el("tr", (el("th", title, scope="col") for title in ("Task", "Did", "Result", "Time", "Artifact", "Inputs")))
    rows = []
    for entry in entries:
        inputs = dict.fromkeys(names.get(fingerprint, fingerprint) for fingerprint in entry.needs.values())
        made = [el("span", f"{entry.artifact.manifest.kind} "), el("code", entry.fingerprint)]
        kind = [" ", el("small", entry.kind)] if entry.kind != entry.name else None
        cells = [
            ("Did", entry.amount),
            ("Result", entry.result),
            ("Time", [duration(entry.seconds), el("div", meter(entry.seconds / longest, 1), class_="track")]),
            ("Artifact", made),
            ("Inputs", ", ".join(inputs) or "raw files"),
        ]
        first = el("th", entry.name, kind, scope="row")
        rows.append(el("tr", first, (el("td", value, data_label=label) for label, value in cells)))
    return el("div", el("table", el("thead", head), el("tbody", rows), class_="tasks"), class_="scroll")


def configuration(entries: Sequence[Entry]) -> Html:
    """Return for every task what opens: its settings, inputs, numbers, and how it was made."""
    return el("div", map(_details, entries), class_="details")


def flat(data: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    """Yield (dotted path, value) of nested mappings; lists of plain values stay whole, as do empty ones."""
    if isinstance(data, Mapping) and data:
        for key, value in data.items():
            yield from flat(value, f"{path}.{key}" if path else str(key))
    elif isinstance(data, list) and any(isinstance(item, Mapping) for item in data):
        for place, item in enumerate(data):
            yield from flat(item, f"{path}.{place}")
    else:
        yield path, data


def _details(entry: Entry) -> Html:
    manifest = entry.artifact.manifest
    made = {
        "when": when(manifest.made.time),
        "took": f"{duration(manifest.made.seconds)} on {plural(manifest.made.ranks, 'rank')}",
        "host": manifest.made.host,
        "commit": manifest.made.commit or "not a checkout",
        "version": manifest.made.version,
        "python": manifest.made.python,
        "files": f"{plural(len(manifest.files), 'file')}, {size(sum(f.bytes for f in manifest.files.values()))}",
    }
    inputs: list[tuple[str, Child]] = [
        (name, [record.fingerprint, " ", el("small", record.path)]) for name, record in manifest.inputs.items()
    ]
    groups: list[tuple[str, list[tuple[str, Child]]]] = [
        ("Settings", [(name, el("code", _written(value))) for name, value in flat(manifest.stage)]),
        ("Inputs", inputs),
        ("Numbers", [(name, _counted(value)) for name, value in manifest.stats.items() if not _is_listing(value)]),
        ("Made", list(made.items())),
    ]
    summary = el(
        "summary",
        el("b", entry.name),
        " ",
        el("span", entry.kind) if entry.kind != entry.name else None,
        " ",
        el("code", entry.fingerprint),
    )
    return el("details", summary, el("div", (_group(title, rows) for title, rows in groups if rows), class_="groups"))


def _group(title: str, rows: Iterable[tuple[str, Child]]) -> Html:
    drawn = (el("tr", el("th", name, scope="row"), el("td", value)) for name, value in rows)
    return el("section", el("h3", title), el("table", el("tbody", drawn)))


def _written(value: Any) -> str:
    """Return a setting as it would stand in YAML, more or less."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _is_listing(value: Any) -> bool:
    """Return whether a statistic is a listing for programs, such as of every file."""
    return isinstance(value, Mapping)


def _counted(value: Any) -> str:
    return number(value) if is_number(value) else _written(value)
