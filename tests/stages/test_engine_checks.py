"""What a training's parallelism cannot do is refused before it begins, with the reason."""

from typing import Literal

import pytest

from pipeline.launch.local import Local
from pipeline.settings import decode
from pipeline.stage import Run
from pipeline.stages import engine_checks
from pipeline.stages.finetune import Finetune
from pipeline.stages.pretrain import Pretrain

ADAMW = {"kind": "adamw"}


class Elsewhere(Run):
    """Another launcher, for other machines."""

    kind: Literal["elsewhere"] = "elsewhere"


def problems(run=None, launcher=Local, **changes) -> list[tuple[str, str]]:
    settings = {"kind": "pretrain", "tokens": "@tokens", "steps": 10, "optimizer": ADAMW, **changes}
    stage = decode(Pretrain, settings, where="stage")
    return list(stage.check({}, launcher(**(run or {}))))


def refusals(run=None, **changes) -> str:
    return "\n".join(f"{name}: {problem}" for name, problem in problems(run, **changes))


@pytest.fixture(autouse=True)
def accelerator(monkeypatch):
    """This machine has an accelerator, unless a test says otherwise."""
    monkeypatch.setattr(engine_checks, "has_accelerator", lambda: True)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8"])
@pytest.mark.parametrize("offload", [None, "cpu", "nvme"])
def test_what_is_refused_has_a_reason_and_the_rest_is_taken(zero, tensor, precision, offload):
    run = {"ranks": 8, "parallel": {"zero": zero, "tensor": tensor, "offload": offload}}
    found = refusals(run, precision=precision)
    assert ("sums the gradients of precision" in found) == (zero == 0 and precision != "fp32")
    assert ("no checkpoint could be written" in found) == (offload == "nvme")
    assert ("only what ZeRO shares out" in found) == (zero == 0 and offload == "cpu")
    assert ("sums offloaded gradients" in found) == (zero in (1, 2) and offload == "cpu" and precision != "fp32")
    reasons = [zero == 0 and precision != "fp32", offload == "nvme", offload == "cpu" and zero == 0]
    reasons.append(offload == "cpu" and zero in (1, 2) and precision != "fp32")
    assert len(found.splitlines()) == sum(reasons)


def test_matrix_optimizers_do_not_go_with_offload():
    run = {"parallel": {"offload": "cpu"}}
    found = problems(run, optimizer={"kind": "muon"})
    assert [name for name, _ in found] == ["optimizer.kind"]
    assert "'muon' works on whole matrices and cannot put them together under run.parallel.offload" in found[0][1]


@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_a_precision_that_this_machine_lacks_is_refused(monkeypatch, precision):
    assert not problems(precision=precision)
    monkeypatch.setattr(engine_checks, "has_accelerator", lambda: False)
    assert problems(precision=precision) == [
        (
            "precision",
            f"'{precision}' needs an accelerator, and this machine shows none (or CUDA_VISIBLE_DEVICES hides it); take "
            "fp32, or bf16",
        )
    ]
    assert not problems(precision=precision, launcher=Elsewhere)  # of another machine nobody knows here
    assert not problems(precision="bf16")


def test_fp8_needs_sizes_that_divide():
    model = {"kind": "decoder", "d_model": 96, "num_heads": 6, "num_kv_heads": 2, "d_ff": 272}
    assert not problems(precision="fp8", model=model)
    found = refusals({"ranks": 2, "parallel": {"tensor": 2}}, precision="fp8", model=model)
    assert "model.d_ff is 136 on each rank" in found
    found = refusals(precision="fp8", model={"kind": "decoder", "d_model": 40, "num_heads": 5})
    assert "model.d_model is 40; change the model, or take bf16" in found


def test_compilation_that_cannot_be(monkeypatch):
    assert not problems({"compile": True})
    assert "torch.compile cannot look through" in refusals({"compile": True, "parallel": {"zero": 3}})
    experts = {"kind": "decoder", "experts": {"count": 4}}
    run = {"compile": True, "parallel": {"activation_checkpointing": "selective"}}
    assert "layers with experts are compiled in pieces" in refusals(run, model=experts)
    assert not problems(run)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not problems({"compile": True})  # an accelerator needs none
    monkeypatch.setattr(engine_checks, "has_accelerator", lambda: False)
    assert "there is no 'no-such-compiler' in the PATH" in refusals({"compile": True})
    assert not problems({"compile": True}, launcher=Elsewhere)


def test_ranks_that_do_not_divide():
    assert refusals({"ranks": 3, "parallel": {"tensor": 2}}) == (
        "batch_tokens: run.parallel.tensor: 3 ranks do not divide into groups of 2; change it or run.ranks"
    )
    assert "does not divide among 3 data-parallel ranks" in refusals({"ranks": 6, "parallel": {"tensor": 2}})
    assert not problems({"ranks": 8, "parallel": {"tensor": 2}})  # eight rows, four data-parallel ranks
    assert not problems({"ranks": 16, "parallel": {"tensor": 2}})


def test_models_and_sequences_that_tensor_parallel_ranks_cannot_share():
    run = {"ranks": 4, "parallel": {"tensor": 4}}
    model = {"kind": "decoder", "num_heads": 4, "num_kv_heads": 2}
    assert "model: run.parallel.tensor is 4: num_heads (4) and num_kv_heads (2) must be" in refusals(run, model=model)
    assert not problems({"ranks": 2, "parallel": {"tensor": 2}}, model=model)
    run["parallel"]["sequence"] = True
    assert "sequences of 254 positions" in refusals(run, seq_len=254, batch_tokens=254 * 4)
    assert not problems(run)


def test_a_directory_that_nothing_uses():
    assert "only offload 'nvme' uses it, found offload null" in refusals({"parallel": {"offload_dir": "/tmp/x"}})


def test_fine_tuning_is_checked_too(monkeypatch):
    monkeypatch.setattr(engine_checks, "has_accelerator", lambda: False)
    settings = {"kind": "finetune", "model": "@model", "examples": "@examples", "precision": "fp16"}
    fields = Finetune.model_fields
    stage = decode(Finetune, {name: value for name, value in settings.items() if name in fields} | extras(), "stage")
    found = list(engine_checks.check_engine(32, "batch_examples", stage, Local()))
    assert [name for name, _ in found] == ["precision"]


def extras():
    return {name: "@x" for name, field in Finetune.model_fields.items() if field.is_required() and name != "kind"}
