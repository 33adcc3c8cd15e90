"""The quickstart through a real SLURM, from raw text to the report: what it makes is what it makes on one machine."""

import pytest
from submitted import Submitted, losses, manifest
from support import run_pipeline

# fp32 sums of some thousand terms in another order: 1e-6 relative in one step, grown by some steps of training
LOSS_TOLERANCE = 1e-4
DATA = ("shard", "clean", "dedup", "train_tokenizer", "tokenize")
MODELS = ("pretrain", "finetune", "evaluate", "generate", "export")
SHORT = (
    "tasks.pretrain.steps=12",
    "tasks.pretrain.validate_every_steps=6",
    "tasks.finetune.data=tests/data/topics.jsonl",
    "tasks.finetune.baseline=false",
    "tasks.generate.max_new_tokens=8",
)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    root = tmp_path_factory.mktemp("local") / "artifacts"
    run_pipeline("job=quickstart", f"root={root}", *SHORT)
    return root / "jobs/quickstart"


def test_the_quickstart_on_two_nodes_makes_what_it_makes_here(local, cluster, tmp_path):
    job = Submitted(cluster, tmp_path / "artifacts", "quickstart")
    said = job.submit(*SHORT, "run.nodes=2", "run.array=3", "run.preflight=false")
    assert all(f"{task} " in said and job.id(task) in said for task in (*DATA, *MODELS, "report"))
    job.wait()
    assert {task: set(job.states(task)) for task in job.tasks} == {task: {"COMPLETED"} for task in job.tasks}, (
        job.what_is_there()
    )
    for task in DATA:
        here, there = manifest(local / task), job.manifest(task)
        assert there["files"] == here["files"], task  # names, sizes and xxh128
        assert there["fingerprint"] == here["fingerprint"]
    assert [job.manifest(task)["made"]["ranks"] for task in ("shard", "dedup", "pretrain", "export")] == [3, 1, 2, 1]
    assert losses(job.directory("pretrain")) == pytest.approx(losses(local / "pretrain"), rel=LOSS_TOLERANCE)
    for task, number in (("pretrain", "validation_loss"), ("finetune", "valid_loss"), ("evaluate", "bits_per_byte")):
        wanted, found = (place["stats"][number] for place in (manifest(local / task), job.manifest(task)))
        assert found == pytest.approx(wanted, rel=LOSS_TOLERANCE), task
    page = (job.root / "jobs/quickstart/report/index.html").read_text()
    assert all(task in page for task in (*DATA, *MODELS))
    verified = job.command("verify", *(f"quickstart.{task}" for task in job.tasks))
    assert verified.count("files as the manifest says") == len(job.tasks)
    assert job.command("job=quickstart", *SHORT).count("done before") == len(job.tasks)
