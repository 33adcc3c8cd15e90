"""What a plan says before anything runs: of inputs that are made already, too."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.plan import Command, Task, plan
from pipeline.settings import decode, encode

TRAINING = {"kind": "pretrain", "seq_len": 32, "batch_tokens": 512}
SMALL = {"kind": "decoder", "d_model": 32, "num_layers": 2, "num_heads": 4, "max_seq_len": 64}


def planned(root: Path, **stages: dict) -> list[Task]:
    return plan(decode(Command, {"root": str(root), "tasks": stages}), "made")


def problems(root: Path, **stages: dict) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        planned(root, **stages)
    return list(caught.value.problems)


@pytest.fixture
def none_held(tiny_tokens, tmp_path) -> Path:
    """Tokens of which none is held out though some were to be."""
    path = Path(shutil.copytree(tiny_tokens, tmp_path / "none_held"))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] = {name: file for name, file in manifest["files"].items() if not name.startswith("held-")}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def test_tokens_that_do_not_do_are_refused_with_every_reason(tiny_tokens, none_held, tmp_path):
    found = problems(
        tmp_path,
        long={**TRAINING, "tokens": str(none_held), "steps": 1000},
        wide={**TRAINING, "tokens": str(tiny_tokens), "steps": 1, "model": {**SMALL, "vocab_size": 300}},
        masked={
            **TRAINING,
            "tokens": str(tiny_tokens),
            "steps": 1,
            "model": {**SMALL, "kind": "encoder"},
            "objective": {"kind": "masked"},
        },
        few={**TRAINING, "tokens": str(tiny_tokens), "steps": 1, "seq_len": 131072, "batch_tokens": 131072}
        | {"model": {**SMALL, "max_seq_len": 131072}},
        score={"kind": "evaluate", "model": "@long", "tokens": str(none_held)},
    )
    wanted = [
        "tasks.long.max_epochs: 1,000 steps go 5.19 times through 'tokens' (98,560 tokens), at most 4 are allowed; ",
        "tasks.long.tokens: no document is held out for validation (held_out_fraction of tokenize: 0.05); hold out",
        "tasks.wide.model.vocab_size: wanted at least 512, the vocabulary of ",
        "tasks.masked.objective: the tokenizer has no token '[MASK]'",
        "tasks.few.seq_len: tokens 'tokens': has 98,584 tokens, fewer than one sequence of 131072",
        f"tasks.score.tokens: {none_held} holds out no document; tokenize with a larger held_out_fraction",
    ]
    assert [line.startswith(start) for line, start in zip(found, wanted, strict=True)] == [True] * 6, found


def test_a_model_that_is_made_is_looked_into(tiny_root, tiny_tokens, tmp_path):
    """Of one that goes on from another only its own files say what it is."""
    model = Path(shutil.copytree((tiny_root / "jobs/tiny/pretrain").resolve(), tmp_path / "model"))
    manifest = json.loads((model / "manifest.json").read_text())
    manifest["stage"] |= {"model": None, "init_from": "x"}
    (model / "manifest.json").write_text(json.dumps(manifest))
    found = problems(
        tmp_path,
        on={**TRAINING, "tokens": str(tiny_tokens), "steps": 1, "init_from": str(model), "seq_len": 128},
        tune={"kind": "finetune", "model": str(model), "data": str(model / "manifest.json"), "seq_len": 65},
        score={"kind": "evaluate", "model": str(model), "tokens": str(tiny_tokens), "seq_len": 66},
        write={"kind": "generate", "model": str(model), "prompt": ["a", "x" * 400]},
        fill={"kind": "generate", "model": str(model), "prompt": "a [MASK]", "decoding": {"kind": "fill_mask"}},
    )
    assert [line.partition(": ")[0] for line in found] == [
        "tasks.on.seq_len",
        "tasks.tune.seq_len",
        "tasks.score.seq_len",
        "tasks.write.prompt.1",
        "tasks.fill.decoding.kind",
        "tasks.fill.decoding.mask_token",
    ]


def test_what_is_planned_with_inputs_that_do_is_not_refused_and_needs_no_torch(tiny_tokens, tmp_path):
    data = {"root": str(tmp_path), "stage": {**TRAINING, "tokens": str(tiny_tokens), "steps": 20, "model": SMALL}}
    code = (
        "import json, sys\n"
        "from pipeline.plan import Command, plan\n"
        "from pipeline.settings import decode\n"
        f"plan(decode(Command, json.loads({json.dumps(json.dumps(data))})), None)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_task_that_is_made_is_not_looked_at_again(tiny_root):
    """Whatever becomes of its inputs."""
    tokens = next((tiny_root / "tokens").glob("tokenize-*"))
    stage = json.loads((next((tiny_root / "model").glob("pretrain-*")) / "manifest.json").read_text())["stage"]
    (task,) = planned(tiny_root, pretrain={**stage, "tokens": str(tokens)})
    assert task.done is not None
    (again,) = planned(tiny_root, pretrain={**stage, "tokens": str(tokens), "batch_tokens": 1024})
    assert encode(again.stage)["batch_tokens"] == 1024
    assert again.done is None


@pytest.mark.parametrize(
    ("left", "why"),
    [
        ([], "never made"),
        (["work/attempt"], "unfinished: nothing is saved"),
        (["work/attempt", "checkpoints/step-00000010.tmp/checkpoint.json"], "unfinished: nothing is saved"),
        (["work/attempt", "checkpoints/step-00000010/checkpoint.json"], "unfinished: continues"),
        (["work/attempt", "checkpoints/baseline/step-00000010/checkpoint.json"], "unfinished: continues"),
        (["work/attempt-00003", "work/units/00003.json"], "unfinished: continues"),
    ],
)
def test_only_what_left_something_continues(tiny_tokens, tmp_path, left, why):
    stage = {**TRAINING, "tokens": str(tiny_tokens), "steps": 1, "model": SMALL}
    (task,) = planned(tmp_path, pretrain=stage)
    for name in left:
        (task.directory / name).parent.mkdir(parents=True, exist_ok=True)
        (task.directory / name).touch()
    assert planned(tmp_path, pretrain=stage)[0].why == why
