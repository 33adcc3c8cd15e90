import subprocess
import sys

import pytest

from pipeline.errors import ArtifactError, ConfigError
from pipeline.models.config import Decoder, hf_layout, read_config, unexportable
from pipeline.settings import decode, encode

GPT2 = {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "bias": True}


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
        ({"num_heads": 3}, r"m: d_model \(256\) must be a multiple of num_heads \(3\)"),
        ({"num_kv_heads": 3}, r"m: num_heads \(4\) must be a multiple of num_kv_heads \(3\)"),
        ({"num_kv_heads": 8}, r"m: num_heads \(4\) must be a multiple of num_kv_heads \(8\)"),
        (
            {"d_model": 20},
            r"m: positions 'rotary' turns pairs, so d_model / num_heads \(20 / 4 = 5\) must be even",
        ),
        (
            {"d_model": 10, "num_kv_heads": 3},
            r"m: d_model \(10\) .* of num_heads \(4\); num_heads \(4\) .* of num_kv_heads \(3\)",
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


def test_an_odd_head_is_fine_without_rotary():
    assert Decoder(d_model=20, positions="learned").head_dim == 5


def test_flops_of_a_small_model_by_hand():
    config = Decoder(vocab_size=64, d_model=8, num_layers=2, num_heads=2, num_kv_heads=1, d_ff=16)
    attention = 8 * 8 + 2 * 8 * 4 + 8 * 8
    weights = 2 * (attention + 3 * 8 * 16) + 64 * 8
    assert config.flops_per_token(seq_len=10) == 6 * weights + 12 * 2 * 8 * 10


def test_layouts_of_hugging_face():
    assert hf_layout(Decoder(num_kv_heads=2, bias=True, tie_embeddings=False)) == "llama"
    assert hf_layout(Decoder(**GPT2)) == "gpt2"
    assert unexportable(Decoder()) is None
    assert unexportable(Decoder(**GPT2)) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"norm": "layernorm"},
            "Llama's would need norm=rmsnorm; GPT-2's would need positions=learned, mlp=gelu, bias",
        ),
        (GPT2 | {"bias": False}, "GPT-2's would need bias=true"),
        (GPT2 | {"tie_embeddings": False}, "GPT-2's would need tie_embeddings=true"),
        (GPT2 | {"num_kv_heads": 2}, "GPT-2's would need num_kv_heads=null"),
    ],
)
def test_what_no_layout_computes_is_said(changes, message):
    assert message in unexportable(Decoder(**changes))


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
    path.write_text('{"model": {"num_layer": 2}, "format": 2}')
    with pytest.raises(ArtifactError) as error:
        read_config(tmp_path)
    lines = sorted(str(error.value).splitlines())
    assert lines[0] == f"{path}: format: wanted 1, found 2"
    assert lines[1] == f"{path}: model.num_layer: no such setting; did you mean 'num_layers'?"


def test_settings_do_not_import_torch():
    code = "import pipeline.models.config, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
