"""The job that pretrains a BERT and a T5, with models so small and steps so few that it takes no time."""

import json

import pytest
from support import run_pipeline

from pipeline.artifact import open_artifact

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("families")]

SMALL = {"d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2}
FEW = {"steps": 2, "batch_tokens": 256, "validation_sequences": 4}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    words = [
        f"tasks.{task}.{key}={value}"
        for task in ("bert", "t5")
        for key, value in {**FEW, **{f"model.{name}": number for name, number in SMALL.items()}}.items()
    ]
    run_pipeline("job=families", f"root={root}", "tasks.train_tokenizer.vocab_size=512", *words)
    return root / "jobs/families"


def test_both_are_evaluated_by_what_they_learn(made):
    assert {"loss.masked", "loss.next_sentence"} <= open_artifact(made / "evaluate_bert").stats.keys()
    assert open_artifact(made / "evaluate_t5").stats["objective"] == "span_corruption"


def test_both_can_be_used(made):
    filled = [json.loads(line) for line in (made / "fill/samples.jsonl").read_text().splitlines()]
    assert [len(row["masks"]) for row in filled] == [2, 1]
    answers = [json.loads(line) for line in (made / "answer/samples.jsonl").read_text().splitlines()]
    assert all(row["answer"] for row in answers)
    for name, kind in (("bert", "BertForPreTraining"), ("t5", "T5ForConditionalGeneration")):
        config = json.loads((made / f"export_{name}/config.json").read_text())
        assert config["architectures"] == [kind]


def test_one_report_shows_both(made):
    page = (made / "report/index.html").read_text()
    for words in ("bert: ", "; t5: ", "Loss by term", "linear schedule", "inverse sqrt schedule"):
        assert words in page
    assert page.count("Loss on held-out text, nats") == 2


def test_a_token_that_the_tokenizer_will_lack_stops_the_job_before_it_begins(tmp_path):
    lacking = 'tasks.train_tokenizer.special_tokens=["<|endoftext|>","[CLS]","[SEP]","<extra_id_{0..9}>"]'
    done = run_pipeline("job=families", f"root={tmp_path}", lacking, "--plan", status=2)
    assert "tasks.bert.objective: 'next_sentence' needs the special token '[MASK]', which the tokenizer" in done.stderr
    assert "tasks.t5.objective: 'span_corruption' needs the special token '<extra_id_10>' and 89 more" in done.stderr
