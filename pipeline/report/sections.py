"""The parts of the page that depend on what the tasks were: corpus, lengths, training, comparison, samples."""

from collections.abc import Sequence
from typing import Any

from pipeline.report.charts import Bar, bars, histogram, meter
from pipeline.report.curves import curves
from pipeline.report.entries import Entry, is_corpus
from pipeline.report.events import table
from pipeline.report.markup import Html, el, join, shown
from pipeline.report.numerals import number, percent, plural
from pipeline.text.corpus import DROPPED, SKIPPED

SCORES = (("accuracy", "accuracy"), ("macro_f1", "macro-F1"))
SPLITS = {"test": "Test", "valid": "Validation"}


def funnel(entries: Sequence[Entry]) -> Html | None:
    """Show how many documents each corpus stage was given, kept, and dropped for which reason."""
    stages = [entry for entry in entries if is_corpus(entry)]
    if not stages:
        return None
    widest = max(entry.numbers["documents_in"] for entry in stages)
    return el("div", (_funnel_stage(entry, widest) for entry in stages), class_="funnel")


def lengths(entries: Sequence[Entry]) -> Html | None:
    """Show how long the documents are, in tokens."""
    counted = [entry for entry in entries if entry.lengths]
    drawn = [
        el(
            "div",
            _subtitle(entry, counted),
            histogram("Documents", "by how many tokens they have", entry.lengths, "tokens", "document"),
        )
        for entry in counted
    ]
    return join(drawn) if drawn else None


def training(entries: Sequence[Entry]) -> Html | None:
    """Show the curves of every training, or say that there are none."""
    models = [entry for entry in entries if entry.artifact.manifest.kind == "model"]
    drawn = []
    for entry in models:
        missing = el("p", "No metrics were kept, so there are no curves.", class_="quiet")
        drawn.append(el("div", _subtitle(entry, models), _compiled(entry), curves(entry) or missing, table(entry)))
    return join(drawn) if drawn else None


def comparison(entries: Sequence[Entry]) -> Html | None:
    """Show the scores of fine-tuned classifiers beside those from random weights and the majority class."""
    tuned = [entry for entry in entries if "test_accuracy" in entry.numbers]
    drawn = [el("div", _subtitle(entry, tuned), _scores(entry), class_="block") for entry in tuned]
    return join(drawn) if drawn else None


def evaluation(entries: Sequence[Entry]) -> Html | None:
    """Show loss, perplexity, and bits per byte beside those of a byte-unigram model, or the loss by its terms."""
    scored = [entry for entry in entries if entry.numbers.keys() >= {"loss", "perplexity"}]
    drawn = [el("div", _subtitle(entry, scored), _evaluated(entry), class_="block") for entry in scored]
    return join(drawn) if drawn else None


def samples(entries: Sequence[Entry]) -> Html | None:
    """Show generated texts; each prompt is set apart from its continuation."""
    drawn = []
    sampled = [entry for entry in entries if entry.samples]
    for entry in sampled:
        texts = (_sample(row) for row in entry.samples)
        drawn.append(el("div", _subtitle(entry, sampled), el("div", texts, class_="samples"), _how_sampled(entry)))
    return join(drawn) if drawn else None


def _compiled(entry: Entry) -> Html | None:
    """Say what compiling the layers cost and brought, of each training that did."""
    said = []
    for name, gain in entry.numbers.items():
        if name.endswith("compile.gain"):
            training, seconds = name.removesuffix("compile.gain").strip("/"), entry.numbers[f"{name[:-4]}seconds"]
            of = f"Of {training}, the" if training else "The"
            said.append(f"{of} layers were compiled in {seconds:.1f} s; a layer is {gain:.2f} times as fast since.")
    return el("p", " ".join(said), class_="quiet") if said else None


def _subtitle(entry: Entry, among: Sequence[Entry]) -> Html | None:
    """Name the task, where a section shows several."""
    return el("h3", entry.name) if len(among) > 1 else None


def _funnel_stage(entry: Entry, widest: float) -> Html:
    """Show one corpus stage: a bar cut into what was kept and what was not, and the same in numbers."""
    given, parts = entry.numbers["documents_in"], _fates(entry)
    bar = (meter(count / widest, colour, f"{fate}: {count:,.0f}") for fate, count, colour in parts)
    rows = (
        el(
            "tr",
            el("th", el("i", class_=f"key k{colour}"), fate, scope="row"),
            el("td", f"{count:,.0f}"),
            el("td", percent(count / given)),
        )
        for fate, count, colour in parts
    )
    documents = f"{plural(int(given), 'document')} in, {entry.numbers['documents']:,.0f} out"
    heading = el("h3", entry.name, " ", el("small", documents))
    return el("div", heading, el("div", bar, class_="stack"), el("table", el("tbody", rows)), class_="stage")


def _fates(entry: Entry) -> list[tuple[str, float, int]]:
    """Return (what became of them, how many documents, colour), those that were not wanted at all at the end."""
    dropped = sorted(_counts(entry, DROPPED), key=lambda reason: -reason[1])
    fates = [("kept", entry.numbers["documents"], 1)]
    fates += [(reason, count, min(row, 3) + 2) for row, (reason, count) in enumerate(dropped)]
    return fates + [(f"skipped by {rule}", count, 6) for rule, count in _counts(entry, SKIPPED)]


def _counts(entry: Entry, prefix: str) -> list[tuple[str, float]]:
    return [(name.removeprefix(prefix), n) for name, n in entry.numbers.items() if name.startswith(prefix) and n]


def _scores(entry: Entry) -> Html:
    numbers = entry.numbers
    groups = []
    for split in SPLITS:
        for score, title in SCORES:
            name = f"{split}_{score}"
            known = [
                (label, numbers[key], colour)
                for label, key, colour in (
                    ("fine-tuned", name, 1),
                    ("from random weights", f"baseline.{name}", 2),
                    ("majority class", f"majority.{name}", 6),
                )
                if key in numbers
            ]
            if known:
                drawn = bars((Bar(label, value, f"{value:.3f}", colour) for label, value, colour in known), full=1.0)
                groups.append(el("div", el("h4", f"{SPLITS[split]} {title} ", _examples(entry, split)), drawn))
    return el("div", groups, class_="grid")


def _examples(entry: Entry, split: str) -> Html | None:
    examples = entry.numbers.get(f"{split}_examples")
    return el("small", plural(int(examples), "example")) if examples else None


def _evaluated(entry: Entry) -> Html:
    """Show what an evaluation found: a chart, and the numbers beside it."""
    heading, rows = _bits(entry) if "bits_per_byte" in entry.numbers else _losses(entry)
    highest = max(row.value for row in rows)
    chart = el("div", el("h4", heading), bars(rows, full=highest or 1.0))
    facts = [
        ("loss", "nats"),
        ("perplexity", "per token"),
        ("tokens", "held out"),
        ("predicted", "tokens"),
        ("documents", "held out"),
    ]
    cells = (
        el("div", el("dt", name), el("dd", el("b", number(entry.numbers[name])), " ", el("small", unit)))
        for name, unit in facts
        if name in entry.numbers and not (name == "predicted" and "bits_per_byte" in entry.numbers)
    )
    return el("div", chart, el("dl", cells, class_="facts"), class_="grid")


def _bits(entry: Entry) -> tuple[str, list[Bar]]:
    """Return the bits per byte of a model, beside those of one that knows byte counts only."""
    bits, unigram = entry.numbers["bits_per_byte"], entry.numbers.get("byte_unigram_bits_per_byte")
    rows = [Bar(entry.name, bits, f"{bits:.3f}")]
    if unigram is not None:
        rows = [Bar("this model", bits, f"{bits:.3f}"), Bar("byte unigram", unigram, f"{unigram:.3f}", 6)]
    return "Bits per byte of held-out text", rows


def _losses(entry: Entry) -> tuple[str, list[Bar]]:
    """Return the loss of a model under its objective, by term if it has several."""
    terms = {name.removeprefix("loss."): n for name, n in entry.numbers.items() if name.startswith("loss.")}
    named = terms or {str(entry.artifact.stats.get("objective", entry.name)): entry.numbers["loss"]}
    rows = [Bar(name.replace("_", " "), value, f"{value:.3f}") for name, value in named.items()]
    return "Loss on held-out text, nats", rows


def _sample(row: Any) -> Html:
    prompt = el("span", shown(str(row.get("prompt", ""))), class_="prompt")
    made = str(row.get("continuation", ""))
    if row.get("answer"):
        made = f" → {made}"
    for candidates in row.get("masks", ()):
        made += "\n" + ", ".join(f"{c['token'].strip()} {percent(c['probability'])}" for c in candidates)
    return el("blockquote", prompt, shown(made), dir="auto")


def _how_sampled(entry: Entry) -> Html:
    decoding = entry.settings.get("decoding", {})
    kind = str(decoding.get("kind", "sample")).replace("_", " ")
    settings = {name: value for name, value in decoding.items() if name != "kind"}
    if kind == "sample":
        settings["seed"] = entry.settings.get("seed")
    if kind != "fill mask":
        settings["max_new_tokens"] = entry.settings.get("max_new_tokens")
    told = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items() if value is not None)
    return el("p", f"Prompts are marked. Decoding: {kind}{', ' if told else ''}{told}.", class_="quiet")
