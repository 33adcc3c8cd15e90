"""`python -m pipeline trace`: which documents a step saw, and which steps saw a document."""

import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from support import PROJECT

from pipeline.artifact import open_artifact
from pipeline.errors import ArtifactError, ConfigError
from pipeline.operate import find_artifact
from pipeline.plan import stage_of
from pipeline.text.token_parts import open_tokens
from pipeline.trace import trace

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("tiny")]

STEPS = 20


def lines(capsys, *words: object) -> list[list[str]]:
    assert trace(list(map(str, words))) == 0
    return [line.split("\t") for line in capsys.readouterr().out.splitlines()]


@pytest.fixture
def stored(tiny_root) -> dict[str, list[int]]:
    """The tokens of every document to train on, by its id."""
    tokens = open_artifact(tiny_root / "jobs/tiny/tokenize")
    documents = {}
    for name in tokens.parts():
        part = open_tokens(tokens.file(name))
        for batch in range(part.num_batches):
            bounds = part.offsets(batch).tolist()
            for identity, start, stop in zip(part.rows(batch)[0], bounds[:-1], bounds[1:], strict=True):
                documents[identity] = part.tokens(start, stop).tolist()
    return documents


def test_the_documents_of_a_step_are_what_was_fed(tiny_root, stored, capsys):
    model = find_artifact("tiny.pretrain", tiny_root)
    loader = stage_of(model).open_loader({"tokens": open_artifact(tiny_root / "jobs/tiny/tokenize")})
    for step in (1, 7, STEPS):
        heading, *rows = lines(capsys, "run=tiny.pretrain", f"step={step}", f"root={tiny_root}")
        assert heading == ["sample", "tokens of", "document", "source", "span"]
        labels = defaultdict(list)
        for sample, source, document, origin, span in rows:
            assert (source, origin) == ("tokens", "topics")
            begin, end = map(int, span.split(":"))
            labels[int(sample)] += stored[document][begin:end]
        assert list(labels.values()) == loader.read(step).labels.tolist()


def test_the_steps_of_a_document_are_those_whose_documents_name_it(tiny_root, stored, capsys):
    seen = defaultdict(set)
    for step in range(1, STEPS + 1):
        for row in lines(capsys, "run=tiny.pretrain", f"step={step}", f"root={tiny_root}")[1:]:
            seen[row[2]].add(step)
    often = max(seen, key=lambda document: len(seen[document]))
    never = next(document for document in stored if document not in seen)
    some = next(iter(seen))
    for document in (often, some):
        wanted = f"in steps {', '.join(map(str, sorted(seen[document])))}"
        assert lines(capsys, "run=tiny.pretrain", f"doc={document}", f"root={tiny_root}") == [
            ["tokens", document, f"{len(stored[document])} tokens", wanted]
        ]
    found = lines(capsys, "run=tiny.pretrain", f"doc={never}", f"root={tiny_root}")
    assert found == [["tokens", never, f"{len(stored[never])} tokens", "in none of 20 steps"]]


def test_a_document_that_is_held_out_is_said_to_be(tiny_root, capsys):
    tokens = open_artifact(tiny_root / "jobs/tiny/tokenize")
    held = open_tokens(tokens.file(tokens.parts("held-")[0])).rows(0)[0][0]
    found = lines(capsys, "run=tiny.pretrain", f"doc={held}", f"root={tiny_root}")
    assert found == [["tokens", held, "held out: no step saw it"]]


def test_a_run_that_is_not_finished_can_be_traced(tiny_root, tmp_path, capsys):
    finished = (tiny_root / "jobs/tiny/pretrain").resolve()
    shutil.copytree(finished, tmp_path / "unfinished", ignore=shutil.ignore_patterns("manifest.json", "checkpoints"))
    wanted = lines(capsys, "run=tiny.pretrain", "step=2", f"root={tiny_root}")
    assert lines(capsys, f"run={tmp_path / 'unfinished'}", "step=2") == wanted


def test_what_is_wrong_with_the_words_is_said_together(tiny_root):
    with pytest.raises(ConfigError) as error:
        trace(["rn=tiny.pretrain", "step=1", "doc=a"])
    assert error.value.problems == (
        "trace: no word is called 'rn'; did you mean 'run'?",
        "trace: say which run: run=PATH or run=JOB.TASK",
        "trace: say either step=NUMBER or doc=ID",
    )


@pytest.mark.parametrize("step", ["0", "21", "-1", "1.5", "x", "", "9" * 30])
def test_a_step_that_is_none_is_refused(tiny_root, step):
    with pytest.raises(ConfigError, match=f"trace: step: wanted a number from 1 to 20, found '{step}'"):
        trace(["run=tiny.pretrain", f"step={step}", f"root={tiny_root}"])


def test_a_document_that_is_nowhere_is_refused(tiny_root):
    with pytest.raises(ArtifactError, match="trace: no document has the id 'nobody' in "):
        trace(["run=tiny.pretrain", "doc=nobody", f"root={tiny_root}"])


def test_a_run_that_is_no_pretraining_is_refused(tiny_root):
    with pytest.raises(ArtifactError, match="wanted a run of pretraining, found one of 'tokenize'"):
        trace(["run=tiny.tokenize", "step=1", f"root={tiny_root}"])


def test_tokens_that_are_gone_are_named(tiny_root, tmp_path):
    model = Path(shutil.copytree((tiny_root / "jobs/tiny/pretrain").resolve(), tmp_path / "model" / "alone"))
    with pytest.raises(ArtifactError, match="its input 'tokens' is not there .* so its order cannot be made again"):
        trace([f"run={model}", "step=1"])


def test_nobody_has_to_read_to_the_end(tiny_root):
    done = subprocess.run(
        f"{sys.executable} -m pipeline trace run=tiny.pretrain step=1 root={tiny_root} | head -1",
        shell=True,
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "sample\ttokens of\tdocument\tsource\tspan\n"
    assert done.stderr == ""


def test_a_damaged_task_of_an_unfinished_run_is_named(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work/task.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"work/task.json: damaged"):
        trace([f"run={tmp_path}", "step=1"])
