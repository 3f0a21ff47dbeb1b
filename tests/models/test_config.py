import json

import pytest
from tiny_checkpoint import LLAMA, LLAMA3, QWEN3

from mkdsl import ops
from mkdsl.models import CheckpointError, DecoderConfig, read_config

SCALING = ops.Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)


def read(tmp_path, raw, generation=None):
    (tmp_path / "config.json").write_text(json.dumps(raw))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    return read_config(tmp_path)


def without(raw, *keys):
    return {key: value for key, value in raw.items() if key not in keys}


def test_llama(tmp_path):
    assert read(tmp_path, LLAMA) == DecoderConfig(
        hidden=32,
        layers=3,
        heads=4,
        kv_heads=2,
        head_dim=8,
        intermediate=48,
        vocab=67,
        eps=1e-5,
        theta=500.0,
        scaling=SCALING,
        tied=False,
        max_context=128,
        bos=1,
        eos=(2,),
    )


def test_qwen3(tmp_path):
    config = read(tmp_path, QWEN3)
    assert (config.qk_norm, config.tied, config.head_dim, config.scaling, config.eps) == (True, True, 16, None, 1e-6)


@pytest.mark.parametrize(
    ("changed", "theta", "scaling"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, 7.0, None),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 7.0}}, 7.0, SCALING),
        ({"rope_theta": 7.0, "rope_scaling": without(LLAMA3, "rope_type") | {"type": "llama3"}}, 7.0, SCALING),
        ({"rope_theta": 7.0, "rope_scaling": None}, 7.0, None),
        ({}, 10_000.0, None),
    ],
    ids=["new style", "new style llama3", "old style llama3", "old style", "defaults"],
)
def test_rotary_parameters_old_and_new(tmp_path, changed, theta, scaling):
    config = read(tmp_path, without(LLAMA, "rope_theta", "rope_scaling") | changed)
    assert (config.theta, config.scaling) == (theta, scaling)


@pytest.mark.parametrize(
    ("raw", "generation", "eos"),
    [
        (LLAMA, None, (2,)),
        (LLAMA | {"eos_token_id": [2, 3]}, None, (2, 3)),
        (LLAMA, {"eos_token_id": [4, 5]}, (4, 5)),
        (LLAMA, {}, (2,)),
        (without(LLAMA, "eos_token_id"), None, ()),
    ],
)
def test_end_tokens(tmp_path, raw, generation, eos):
    assert read(tmp_path, raw, generation).eos == eos


def test_hugging_faces_defaults(tmp_path):
    assert read(tmp_path, without(LLAMA, "num_key_value_heads")).kv_heads == 4
    assert read(tmp_path, LLAMA | {"head_dim": None}).head_dim == 8
    assert read(tmp_path, without(QWEN3, "head_dim")).head_dim == 128


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"architectures": ["GemmaForCausalLM"]},
            "architecture GemmaForCausalLM is not supported; supported are LlamaForCausalLM, Qwen3ForCausalLM",
        ),
        ({"architectures": None}, "architecture None is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; only silu"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not supported; only full attention"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=.* is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not supported"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config=.*fp8.* is not supported.*take the original"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope scaling of type 'linear' is not supported; supported are default and llama3",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope scaling of type 'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [1]}}, "rotary parameters mrope_section are not supported"),
        ({"rope_scaling": without(LLAMA3, "factor", "low_freq_factor")}, "llama3 rope scaling lacks factor, low_freq_factor"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is no multiple of num_key_value_heads=3"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"vocab_size": -5}, "vocab_size=-5; it should be a positive integer"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers='3'"),
    ],
)
def test_refusals(tmp_path, changed, message):
    with pytest.raises(CheckpointError, match=f"config.json: .*{message}"):
        read(tmp_path, LLAMA | changed)


def test_no_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"config.json: it is not there; give the directory"):
        read_config(tmp_path)
    with pytest.raises(CheckpointError, match=r"config.json: there is no such directory"):
        read_config(tmp_path / "nowhere")


@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("[]", "holds a list")])
def test_broken_config(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)
