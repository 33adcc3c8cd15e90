import json

import pytest

from pipeline.artifact import InputRecord, Made, Manifest, open_artifact, record_file, write_manifest
from pipeline.errors import ArtifactError, ConfigError
from pipeline.settings import Input, decode, encode, marked
from pipeline.stage import Run
from pipeline.stages.report import Report
from pipeline.text.token_parts import TokenWriter

MADE = Made(version="0", commit=None, python="3", host="here", time="2025-07-03T14:02:11Z", seconds=1.5, ranks=1)
LENGTHS = [3, 3, 500]
VOCABULARY = {
    "vocab_size": 4,
    "fertility": 1.5,
    "unused_fraction": 0.25,
    "round_trip_fraction": 1.0,
    "sampled": {"documents": 2, "exact": 2, "tokens": 6, "words": 4},
    "sources": [{"name": "raw", "documents": 6, "bytes": 1012, "tokens": 1012}],
    "languages": [],
    "longest": [{"id": 1, "text": "word", "count": 9}],
    "unused": {"tokens": 1, "longest": ["x"]},
    "counts": [1000, 9, 3, 0],
}


def make(root, stage, kind, stats, names=(), needs=None):
    """Turn the files `names` in a directory into an artifact."""
    directory = root / stage
    directory.mkdir(exist_ok=True)
    inputs = {name: InputRecord(path=f"../{other}", fingerprint=other) for name, other in (needs or {}).items()}
    manifest = Manifest(
        kind=kind,
        name=stage,
        fingerprint=stage,
        stage={"kind": stage},
        inputs=inputs,
        files={name: record_file(directory / name) for name in names},
        stats=stats,
        made=MADE,
    )
    write_manifest(directory, manifest)
    return open_artifact(directory)


@pytest.fixture
def inputs(tmp_path):
    """Give a corpus, its tokens in two parts, and texts made from them."""
    (tmp_path / "tokenize").mkdir()
    parts = ("held-00000.arrow", "part-00000.arrow")
    for name in parts:
        with TokenWriter(tmp_path / "tokenize" / name, "uint16") as writer:
            for length in LENGTHS:
                writer.add([f"{name}<{length}>"], ["raw"], [0] * length, [length], [length], [length])
    (tmp_path / "tokenize" / "vocabulary.json").write_text(json.dumps(VOCABULARY))
    (tmp_path / "generate").mkdir()
    rows = [{"prompt": "Once", "continuation": " upon\u2028a <script>", "new_tokens": 3}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "generate" / "samples.jsonl").write_text(text, encoding="utf-8")
    counted = {"tokens": 1012, "documents": 6, "bytes_per_token": 3.5, "dtype": "uint16", "exact": True}
    counted |= {"part_tokens": dict.fromkeys(parts, 506)}
    return {
        "tasks.clean": make(tmp_path, "clean", "corpus", {"documents_in": 8, "documents": 6, "dropped.too_short": 2}),
        "tasks.tokens": make(tmp_path, "tokenize", "tokens", counted, (*parts, "vocabulary.json"), {"corpus": "clean"}),
        "tasks.texts": make(tmp_path, "generate", "samples", {"prompts": 1, "new_tokens": 3}, ("samples.jsonl",)),
    }


def report(inputs, **settings):
    names = [name.removeprefix("tasks.") for name in inputs]
    return Report(tasks={name: f"@{name}" for name in names}, **settings)


def page_of(artifact):
    return artifact.file("index.html").read_text(encoding="utf-8").replace("\N{NARROW NO-BREAK SPACE}", " ")


def test_report_writes_a_page_and_all_numbers(run_stage, inputs, tmp_path):
    made = run_stage(report(inputs, title="Tiny <job>"), inputs, tmp_path / "report")
    assert made.names == ["index.html", "metrics.json"]
    assert "<h1>Tiny &lt;job&gt;</h1>" in page_of(made)
    assert json.loads(made.file("metrics.json").read_text()) == {
        "clean.documents_in": 8,
        "clean.documents": 6,
        "clean.dropped.too_short": 2,
        "tokens.tokens": 1012,
        "tokens.documents": 6,
        "tokens.bytes_per_token": 3.5,
        "texts.prompts": 1,
        "texts.new_tokens": 3,
    }
    assert made.stats["page_bytes"] == made.file("index.html").stat().st_size
    assert Report.headline(made.stats) == ("3 tasks", f"index.html {made.stats['page_bytes'] / 1000:.0f} kB")


def test_headlines_are_those_of_the_stages(run_stage, inputs, tmp_path):
    page = page_of(run_stage(report(inputs), inputs, tmp_path / "report"))
    for words in ("6 documents", "2 dropped", "3.50 bytes a token", "3 new tokens"):
        assert words in page


def test_lengths_are_counted_over_all_parts(run_stage, inputs, tmp_path):
    page = page_of(run_stage(report(inputs), inputs, tmp_path / "report"))
    assert "3 tokens\n4 documents, 66.7 %" in page
    assert "median <tspan>3</tspan>" in page


def test_how_the_tokenizer_fares_is_shown(run_stage, inputs, tmp_path):
    page = page_of(run_stage(report(inputs), inputs, tmp_path / "report"))
    assert "How the tokenizer fits the text" in page
    assert "<code>word</code> <small>9</small>" in page


def test_samples_are_shown_line_by_line(run_stage, inputs, tmp_path):
    page = page_of(run_stage(report(inputs), inputs, tmp_path / "report"))
    assert '<span class="prompt">Once</span> upon' in page
    assert "&lt;script&gt;" in page


def test_numbers_of_another_version_give_no_headline(run_stage, tmp_path):
    inputs = {"tasks.old": make(tmp_path, "evaluate", "report", {"score": 1.0})}
    assert "score" in page_of(run_stage(report(inputs), inputs, tmp_path / "report"))
    inputs = {"tasks.unknown": make(tmp_path, "translate", "report", {"score": 1.0})}
    assert "translate" in page_of(run_stage(report(inputs), inputs, tmp_path / "other"))


def test_damaged_tokens_are_not_read(run_stage, inputs, tmp_path):
    path = inputs["tasks.tokens"].path / "part-00000.arrow"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(ArtifactError, match=r"part-00000.arrow: damaged"):
        run_stage(report(inputs), inputs, tmp_path / "report")


def test_every_task_is_an_input_of_any_kind():
    stage = decode(Report, {"tasks": {"shard": "@shard", "model": "/models/llama"}})
    assert [(name, mark.kinds, value) for name, mark, value in marked(stage, Input)] == [
        ("tasks.shard", (), "@shard"),
        ("tasks.model", (), "/models/llama"),
    ]
    assert decode(Report, encode(stage)) == stage


def test_a_report_on_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"tasks: "):
        decode(Report, {"tasks": {}})


def test_disk_need_does_not_grow_with_the_inputs():
    stage = Report(tasks={"a": "@a"})
    assert stage.disk_bytes(1 << 40, Run(kind="local")) == stage.disk_bytes(0, Run(kind="local"))
