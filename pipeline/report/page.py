"""The page: one HTML file with its style, its few lines of script and its charts in it, which needs no network."""

from collections.abc import Sequence
from importlib.resources import files

from pipeline.report.certificate import certificates
from pipeline.report.entries import Entry, in_order
from pipeline.report.graph import graph
from pipeline.report.markup import Child, Html, el
from pipeline.report.numerals import plural, when
from pipeline.report.sections import comparison, evaluation, funnel, lengths, samples, training
from pipeline.report.summary import sentence, tiles
from pipeline.report.tables import configuration, task_table
from pipeline.report.vocabulary import vocabulary


def render(title: str, entries: Sequence[Entry]) -> str:
    """Return the page that says what some tasks did.

    Raises:
        ArtifactError: If a file that it is drawn from is damaged.
    """
    entries = in_order(entries)
    sections = [
        ("graph", "From text to result", graph(entries)),
        ("tasks", "What each task did", task_table(entries)),
        ("corpus", "What was kept of the text", funnel(entries)),
        ("lengths", "How long the documents are", lengths(entries)),
        ("vocabulary", "How the tokenizer fits the text", vocabulary(entries)),
        ("training", "How training went", training(entries)),
        ("certificate", "What layouts change", certificates(entries)),
        ("evaluation", "How well the model predicts", evaluation(entries)),
        ("comparison", "What pretraining was worth", comparison(entries)),
        ("samples", "What the model writes", samples(entries)),
        ("configuration", "Everything it was told", configuration(entries)),
    ]
    present = [(name, heading, content) for name, heading, content in sections if content is not None]
    contents = el("nav", (el("a", heading, href=f"#{name}") for name, heading, _ in present), aria_label="Contents")
    body = el(
        "body", el("main", _header(title, entries), contents, (_section(*section) for section in present)), _script()
    )
    return f"<!doctype html>\n{el('html', _head(title), body, lang='en')}\n"


def _head(title: str) -> Html:
    return el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", title),
        el("style", Html(_resource("style.css"))),
    )


def _header(title: str, entries: Sequence[Entry]) -> Html:
    made = [entry.artifact.manifest.made for entry in entries]
    latest = max(one.time for one in made)
    facts = [
        el("time", when(latest), datetime=latest),
        _one_or_many("commit", [_commit(one.commit) for one in made if one.commit]),
        _one_or_many("host", [one.host for one in made]),
        _one_or_many("version", [one.version for one in made]),
    ]
    numbers = (
        el("div", el("dt", label), el("dd", el("b", value), el("small", note))) for label, value, note in tiles(entries)
    )
    return el(
        "header",
        el("p", (el("span", fact) for fact in facts if fact), class_="facts-line"),
        el("h1", title),
        el("p", sentence(entries), class_="lead"),
        el("dl", numbers, class_="tiles"),
    )


def _one_or_many(noun: str, values: Sequence[str]) -> Child:
    """Name what all tasks share, or say how many there were."""
    different = list(dict.fromkeys(values))
    if len(different) > 1:
        return f"{plural(len(different), noun)}"
    return [f"{noun} ", el("code", different[0])] if different else None


def _commit(commit: str) -> str:
    """Return a commit in words; a + says that the code was edited since."""
    return f"{commit.removesuffix('+')}, edited since" if commit.endswith("+") else commit


def _section(name: str, heading: str, content: Html) -> Html:
    return el("section", el("h2", heading), content, id=name)


def _script() -> Html:
    return el("script", Html(_resource("script.js")))


def _resource(name: str) -> str:
    return files("pipeline.report").joinpath(name).read_text(encoding="utf-8").strip()
