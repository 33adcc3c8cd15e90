"""A made-up job: small artifacts as a whole run of the pipeline would leave them."""

import json

from pipeline.artifact import InputRecord, Made, Manifest, open_artifact, record_file, write_manifest
from pipeline.report.entries import Entry
from pipeline.settings import fingerprint

MADE = Made(
    version="0.1.0",
    commit="8a6bb4f3feac",
    python="3.11.7",
    host="n0123",
    time="2025-07-03T14:02:11+00:00",
    seconds=75.2,
    ranks=2,
)


class Job:
    """Makes artifacts with real manifests and keeps an entry of each."""

    def __init__(self, root):
        self.root, self.entries = root, {}

    def add(self, name, kind, stage, inputs=(), stats=None, files=None, made=MADE, **entry):
        """Make an artifact whose `inputs` are tasks that were added before; `files` is name → text."""
        identity = fingerprint([name, stage])
        directory = self.root / kind / f"{name}-{identity}"
        directory.mkdir(parents=True)
        for file, text in (files or {}).items():
            (directory / file).write_text(text, encoding="utf-8")
        needs = {other: self.entries[other].artifact for other in inputs}
        manifest = Manifest(
            kind=kind,
            name=name,
            fingerprint=identity,
            stage=stage,
            inputs={
                other: InputRecord(
                    path=f"../../{artifact.manifest.kind}/{artifact.path.name}",
                    fingerprint=artifact.manifest.fingerprint,
                )
                for other, artifact in needs.items()
            },
            files={file: record_file(directory / file) for file in files or {}},
            stats=stats or {},
            made=made,
        )
        write_manifest(directory, manifest)
        self.entries[name] = Entry(name, open_artifact(directory), **entry)
        return self.entries[name]

    def pick(self, *names):
        return [self.entries[name] for name in names]

    @property
    def all(self):
        return list(self.entries.values())


def metrics(steps, prefix="", first=0, valid_every=10):
    """Return the text of a metrics file of a falling loss."""
    rows = []
    for step in range(1, steps + 1):
        row = {"loss": 8 - 4 * step / steps, "lr": 1e-3, "grad_norm": 1 + step % 3, "tokens_per_s": 9000 + step}
        if step % valid_every == 0:
            row["valid_loss" if prefix else "validation_loss"] = row["loss"] + 0.1
        rows.append({"step": first + step, "time": step} | {prefix + name: value for name, value in row.items()})
    return "".join(json.dumps(row) + "\n" for row in rows)


VOCABULARY = {
    "vocab_size": 8,
    "fertility": 1.25,
    "unused_fraction": 2 / 7,
    "round_trip_documents": 4,
    "round_trip_fraction": 0.75,
    "sampled": {"documents": 4, "exact": 3, "tokens": 500, "words": 400},
    "sources": [
        {"name": "<books>", "documents": 500, "bytes": 300_000, "tokens": 75_000},
        {"name": "web", "documents": 350, "bytes": 100_000, "tokens": 48_456},
    ],
    "languages": [{"name": f"x{n}", "documents": 1, "bytes": 1000 - n, "tokens": 250} for n in range(20)],
    "longest": [{"id": 5, "text": "  <tr>\n", "count": 1203}, {"id": 7, "text": "\x1b\ufffd", "count": 1}],
    "unused": {"tokens": 2, "longest": ["zz", "z"]},
    "counts": [850, 0, 0, 120_000, 1, 1203, 1402, 1],
}

SAMPLES = [
    {"prompt": "It is a truth", "continuation": " universally acknowledged", "new_tokens": 3},
    {
        "prompt": "<b>bold</b>",
        "continuation": "<script>alert('x')</script> \x1b[31m \u202e \ud800 &amp;",
        "new_tokens": 9,
    },
]


def make_whole_job(root):
    """Return a job with every kind of task, in an order that is not that of its graph."""
    job = Job(root)
    add = job.add
    raw = {"documents_in": 1000, "documents": 900, "dropped.bad_utf8": 40, "skipped.where": 60}
    add("shard", "corpus", {"kind": "shard", "path": 'a "quoted" <path>'}, (), raw, amount="900 documents")
    cleaned = {"documents_in": 900, "documents": 850, "dropped.too_short": 50}
    add("clean", "corpus", {"kind": "clean", "filters": [{"kind": "length", "min_chars": 20}]}, ["shard"], cleaned)
    add("tokenizer", "tokenizer", {"kind": "train_tokenizer"}, ["clean"], {"vocab_size": 4096})
    counted = {"documents_in": 850, "documents": 850, "tokens": 123_456, "vocab_size": 4096, "dtype": "uint16"}
    counted |= {"bytes_per_token": 3.24, "part_tokens": {"part-00000.arrow": 120_000, "held-00000.arrow": 3456}}
    inputs = ["clean", "tokenizer"]
    drawn = {"lengths": {1: 3, 40: 500, 900: 347}, "vocabulary": VOCABULARY}
    add("tokens", "tokens", {"kind": "tokenize"}, inputs, counted, **drawn)
    learned = {"parameters": 2_930_000, "steps": 60, "tokens": 245_760, "validation_bits_per_byte": 2.5}
    add("model", "model", {"kind": "pretrain", "clip_norm": 1.0}, ["tokens"], learned, {"metrics.jsonl": metrics(60)})
    scores = {"valid_accuracy": 0.6, "test_accuracy": 0.61, "test_macro_f1": 0.5, "test_examples": 100}
    scores |= {"baseline.test_accuracy": 0.48, "majority.test_accuracy": 0.2}
    curves = metrics(20, "baseline/") + metrics(20, "finetune/", first=20)
    add("topics", "model", {"kind": "finetune"}, ["model"], scores, {"metrics.jsonl": curves})
    scored = {"loss": 3.1, "perplexity": 22.2, "bits_per_byte": 2.41, "byte_unigram_bits_per_byte": 4.52}
    add("score", "report", {"kind": "evaluate"}, ["model", "tokens"], scored, {"metrics.json": "{}"})
    add(
        "texts",
        "samples",
        {"kind": "generate", "decoding": {"kind": "sample", "temperature": 0.8}},
        ["model"],
        {"prompts": 2},
        samples=SAMPLES,
    )
    job.entries = dict(reversed(job.entries.items()))
    return job
