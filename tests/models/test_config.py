import subprocess
import sys

import pytest

from pipeline.errors import ArtifactError, ConfigError
from pipeline.models.config import Decoder, Encoder
from pipeline.models.files import read_config
from pipeline.models.parts import ExpertChoice, Experts, TokenChoice
from pipeline.settings import decode, encode


def test_it_reads_back_what_it_writes():
    config = Decoder(vocab_size=1000, num_kv_heads=2, d_ff=96, dropout=0.1, tie_embeddings=False)
    assert decode(Decoder, encode(config)) == config


def test_what_follows_from_null():
    config = Decoder()
    assert (config.kv_heads, config.head_dim, config.ff) == (4, 64, 704)  # 8/3 * 256 = 682.7
    assert Decoder(mlp="gelu").ff == 1024
    assert Decoder(d_ff=100, num_kv_heads=1).ff == 100
    assert Decoder(num_kv_heads=1).kv_heads == 1


@pytest.mark.parametrize(("vocab_size", "multiple", "rows"), [(1000, 64, 1024), (1024, 64, 1024), (7, 1, 7)])
def test_rows_of_the_embedding(vocab_size, multiple, rows):
    assert Decoder(vocab_size=vocab_size, vocab_multiple=multiple).padded_vocab_size == rows


def test_an_unknown_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="vocab_size: not known yet; set it, or give the tokens"):
        _ = Decoder().padded_vocab_size
    with pytest.raises(ConfigError, match="vocab_size: not known yet"):
        Decoder().num_params()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, r"m: d_model \(256\) must be a multiple of num_heads \(3\), or set head_width"),
        ({"num_kv_heads": 3}, r"m: num_heads \(4\) must be a multiple of num_kv_heads \(3\)"),
        ({"num_kv_heads": 8}, r"m: num_heads \(4\) must be a multiple of num_kv_heads \(8\)"),
        (
            {"d_model": 20},
            r"m: positions 'rotary' turns pairs, so d_model / num_heads \(20 / 4 = 5\) must be even",
        ),
        (
            {"d_model": 10, "num_kv_heads": 3},
            r"m: d_model \(10\) .* of num_heads \(4\), or set head_width; num_heads \(4\) .* of num_kv_heads \(3\)",
        ),
        ({"norm": "batchnorm"}, "m.norm: wanted 'rmsnorm' or 'layernorm', found 'batchnorm'"),
        ({"num_layer": 2}, "m.num_layer: no such setting; did you mean 'num_layers'?"),
        ({"dropout": 1.0}, "m.dropout: wanted less than 1, found 1.0"),
        ({"d_model": 0}, "m.d_model: wanted greater than 0, found 0"),
    ],
)
def test_shapes_that_cannot_be_are_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        decode(Decoder, changes, where="m")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_width": 5}, r"head_width \(5\) must be even"),
        ({"positions": "learned", "local_rope_theta": 1.0}, "need positions 'rotary', found 'learned'"),
        ({"global_every": 2}, "need a sliding_window"),
        ({"d_model": 5, "num_heads": 1, "positions": "sinusoidal"}, r"come in pairs, so d_model \(5\) must be even"),
        ({"dense_layers": 1}, "dense_layers needs experts"),
        ({"experts": Experts(count=2), "mlp": "gelu"}, "experts need a gate and no bias"),
        ({"experts": Experts(count=2), "dense_layers": 4}, r"dense_layers \(4\) leaves no layer of 4"),
        ({"experts": Experts(count=2, router=TokenChoice(top_k=3))}, r"top_k \(3\) is more than experts.count \(2\)"),
        ({"experts": Experts(count=2, router=ExpertChoice())}, "only an encoder can have it"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Decoder(**changes)


def test_an_encoder_may_let_experts_choose():
    assert Encoder(experts=Experts(count=2, router=ExpertChoice())).experts.count == 2
    with pytest.raises(ValueError, match="balance_bias_rate needs the router 'token_choice'"):
        Encoder(experts=Experts(count=2, router=ExpertChoice(), balance_bias_rate=0.1))


def test_an_odd_head_is_fine_without_rotary():
    assert Decoder(d_model=20, positions="learned").head_dim == 5


def test_flops_of_a_small_model_by_hand():
    config = Decoder(vocab_size=64, d_model=8, num_layers=2, num_heads=2, num_kv_heads=1, d_ff=16)
    attention = 8 * 8 + 2 * 8 * 4 + 8 * 8
    weights = 2 * (attention + 3 * 8 * 16) + 64 * 8
    assert config.flops_per_token(seq_len=10) == 6 * weights + 12 * 2 * 8 * 10


def test_a_config_that_is_not_ours_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"no config\.json; wanted a saved model"):
        read_config(tmp_path)
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(ArtifactError, match=r"config\.json: not JSON"):
        read_config(tmp_path)
    path.write_text("[]")
    with pytest.raises(ArtifactError, match=r"config\.json: wanted a JSON object, found list"):
        read_config(tmp_path)
    path.write_text('{"model": {"kind": "decoder", "num_layer": 2}, "format": 3}')
    with pytest.raises(ArtifactError) as error:
        read_config(tmp_path)
    lines = sorted(str(error.value).splitlines())
    assert lines[0] == f"{path}: format: wanted 2, found 3"
    assert lines[1] == f"{path}: model.num_layer: no such setting; did you mean 'num_layers'?"


def test_a_model_of_an_earlier_version_is_said_to_be_one(tmp_path):
    (tmp_path / "config.json").write_text('{"model": {}, "format": 1}')
    with pytest.raises(
        ArtifactError, match="made by an earlier version, whose models had other weights; make it again"
    ):
        read_config(tmp_path)


def test_settings_do_not_import_torch():
    code = "import pipeline.models.config, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
