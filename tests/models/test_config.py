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
        ({"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, 10_000.0, SCALING),
        ({}, 10_000.0, None),
    ],
    ids=["new style", "new style llama3", "old style llama3", "old style", "the old one first", "defaults"],
)
def test_rotary_parameters_old_and_new(tmp_path, changed, theta, scaling):
    config = read(tmp_path, without(LLAMA, "rope_theta", "rope_scaling") | changed)
    assert (config.theta, config.scaling) == (theta, scaling)


LONGROPE = {"rope_type": "longrope", "short_factor": [1, 1.5, 2, 3], "long_factor": [2, 3, 4, 5]}
FACTORS = {"short_factor": (1.0, 1.5, 2.0, 3.0), "long_factor": (2.0, 3.0, 4.0, 5.0)}


@pytest.mark.parametrize(
    ("rope", "beside", "scaling"),
    [
        ({"type": "linear", "factor": 2}, {}, ops.LinearScaling(factor=2.0)),
        ({"rope_type": "dynamic", "factor": 4.0}, {}, ops.DynamicScaling(factor=4.0, max_position_embeddings=128)),
        ({"rope_type": "yarn", "factor": 4.0}, {}, ops.YarnScaling(factor=4.0, original_max_position_embeddings=128)),
        (
            {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32, "beta_fast": None, "attention_factor": None},
            {},
            ops.YarnScaling(factor=4.0, original_max_position_embeddings=32),
        ),
        (
            {
                "type": "yarn",
                "factor": 40,
                "original_max_position_embeddings": 64,
                "beta_fast": 16,
                "beta_slow": 2,
                "mscale": 1,
                "mscale_all_dim": 0.7,
            }
            | {"truncate": False},
            {},
            ops.YarnScaling(
                factor=40.0,
                original_max_position_embeddings=64,
                beta_fast=16.0,
                beta_slow=2.0,
                mscale=1.0,
                mscale_all_dim=0.7,
                truncate=False,
            ),
        ),
        (
            LONGROPE | {"original_max_position_embeddings": 64},
            {},
            ops.LongRopeScaling(**FACTORS, original_max_position_embeddings=64, factor=2.0),
        ),
        (
            LONGROPE | {"factor": 8.0, "attention_factor": 1.2},
            {"original_max_position_embeddings": 32},
            ops.LongRopeScaling(**FACTORS, original_max_position_embeddings=32, factor=8.0, attention_factor=1.2),
        ),
    ],
)
def test_scalings_as_transformers_reads_them(tmp_path, rope, beside, scaling):
    """What is not said follows from `max_position_embeddings`; what lies beside `rope_scaling` counts first."""
    assert read(tmp_path, LLAMA | {"rope_scaling": rope} | beside).scaling == scaling


@pytest.mark.parametrize(
    ("raw", "generation", "eos"),
    [
        (LLAMA, None, (2,)),
        (LLAMA | {"eos_token_id": [2, 3]}, None, (2, 3)),
        (LLAMA, {"eos_token_id": [4, 5]}, (4, 5)),
        (LLAMA, {"eos_token_id": 4}, (4,)),
        (LLAMA, {}, (2,)),
        (LLAMA | {"eos_token_id": None}, None, ()),
        (without(LLAMA | {"eos_token_id": 7}, "eos_token_id"), None, (2,)),
        (without(QWEN3, "eos_token_id"), None, ()),
    ],
)
def test_end_tokens(tmp_path, raw, generation, eos):
    assert read(tmp_path, raw, generation).eos == eos


def test_the_beginning_token(tmp_path):
    assert [read(tmp_path, LLAMA | {"bos_token_id": bos}).bos for bos in (None, 5)] == [None, 5]
    assert [read(tmp_path, without(raw, "bos_token_id")).bos for raw in (LLAMA, QWEN3)] == [1, None]


def test_hugging_faces_defaults(tmp_path):
    assert read(tmp_path, without(LLAMA, "num_key_value_heads")).kv_heads == 4
    assert read(tmp_path, LLAMA | {"head_dim": None}).head_dim == 8
    assert read(tmp_path, without(QWEN3, "head_dim")).head_dim == 128


REFUSED = [
    (
        {"architectures": ["GemmaForCausalLM"]},
        "architecture GemmaForCausalLM is not supported; supported are LlamaForCausalLM, Qwen3ForCausalLM",
    ),
    ({"architectures": None}, "architecture None is not supported"),
    ({"architectures": [["LlamaForCausalLM"]]}, "architecture .* is not supported"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'; only silu"),
    ({"attention_bias": True}, "attention_bias=True; only attention without biases"),
    ({"mlp_bias": True}, "mlp_bias=True; only an MLP without biases"),
    ({"use_sliding_window": True}, "use_sliding_window=True; only full attention"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=.*; only full attention"),
    ({"layer_types": 7}, "layer_types=7; only full attention"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5; only rotary embedding of whole heads"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config=.*fp8.*; only unquantised .*take the original"),
    ({"num_key_value_heads": 3}, "num_key_value_heads=3; it should divide num_attention_heads=4"),
    ({"head_dim": 7}, "head_dim=7 is odd"),
    ({"hidden_size": None}, "hidden_size=None; it should be a positive integer"),
    ({"vocab_size": -5}, "vocab_size=-5; it should be a positive integer"),
    ({"num_hidden_layers": "3"}, "num_hidden_layers='3'; it should be a positive integer"),
    ({"rms_norm_eps": None}, "rms_norm_eps=None; it should be a positive number"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5'; it should be a positive number"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false'; it should be true or false"),
    ({"eos_token_id": ["</s>"]}, r"eos_token_id=\['</s>'\]; it should be a token's number, or a list of them"),
    ({"bos_token_id": "<s>"}, "bos_token_id='<s>'; it should be a token's number"),
]
SCALINGS_REFUSED = [
    ({"rope_theta": None}, "rope_theta=None; it should be a positive number"),
    ({"rope_scaling": "linear"}, "rope_scaling='linear'; it should be an object of parameters, or null"),
    (
        {"rope_scaling": {"type": "su", "factor": 2.0}},
        "rope_scaling.type='su'; supported are default, linear, dynamic, llama3, yarn, longrope",
    ),
    ({"rope_scaling": {"rope_type": ["yarn"], "factor": 2.0}}, r"rope_scaling.rope_type=\['yarn'\]; supported are"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "has no rope_scaling.factor; it should be a positive number"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": 1}}, "rope_scaling.truncate=1; it should be true or false"),
    ({"rope_scaling": {"rope_type": "linear", "factor": None}}, "rope_scaling.factor=None; it should be a positive number"),
    (
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1] * 3}},
        r"short_factor=\[1, 1, 1\]; it should be a list of 4 positive numbers",
    ),
    (
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1] * 4}},
        "has no rope_scaling.long_factor; it should be a list of 4 positive",
    ),
    ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "rope_scaling.partial_rotary_factor=0.5; only"),
    (
        {"rope_scaling": {"rope_type": "default", "mrope_section": [1]}},
        r"rope_scaling.mrope_section=\[1\]; supported rotary parameters are",
    ),
    ({"rope_scaling": without(LLAMA3, "factor", "low_freq_factor")}, "has no rope_scaling.factor; it should be a positive number"),
    ({"rope_scaling": LLAMA3 | {"factor": "8"}}, "rope_scaling.factor='8'; it should be a positive number"),
    ({"rope_scaling": LLAMA3 | {"factor": float("nan")}}, "rope_scaling.factor=nan; it should be a positive number"),
    ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64.5}}, "rope_scaling.original_max_position_embeddings=64.5"),
    ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "rope_scaling.high_freq_factor=4.0; it should be above low_freq_factor=4.0"),
    ({"rope_scaling": None, "rope_parameters": LLAMA3 | {"rope_theta": "7"}}, "rope_parameters.rope_theta='7'"),
]


@pytest.mark.parametrize(("changed", "message"), REFUSED + SCALINGS_REFUSED)
def test_refusals(tmp_path, changed, message):
    with pytest.raises(CheckpointError, match=f"config.json: .*{message}"):
        read(tmp_path, LLAMA | changed)


def test_what_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"config.json: has no hidden_size; it should be a positive integer"):
        read(tmp_path, without(LLAMA, "hidden_size"))


def test_end_tokens_of_another_file_are_refused_by_that_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"generation_config.json: eos_token_id='</s>'; it should be"):
        read(tmp_path, LLAMA, {"eos_token_id": "</s>"})


@pytest.mark.parametrize(("about", "base"), [({"base_model_name_or_path": "some/model"}, "some/model"), ({}, "another model")])
def test_an_adapter(tmp_path, about, base):
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=f"is a LoRA adapter of {base}, no whole model; merge it into that model"):
        read_config(tmp_path)
