"""How a tokenizer fits the text: bytes a token by source and language, and what of its vocabulary is used."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.charts import Bar, bars, histogram
from pipeline.report.entries import Entry
from pipeline.report.markup import Html, el, join, shown
from pipeline.report.numerals import amount, number, percent, plural

MAX_BARS = 12
WHITE_SPACE = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"})


def vocabulary(entries: Sequence[Entry]) -> Html | None:
    """Show how the tokenizers of tokens artifacts fare on their text."""
    counted = [entry for entry in entries if entry.vocabulary]
    drawn = []
    for entry in counted:
        found = entry.vocabulary
        groups = [_by(kind, found[f"{kind}s"]) for kind in ("source", "language") if len(found[f"{kind}s"]) > 1]
        used = Counter(count for count in found["counts"] if count)
        chart = histogram("Vocabulary", "by how often each token occurs", used, "times", "token")
        parts = [_facts(entry), el("div", groups, class_="grid") if groups else None, chart, _longest(found)]
        heading = el("h3", entry.name) if len(counted) > 1 else None
        drawn.append(el("div", heading, (el("div", part, class_="block") for part in parts if part), class_="block"))
    return join(drawn) if drawn else None


def _facts(entry: Entry) -> Html:
    found = entry.vocabulary
    numbers, unused = entry.numbers, found["unused"]["tokens"]
    documents = plural(found["sampled"]["documents"], "document")
    facts = [
        ("bytes a token", number(numbers["bytes_per_token"]), f"{amount(numbers['tokens'])} tokens in all"),
        ("tokens a word", number(found["fertility"]), f"between white space, in {documents}"),
        ("never used", percent(found["unused_fraction"]), f"{unused:,} of {found['vocab_size']:,} tokens"),
        ("same when decoded", percent(found["round_trip_fraction"]), f"of {documents}"),
    ]
    cells = (el("div", el("dt", name), el("dd", el("b", value), " ", el("small", note))) for name, value, note in facts)
    return el("dl", cells, class_="facts")


def _by(kind: str, groups: Sequence[Mapping[str, Any]]) -> Html:
    """Show the bytes a token of the largest sources or languages."""
    rows = [(group["name"], group["bytes"] / max(1, group["tokens"]), group["bytes"]) for group in groups[:MAX_BARS]]
    total = sum(group["bytes"] for group in groups)
    drawn = bars(
        (Bar(name, value, f"{value:.2f}", 6 if name == "(other)" else 1) for name, value, _ in rows),
        full=max(value for _, value, _ in rows),
    )
    share = percent(sum(num_bytes for _, _, num_bytes in rows) / max(1, total))
    left_out = f"the {len(rows)} largest of {len(groups)}, {share} of the text" if len(groups) > len(rows) else ""
    return el("div", el("h4", f"Bytes a token by {kind} ", el("small", left_out)), drawn)


def _longest(found: Mapping[str, Any]) -> Html:
    """List the longest tokens and how often each occurs."""
    tokens = (
        el("span", el("code", shown(token["text"].translate(WHITE_SPACE))), " ", el("small", f"{token['count']:,}"))
        for token in found["longest"]
    )
    return el(
        "div", el("h4", "Longest tokens ", el("small", "and how often each occurs")), el("p", tokens, class_="words")
    )
