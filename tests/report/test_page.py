import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files

import pytest
from made_up import Job, make_whole_job

from pipeline.errors import ArtifactError
from pipeline.report.entries import in_order
from pipeline.report.markup import VOID, Html, el, shown
from pipeline.report.page import render
from pipeline.report.summary import sentence, tiles

SECTIONS = [
    "graph",
    "tasks",
    "corpus",
    "lengths",
    "vocabulary",
    "training",
    "evaluation",
    "comparison",
    "samples",
    "configuration",
]


class Page(HTMLParser):
    """Reads a page; fails where a tag is closed that was not the last one opened."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.tags, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag not in ("span", "tspan", "code"):
            self.texts.append(" ")

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join("".join(self.texts).replace("\N{NARROW NO-BREAK SPACE}", " ").split())

    def values(self, name):
        return [value for key, value in self.attributes if key == name]


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path / "artifacts")


@pytest.fixture
def whole_job(tmp_path):
    return make_whole_job(tmp_path / "artifacts")


def test_page_shows_every_part_of_a_whole_job(whole_job):
    page = Page(render("My job", whole_job.all))
    identities = page.values("id")
    assert [name for name in identities if name in SECTIONS] == SECTIONS
    assert len(identities) == len(set(identities))
    for words in (
        "My job",
        "3 July 2025, 14:02 UTC",
        "commit 8a6bb4f3feac",
        "host n0123",
        "2.93 M parameters learned 246 k tokens: 2.41 bits per byte on held-out text (byte unigram 4.52); "
        "fine-tuned accuracy 0.61 against 0.48 from random weights.",
        "10 min 8 tasks",
        "1,000 documents in, 900 out",
        "bad_utf8 40 4.0 %",
        "skipped by where 60 6.0 %",
        "median 40",
        "p90 900",
        "each step",
        "Learning rate",
        "clipped to 1",
        "majority class 0.200",
        "byte unigram 4.520",
        "It is a truth universally acknowledged",
        "filters.0.min_chars 20",
    ):
        assert words in page.text
    assert page.tags.count("details") == len(whole_job.all)


def test_page_asks_the_network_for_nothing(whole_job):
    text = render("My job", whole_job.all)
    page = Page(text)
    assert not page.values("src")
    assert all(link.startswith("#") for link in page.values("href"))
    assert "http" not in text
    assert "@import" not in text
    assert "link" not in page.tags


def test_generated_text_cannot_become_part_of_the_page(whole_job):
    text = render("</title><script>", whole_job.all)
    page = Page(text)
    assert page.tags.count("script") == 1
    assert "<b>bold</b>" in page.text
    assert "<script>alert('x')</script> ‹U+001B›[31m ‹U+202E› ‹U+D800› &amp;" in page.text
    assert 'a "quoted" <path>' in page.text
    assert not set(text) & set("\x1b\u202e\ud800")
    text.encode()


def test_attributes_and_children_are_escaped():
    assert el("p", "a < b", Html("<br>"), title='"x" & y') == '<p title="&quot;x&quot; &amp; y">a &lt; b<br></p>'
    assert (
        el("input", None, [1, ["two"]], checked=True, value=None, data_x_="1")
        == '<input checked data-x="1">1two</input>'
    )
    assert el("i", "a\x00b", title="\x07") == '<i title="‹U+0007›">a‹U+0000›b</i>'
    assert shown("a\u200db\n\tc") == "a\u200db\n\tc"
    assert shown("\ufeff") == '<span class="ctl">‹U+FEFF›</span>'


@pytest.mark.parametrize("name", ["shard", "tokenizer", "tokens", "model", "topics", "score", "texts"])
def test_each_task_can_be_reported_alone(whole_job, name):
    page = Page(render("Part", whole_job.pick(name)))
    assert "1 task" in page.text
    assert "From text to result" in page.text


def test_inputs_from_outside_are_drawn_but_not_reported(whole_job):
    page = Page(render("Part", whole_job.pick("tokens")))
    assert page.text.count("not in this report") == 4  # two inputs, drawn across and downwards
    assert "clean" in page.text


def test_report_on_data_alone_has_no_training(whole_job):
    page = Page(render("Data", whole_job.pick("shard", "clean", "tokens")))
    assert "Of 1,000 documents, 850 were kept and became 123 k tokens." in page.text
    assert not {"training", "samples", "comparison", "evaluation"} & set(page.values("id"))


def test_sentence_says_what_there_is(whole_job, job):
    pick = whole_job.pick
    assert sentence(pick("shard", "clean")) == "Of 1,000 documents, 850 were kept."
    assert "2.50 bits per byte on held-out text." in sentence(pick("model"))
    assert sentence(pick("score")) == "2.41 bits per byte on held-out text (byte unigram 4.52)."
    alone = job.add("alone", "model", {"kind": "finetune"}, stats={"test_accuracy": 0.7, "majority.test_accuracy": 0.2})
    assert sentence([alone]) == "Fine-tuned accuracy 0.70 against 0.20 for the majority class."
    assert sentence(pick("tokenizer")).startswith("1 task in 1")


def test_how_a_tokenizer_fares_is_shown(whole_job):
    text = render("Tokens", whole_job.pick("tokens"))
    page = Page(text)
    for words in (
        "bytes a token 3.240 123 k tokens in all",
        "tokens a word 1.250 between white space, in 4 documents",
        "never used 28.6 % 2 of 8 tokens",
        "same when decoded 75.0 % of 4 documents",
        "Bytes a token by source <books> 4.00 web 2.06",
        "Bytes a token by language the 12 largest of 20, 60.2 % of the text x0 4.00 x1 4.00",
        "␣␣<tr>⏎ 1,203",
        "‹U+001B›\N{REPLACEMENT CHARACTER} 1",
        "1 times 2 tokens, 33.3 %",
    ):
        assert words in page.text, words
    bars = re.findall(r"width:([\d.]+)%", text.split('id="vocabulary"')[1])
    assert bars[:2] == ["100", "51.59"]


def test_a_tokenizer_whose_text_has_one_source_shows_no_bars(whole_job):
    entry = whole_job.entries["tokens"]
    alone = entry.vocabulary | {"sources": entry.vocabulary["sources"][:1], "languages": []}
    page = Page(render("Tokens", [replace(entry, vocabulary=alone)]))
    assert "Longest tokens" in page.text
    assert "by source" not in page.text
    assert "by language" not in page.text


def test_what_is_listed_for_programs_is_not_shown(whole_job):
    page = Page(render("Tokens", whole_job.pick("tokens")))
    assert "bytes_per_token 3.240" in page.text
    assert "held-00000" not in page.text
    assert "part_tokens" not in page.text


def test_parallel_corpora_are_added_up(whole_job):
    counted = {"documents_in": 30, "documents": 20, "dropped.too_short": 10}
    whole_job.add("books", "corpus", {"kind": "shard"}, (), counted)
    assert sentence(whole_job.pick("shard", "clean", "books")) == "Of 1,030 documents, 870 were kept."


def test_tiles_count_what_the_model_was_made_of(job):
    job.add("en", "corpus", {"kind": "shard"}, stats={"documents_in": 10, "documents": 9})
    job.add("other", "corpus", {"kind": "clean"}, stats={"documents_in": 500, "documents": 400})
    job.add("bpe", "tokens", {"kind": "tokenize", "n": 1}, ["en"], {"tokens": 1000, "vocab_size": 256})
    job.add("gpt2", "tokens", {"kind": "tokenize", "n": 2}, ["en"], {"tokens": 7000, "vocab_size": 50257})
    stats = {"tokens": 50, "parameters": 5, "steps": 2}
    job.add("model", "model", {"kind": "pretrain"}, ["bpe"], stats)
    found = {what: (count, note) for what, count, note in tiles(job.all)}
    assert found["tokens"] == ("1,000", "vocabulary 256")
    assert found["documents"] == ("9", "of 10 read")


def test_tiles_leave_out_what_there_is_not(whole_job):
    assert [label for label, _, _ in tiles(in_order(whole_job.all))] == [
        "documents",
        "tokens",
        "parameters",
        "bits per byte",
        "test accuracy",
        "in all",
    ]
    assert [label for label, _, _ in tiles(whole_job.pick("tokenizer"))] == ["in all"]


def test_tasks_come_after_what_they_need(whole_job):
    assert whole_job.all[0].name == "texts"
    names = [entry.name for entry in in_order(whole_job.all)]
    assert names == ["shard", "clean", "tokenizer", "tokens", "model", "texts", "score", "topics"]


def test_model_without_metrics_says_so(job):
    job.add("model", "model", {"kind": "pretrain"}, stats={"parameters": 10, "tokens": 100})
    assert "No metrics were kept, so there are no curves." in Page(render("Quiet", job.all)).text


def test_steps_that_were_logged_twice_count_once(job):
    rows = '{"step": 1, "loss": 9}\n{"step": 2, "loss": 8}\n{"step": 2, "loss": 7}\n{"step": 3, "loss": 6}\n'
    entry = job.add("model", "model", {"kind": "pretrain"}, files={"metrics.jsonl": rows})
    assert [row["loss"] for row in entry.metrics] == [9, 7, 6]


def test_numbers_that_are_not_finite_are_left_out(job):
    rows = '{"step": 1, "loss": NaN, "grad_norm": Infinity}\n{"step": 2, "loss": 8, "note": "x"}\n'
    job.add(
        "model", "model", {"kind": "pretrain"}, stats={"parameters": 10, "tokens": 9}, files={"metrics.jsonl": rows}
    )
    page = Page(render("Odd", job.all))
    assert "step 2" in page.text
    assert "Gradient norm" not in page.text


def test_damaged_metrics_are_not_drawn(job):
    entry = job.add("model", "model", {"kind": "pretrain"}, files={"metrics.jsonl": '{"step": 1, "loss": 9}\n'})
    (entry.artifact.path / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n')
    with pytest.raises(ArtifactError, match=r"damaged"):
        render("Damaged", job.all)


def test_different_hosts_and_commits_are_counted(whole_job):
    entry = whole_job.entries["clean"]
    made = entry.artifact.manifest.made.model_copy(update={"host": "n0456", "commit": "0123456789ab+"})
    manifest = entry.artifact.manifest.model_copy(update={"made": made})
    other = replace(entry, artifact=replace(entry.artifact, manifest=manifest))
    page = Page(render("Two", [*whole_job.pick("shard"), other]))
    assert "2 commits" in page.text
    assert "2 hosts" in page.text
    assert "commit 0123456789ab, edited since" in Page(render("One", [other])).text


def test_report_needs_no_heavy_library():
    heavy = "{'torch', 'numpy', 'pyarrow', 'matplotlib', 'transformers'}"
    command = f"import sys, pipeline.report.page; sys.exit(bool(sys.modules.keys() & {heavy}))"
    assert subprocess.run([sys.executable, "-c", command], env=os.environ, check=False).returncode == 0


def luminance(colour):
    """Relative luminance, as WCAG 2.2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    high, low = sorted([luminance(one), luminance(other)], reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_have_the_contrast_of_wcag_aa(scheme):
    style = files("pipeline.report").joinpath("style.css").read_text()
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", re.findall(r":root \{(.*?)\}", style, re.DOTALL)[scheme]))
    for ground in ("paper", "card"):
        for text in ("ink", "soft", "accent"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        for graphic in ("c1", "c2", "c3", "c4", "c5", "c6"):
            assert contrast(colours[graphic], colours[ground]) >= 3, (graphic, ground)
    for ground in ("prompt", "ctl"):
        assert contrast(colours["ink"], colours[ground]) >= 4.5


def test_what_compiling_cost_and_brought_is_said(job):
    stats = {"parameters": 10, "tokens": 100, "compile.seconds": 12.34, "compile.gain": 1.4}
    text = render("Run", [job.add("model", "model", {"kind": "pretrain"}, stats=stats)])
    assert "The layers were compiled in 12.3 s; a layer is 1.40 times as fast since." in text
    stats = {"baseline/compile.seconds": 3.0, "baseline/compile.gain": 0.9}
    text = render("Run", [job.add("tuned", "model", {"kind": "finetune"}, stats=stats)])
    assert "Of baseline, the layers were compiled in 3.0 s; a layer is 0.90 times as fast since." in text
