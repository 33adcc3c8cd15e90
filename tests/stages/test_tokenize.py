import itertools
import json
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import xxhash

from pipeline import proof
from pipeline.artifact import Artifact, record_file
from pipeline.errors import ArtifactError, ConfigError, Preempted
from pipeline.proof import hash_file
from pipeline.settings import decode
from pipeline.stage import Run
from pipeline.stages.tokenize import Tokenize
from pipeline.stages.train_tokenizer import TrainTokenizer
from pipeline.text.encoding import Encoder, PartEncoder
from pipeline.text.split import held_out
from pipeline.text.token_parts import TokenWriter, open_tokens
from pipeline.text.tokenizers import load

MINI = Path(__file__).parents[1] / "data" / "mini.jsonl"
TEXTS = [*(json.loads(line)["text"] for line in MINI.read_text().splitlines()), "é漢😀 <|endoftext|> x"]


def tokenize(**settings) -> Tokenize:
    return decode(Tokenize, {"kind": "tokenize", "corpus": "@clean", "tokenizer": "@tokenizer", **settings})


def train(**settings) -> TrainTokenizer:
    return decode(TrainTokenizer, {"kind": "train_tokenizer", "corpus": "@clean", "vocab_size": 600, **settings})


@pytest.fixture
def inputs(tmp_path, texts_to_corpus, run_stage):
    corpus = texts_to_corpus(TEXTS, 8_000)
    return {"corpus": corpus, "tokenizer": run_stage(train(), {"corpus": corpus}, tmp_path / "tokenizer")}


def documents(artifact, name):
    """Yield (id, source, tokens, bytes, hash) of the documents of a file."""
    part = open_tokens(artifact.file(name))
    for batch in range(part.num_batches):
        offsets = part.offsets(batch).tolist()
        for row, (identity, source, size, text_hash) in enumerate(zip(*part.rows(batch), strict=True)):
            yield identity, source, part.tokens(*offsets[row : row + 2]).tolist(), int(size), int(text_hash)


def everything(artifact):
    return [
        one for prefix in ("part-", "held-") for name in artifact.parts(prefix) for one in documents(artifact, name)
    ]


def is_held(text, fraction):
    return bool(held_out(np.array([xxhash.xxh3_64_intdigest(text.encode())], np.uint64), fraction)[0])


def test_tokens_are_the_corpus(inputs, same_on_any_ranks):
    made = same_on_any_ranks(tokenize(held_out_fraction=0.3), inputs)
    tokenizer = load(made.file("tokenizer.json"))
    assert made.parts() == inputs["corpus"].parts()
    found = {int(identity[1:]): rest for identity, *rest in everything(made)}
    assert sorted(found) == list(range(len(TEXTS)))
    for number, text in enumerate(TEXTS):
        source, ids, num_bytes, text_hash = found[number]
        assert (source, tokenizer.decode(ids[:-1])) == ("raw", text)
        assert ids == [*tokenizer.encode(text), 0]
        assert (num_bytes, text_hash) == (len(text.encode()), xxhash.xxh3_64_intdigest(text.encode()))
    held = [number for number, text in enumerate(TEXTS) if is_held(text, 0.3)]
    in_held = [int(identity[1:]) for name in made.parts("held-") for identity, *_ in documents(made, name)]
    assert in_held == held
    assert 0 < len(held) < len(TEXTS)
    in_order = [int(identity[1:]) for name in made.parts() for identity, *_ in documents(made, name)]
    assert in_order == [number for number in range(len(TEXTS)) if number not in held]
    num_tokens, num_bytes = sum(len(one[1]) for one in found.values()), sum(one[2] for one in found.values())
    assert {name: made.stats[name] for name in made.stats if not name.startswith(("fertility", "unused", "round"))} == {
        "documents_in": 20,
        "documents": 20,
        "tokens": num_tokens,
        "bytes": num_bytes,
        "held_out.documents": len(held),
        "held_out.tokens": sum(len(found[number][1]) for number in held),
        "held_out.bytes": sum(found[number][2] for number in held),
        "vocab_size": 600,
        "end_of_text_id": 0,
        "max_token_id": max(max(one[1]) for one in found.values()),
        "bytes_per_token": num_bytes / num_tokens,
        "dtype": "uint16",
        "engine": made.stats["engine"],
        "part_tokens": {
            name: open_tokens(made.file(name)).num_tokens for name in (*made.parts("held-"), *made.parts())
        },
    }


def test_how_the_tokenizer_fares_is_told(inputs, tmp_path, run_stage):
    made = run_stage(tokenize(), inputs, tmp_path / "tokens", 2)
    found = json.loads(made.file("vocabulary.json").read_text())
    ids = [token for _, _, tokens, _, _ in everything(made) for token in tokens]
    assert found["counts"] == np.bincount(ids, minlength=600).tolist()
    assert found["unused"]["tokens"] == found["counts"][1:].count(0)
    assert made.stats["unused_fraction"] == found["unused"]["tokens"] / 599
    assert found["sources"] == [{"name": "raw"} | {name: made.stats[name] for name in ("documents", "bytes", "tokens")}]
    assert made.stats["round_trip_documents"] == len(TEXTS)  # the first documents of every part
    assert made.stats["round_trip_fraction"] == 1.0
    assert 1 < made.stats["fertility"] < 10


def test_checksums_taken_while_writing_are_those_of_the_files(inputs, tmp_path, run_stage, monkeypatch):
    read = []
    monkeypatch.setattr(proof, "hash_file", lambda path, tick: read.append(path.name) or hash_file(path, tick))
    made = run_stage(tokenize(held_out_fraction=0.3), inputs, tmp_path / "tokens")
    parts = [*made.parts(), *made.parts("held-")]
    assert len(parts) > len(made.parts()) > 0
    assert not [name for name in read if name.startswith("held-")]  # they were not read back
    for name in parts:
        assert made.manifest.files[name] == record_file(made.path / name)
    made.prove(parts)  # nor are they for training
    assert not [name for name in read if name.startswith("held-")]


def test_no_document_need_be_held_out(inputs, tmp_path, run_stage):
    made = run_stage(tokenize(held_out_fraction=0.0), inputs, tmp_path / "tokens")
    assert made.parts("held-") == []
    assert made.stats["held_out.documents"] == made.stats["held_out.tokens"] == 0


def test_a_part_may_be_held_out_as_a_whole_but_not_all(tmp_path, texts_to_corpus, run_stage):
    fraction = 0.5
    sides = {side: next(text for text in TEXTS if is_held(text, fraction) == side) for side in (True, False)}
    corpus = texts_to_corpus([sides[True], sides[False]], 1)
    tokenizer = run_stage(train(), {"corpus": corpus}, tmp_path / "tokenizer")
    made = run_stage(
        tokenize(held_out_fraction=fraction), {"corpus": corpus, "tokenizer": tokenizer}, tmp_path / "tokens"
    )
    assert (len(made.parts()), len(made.parts("held-"))) == (1, 1)
    alone = {"corpus": texts_to_corpus([sides[True]], name="alone"), "tokenizer": tokenizer}
    with pytest.raises(ArtifactError, match=r"all 1 documents are held out, .*held_out_fraction is 0.5: lower it"):
        run_stage(tokenize(held_out_fraction=fraction), alone, tmp_path / "none")


@pytest.fixture
def many_batches(tmp_path, texts_to_corpus, run_stage, monkeypatch):
    """Give inputs of which one part is encoded in many batches."""
    monkeypatch.setattr("pipeline.text.arrow.BATCH_ROWS", 3)
    monkeypatch.setattr("pipeline.text.encoding.BATCH_BYTES", 1)
    corpus = texts_to_corpus(TEXTS)
    return {"corpus": corpus, "tokenizer": run_stage(train(), {"corpus": corpus}, tmp_path / "tokenizer")}


def stop_after(monkeypatch, batches):
    """Let a stop be asked for while one part is encoded."""
    real, numbers = PartEncoder.run, itertools.count(1)
    monkeypatch.setattr(PartEncoder, "run", lambda self, _: real(self, lambda: next(numbers) >= batches))


def test_a_part_is_written_in_batches(many_batches, tmp_path, run_stage):
    made = run_stage(tokenize(), many_batches, tmp_path / "tokens")
    (name,) = made.parts()
    assert open_tokens(made.file(name)).num_batches == 7


@pytest.mark.parametrize("damage", ["none", "torn", "prefix", "note", "gone"])
@pytest.mark.parametrize("asked", [2, 4, 7])
def test_a_part_goes_on_where_it_was_stopped(many_batches, tmp_path, run_stage, monkeypatch, asked, damage):
    stage = tokenize(held_out_fraction=0.3)
    whole = run_stage(stage, many_batches, tmp_path / "whole")
    directory = tmp_path / "stopped"
    with monkeypatch.context() as patch, pytest.raises(Preempted, match=r"part-.*\.arrow is not done; what is stays"):
        stop_after(patch, asked)
        run_stage(stage, many_batches, directory)
    (part,) = (directory / "work" / "partial").glob("part-*.arrow")
    (note,) = (directory / "work" / "partial").glob("*.json")
    content = bytearray(part.read_bytes())
    if damage == "torn":
        part.write_bytes(content + content[:100])
    elif damage == "prefix":
        content[len(content) // 2] ^= 1
        part.write_bytes(content)
    elif damage == "note":
        note.write_text("{}")
    elif damage == "gone":
        part.unlink()
    encoded = []
    real = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, path, batch: encoded.append(batch) or real(self, path, batch))
    made = run_stage(stage, many_batches, directory)
    assert len(encoded) == (7 - asked if damage in ("none", "torn") else 7)
    assert made.manifest.files == whole.manifest.files
    assert made.stats == whole.stats


@pytest.mark.parametrize("batches", [1, 3, 6])
def test_a_part_goes_on_after_a_kill_between_two_notes(many_batches, tmp_path, run_stage, monkeypatch, batches):
    whole = run_stage(tokenize(), many_batches, tmp_path / "whole")
    monkeypatch.setattr("pipeline.text.encoding.SAVE_BYTES", 30_000)
    numbers = itertools.count()
    real = Encoder.encode

    def killed(self, path, batch):
        if next(numbers) == batches:
            raise KeyboardInterrupt
        return real(self, path, batch)

    monkeypatch.setattr(Encoder, "encode", killed)
    with pytest.raises(KeyboardInterrupt):
        run_stage(tokenize(), many_batches, tmp_path / "killed")
    made = run_stage(tokenize(), many_batches, tmp_path / "killed")
    assert made.manifest.files == whole.manifest.files
    assert made.stats == whole.stats


def test_an_end_of_text_within_a_document_is_refused(inputs, tmp_path, run_stage, monkeypatch):
    monkeypatch.setattr(Tokenize, "_end_id", lambda self, tokenizer, path: tokenizer.encode(TEXTS[0])[0])
    with pytest.raises(ArtifactError, match=r"part-.*\.arrow: a document is encoded to the id \d+ that ends documents"):
        run_stage(tokenize(), inputs, tmp_path / "tokens")


def test_datasets_opens_a_part(inputs, tmp_path, run_stage):
    made = run_stage(tokenize(), inputs, tmp_path / "tokens")
    name = made.parts()[0]
    rows = datasets.Dataset.from_file(str(made.file(name)))
    assert rows.features["input_ids"] == datasets.List(datasets.Value("uint16"))
    assert rows["input_ids"][:] == [tokens for _, _, tokens, _, _ in documents(made, name)]


def test_tokens_are_verified_against_the_corpus(many_batches, tmp_path, run_stage):
    stage = tokenize(held_out_fraction=0.3)
    made = run_stage(stage, many_batches, tmp_path / "tokens")
    assert list(stage.verify(made, many_batches)) == []


def rewrite(artifact, name, change):
    """Write a file of tokens anew with other rows, as if its stage had made them, and open the artifact again."""
    rows = [list(row) for row in documents(artifact, name)]
    change(rows)
    ids, sources, tokens, sizes, hashes = zip(*rows, strict=True)
    with TokenWriter(artifact.path / name, artifact.stats["dtype"]) as writer:
        writer.add(ids, sources, np.concatenate(tokens), list(map(len, tokens)), sizes, hashes)
    files = artifact.manifest.files | {name: record_file(artifact.path / name)}
    return Artifact(artifact.path, artifact.manifest.model_copy(update={"files": files}))


def swap_token(rows):
    rows[4][2][3] ^= 1


def lose_token(rows):
    del rows[4][2][-2]


def lose_document(rows):
    del rows[4]


def lose_last(rows):
    del rows[-1]


def add_document(rows):
    rows.append(["more", *rows[-1][1:]])


def large_id(rows):
    rows[4][2][3] = 600


def other_hash(rows):
    rows[4][4] ^= 1


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (swap_token, r"document 'd\d+': token 3 of \d+ is not what the tokenizer makes of its text"),
        (lose_token, r"document 'd\d+': token \d+ of \d+ is not what the tokenizer makes of its text"),
        (lose_document, r"document 'd\d+' is missing: 'd\d+' stands in its place"),
        (lose_last, r"document 'd\d+' is missing: the file ends in its place"),
        (add_document, r"document 'more' is not in the corpus, or not on this side of the split"),
        (large_id, r"document 'd\d+': has the id 600, but the vocabulary has 600"),
        (other_hash, r"document 'd\d+': has the hash [0-9a-f]{16} of another text; wanted [0-9a-f]{16} of \d+ bytes"),
    ],
)
def test_verifying_names_the_document_that_differs(many_batches, tmp_path, run_stage, change, problem):
    stage = tokenize(held_out_fraction=0.3)
    made = run_stage(stage, many_batches, tmp_path / "tokens")
    (name,) = made.parts()
    found = stage.verify(rewrite(made, name, change), many_batches)
    (line,) = (line for line in found if not line.startswith("manifest.json: "))  # whose numbers are wrong now too
    assert re.fullmatch(rf"{name}: {problem}.*", line), line


def test_verifying_sees_a_document_on_the_wrong_side(many_batches, tmp_path, run_stage):
    made = run_stage(tokenize(held_out_fraction=0.3), many_batches, tmp_path / "tokens")
    assert next(tokenize(held_out_fraction=0.1).verify(made, many_batches)).startswith("part-")


def test_the_tokenizer_is_copied(inputs, tmp_path, run_stage):
    made = run_stage(tokenize(), inputs, tmp_path / "tokens", 3)
    assert made.file("tokenizer.json").read_bytes() == inputs["tokenizer"].file("tokenizer.json").read_bytes()


def test_another_token_may_end_documents(tmp_path, texts_to_corpus, run_stage):
    corpus = texts_to_corpus(TEXTS)
    special = ["<|endoftext|>", "<|end|>"]
    tokenizer = run_stage(train(special_tokens=special), {"corpus": corpus}, tmp_path / "tokenizer")
    made = run_stage(tokenize(end_of_text="<|end|>"), {"corpus": corpus, "tokenizer": tokenizer}, tmp_path / "tokens")
    assert made.stats["end_of_text_id"] == 1
    assert {tokens[-1] for _, _, tokens, _, _ in everything(made)} == {1}


def test_an_end_of_text_that_is_not_there_is_refused_before_and_while_running(inputs, tmp_path, run_stage):
    stage = tokenize(end_of_text="<|endoftxt|>")
    assert list(stage.check({"tokenizer": train()}, Run(kind="local"))) == [
        ("end_of_text", "the tokenizer has no special token '<|endoftxt|>'; did you mean '<|endoftext|>'?")
    ]
    assert list(tokenize().check({"tokenizer": train()}, Run(kind="local"))) == []
    with pytest.raises(
        ConfigError, match=r"tokenize\.end_of_text: .*tokenizer\.json has no token '<\|endoftxt\|>'; did you mean"
    ):
        run_stage(stage, inputs, tmp_path / "tokens")


@pytest.mark.parametrize("which", ["corpus", "tokenizer"])
def test_a_damaged_input_is_not_read(inputs, tmp_path, run_stage, damage, which):
    name = inputs[which].names[0]
    damage(inputs[which].path / name)
    fresh = {field: type(artifact)(artifact.path, artifact.manifest) for field, artifact in inputs.items()}
    with pytest.raises(ArtifactError, match=f"{name}: damaged"):
        run_stage(tokenize(), fresh, tmp_path / "tokens")


def test_without_its_corpus_nothing_is_compared(inputs, tmp_path, run_stage):
    made = run_stage(tokenize(), inputs, tmp_path / "tokens")
    assert list(tokenize().verify(made, {})) == []


@pytest.mark.parametrize("name", ["documents", "tokens", "bytes", "held_out.bytes", "max_token_id", "vocab_size"])
def test_numbers_that_were_changed_are_found(inputs, tmp_path, run_stage, name):
    made = run_stage(tokenize(), inputs, tmp_path / "tokens")
    found = made.stats[name]
    made.stats[name] = found + 1
    assert list(tokenize().verify(made, {})) == [f"manifest.json: {name} is {found + 1}, but its files have {found}"]


def test_an_end_before_publishing_can_be_gone_on_from(inputs, tmp_path, run_stage):
    first = run_stage(tokenize(), inputs, tmp_path / "tokens")
    (tmp_path / "tokens" / "manifest.json").unlink(missing_ok=True)
    again = run_stage(tokenize(), inputs, tmp_path / "tokens")
    assert again.stats == first.stats
    assert again.manifest.files == first.manifest.files
