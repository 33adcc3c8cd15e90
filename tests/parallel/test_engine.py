import pytest

from pipeline.errors import ConfigError
from pipeline.parallel.engine import EngineSettings, deepspeed_json
from pipeline.parallel.mesh import shape_batch


def settings(precision="fp32", **extra) -> EngineSettings:
    return EngineSettings(shape_batch(16, 2, 4), zero=2, precision=precision, clip_norm=0.5, extra=extra)


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
