import os
from dataclasses import replace

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.parallel.engine import EngineSettings, _take_gpu, deepspeed_json
from pipeline.parallel.mesh import shape_batch
from pipeline.stage import Parallel


def settings(precision="fp32", zero=2, offload=None, **extra) -> EngineSettings:
    return EngineSettings(shape_batch(16, 2, 4), zero, precision, 0.5, extra, offload)


def test_the_batch_triple_is_derived():
    config = deepspeed_json(settings())
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"]) == (16, 2)
    assert config["gradient_accumulation_steps"] == 2
    assert config["gradient_clipping"] == 0.5
    assert "bf16" not in config


def test_bf16_accumulates_gradients_in_fp32():
    config = deepspeed_json(settings("bf16"))
    assert config["bf16"] == {"enabled": True}
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["communication_data_type"] == "fp32"
    with pytest.raises(ConfigError, match="communication_data_type: contradicts a typed setting; set precision"):
        deepspeed_json(settings("bf16", communication_data_type="bf16"))  # it would round the gradients


def test_fp8_is_bf16_to_deepspeed_and_fp16_is_not():
    assert deepspeed_json(settings("fp8")) == deepspeed_json(settings("bf16"))
    config = deepspeed_json(settings("fp16"))
    assert config["fp16"] == {"enabled": True}
    assert "bf16" not in config


def test_without_zero_the_gate_clips():
    assert deepspeed_json(settings(zero=0))["gradient_clipping"] == 0.0


def test_the_optimizer_is_offloaded():
    config = deepspeed_json(settings(offload="cpu", zero_optimization={"offload_param": {"device": "cpu"}}))
    assert config["zero_optimization"] == {
        "stage": 2,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
    }


@pytest.mark.parametrize(
    ("zero", "precision", "offload", "reason"),
    [
        (
            0,
            "bf16",
            None,
            "run.parallel.zero: under stage 0 DeepSpeed sums the gradients of precision 'bf16' in 16 bits",
        ),
        (0, "fp32", "cpu", "run.parallel.offload: DeepSpeed offloads only what ZeRO shares out"),
        (
            2,
            "bf16",
            "cpu",
            "run.parallel.offload: under stage 2 DeepSpeed sums offloaded gradients of precision 'bf16'",
        ),
        (3, "fp32", "nvme", "no checkpoint could be written; take 'cpu'"),
    ],
)
def test_what_cannot_be_combined_is_refused(zero, precision, offload, reason):
    with pytest.raises(ConfigError) as error:
        deepspeed_json(settings(precision, zero, offload))
    (problem,) = error.value.problems
    assert reason in problem


def test_settings_come_from_the_run():
    parallel = Parallel(zero=3, offload="cpu", deepspeed={"wall_clock_breakdown": True})
    shape = shape_batch(16, 2, 4)
    expected = EngineSettings(shape, 3, "bf16", None, {"wall_clock_breakdown": True}, "cpu")
    assert EngineSettings.of(shape, parallel, "bf16", None) == expected


@pytest.mark.parametrize(
    ("zero", "ranks", "precision", "offload", "expected"),
    [
        (1, 1, "fp32", None, 0),
        (2, 1, "fp32", None, 0),
        (3, 1, "fp32", None, 3),
        (1, 2, "fp32", None, 1),
        (1, 1, "bf16", None, 1),
        (1, 1, "fp32", "cpu", 1),
    ],
)
def test_zero_is_left_out_where_it_shares_out_nothing(zero, ranks, precision, offload, expected):
    one = EngineSettings(shape_batch(16, 2, ranks), zero, precision, 0.5, {}, offload)
    assert one.simplified() == replace(one, zero=expected)


def test_extra_keys_are_merged_last():
    config = deepspeed_json(settings(zero_optimization={"overlap_comm": True}, wall_clock_breakdown=True))
    assert config["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert config["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("extra", "key"),
    [
        ({"train_batch_size": 8}, "train_batch_size"),
        ({"gradient_clipping": 1.0}, "gradient_clipping"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage"),
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"optimizer": {"type": "Adam"}}, "optimizer"),
        ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "zero_optimization.offload_optimizer"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel"),
        ({"activation_checkpointing": {}}, "activation_checkpointing"),
    ],
)
def test_extra_keys_that_contradict_a_typed_setting_are_refused(extra, key):
    with pytest.raises(ConfigError, match=f"run.parallel.deepspeed.{key}: contradicts a typed setting"):
        deepspeed_json(settings(**extra))


def test_all_contradictions_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        deepspeed_json(settings(train_batch_size=8, bf16={}))
    assert len(caught.value.problems) == 2


def test_an_order_in_which_deepspeed_gives_out_wrong_weights_is_refused():
    with pytest.raises(
        ConfigError, match="round_robin_gradients: DeepSpeed then gives the weights out in a wrong order"
    ):
        deepspeed_json(settings(zero_optimization={"round_robin_gradients": True}))


def test_parameters_are_not_swapped_to_a_disk():
    with pytest.raises(ConfigError, match="zero_optimization.offload_param: no checkpoint could be written"):
        deepspeed_json(settings(zero=3, zero_optimization={"offload_param": {"device": "nvme", "nvme_path": "/x"}}))


def test_what_is_no_mapping_is_refused():
    with pytest.raises(ConfigError, match="run.parallel.deepspeed.zero_optimization: wanted a mapping, found 3"):
        deepspeed_json(settings(zero_optimization=3))


@pytest.mark.parametrize(("gpus", "taken"), [(1, 0), (4, 3), (8, 3)])
def test_a_rank_takes_the_gpu_of_its_number_or_the_only_one_that_it_sees(monkeypatch, gpus, taken):
    chosen = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    _take_gpu()
    assert chosen == [taken]
    assert os.environ["LOCAL_RANK"] == str(taken)  # which DeepSpeed reads
