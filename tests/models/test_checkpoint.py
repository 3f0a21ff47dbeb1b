import json
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_checkpoint import HIDDEN, INNER, LAYERS, LLAMA, QWEN3, VOCAB, random_tensors, write

from mkdsl import models
from mkdsl.models import CheckpointError

GATE = "model.layers.1.mlp.gate_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("raw", [LLAMA, QWEN3], ids=["untied", "tied"])
def test_weights_arrive_stacked(tmp_path, raw, shards):
    tensors = random_tensors(raw)
    config, params = models.load(write(tmp_path, raw, tensors, shards=shards))
    assert params["layers"]["wg"].shape == (LAYERS, INNER, HIDDEN)
    assert params["layers"]["wg"].dtype == jnp.bfloat16
    for i in range(LAYERS):
        np.testing.assert_array_equal(params["layers"]["wd"][i], tensors[f"model.layers.{i}.mlp.down_proj.weight"])
        np.testing.assert_array_equal(params["layers"]["post_norm"][i], tensors[f"model.layers.{i}.post_attention_layernorm.weight"])
    np.testing.assert_array_equal(params["embed"], tensors["model.embed_tokens.weight"])
    assert ("lm_head" in params) is not config.tied
    assert ("q_norm" in params["layers"]) is config.qk_norm


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_other_floats_become_bf16(tmp_path, dtype):
    tensors = {name: value.astype(dtype) for name, value in random_tensors(LLAMA).items()}
    _, params = models.load(write(tmp_path, LLAMA, tensors))
    np.testing.assert_array_equal(params["norm"], tensors["model.norm.weight"].astype(ml_dtypes.bfloat16))


def test_tensors_that_say_nothing_new_are_left(tmp_path):
    spare = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32), "lm_head.weight": np.ones((VOCAB, HIDDEN), np.float32)}
    _, params = models.load(write(tmp_path, QWEN3, random_tensors(QWEN3) | spare))
    assert "lm_head" not in params


def refused(directory, message):
    with pytest.raises(CheckpointError, match=message):
        models.load(directory)


def test_missing_tensors(tmp_path):
    tensors = random_tensors(LLAMA)
    refused(
        write(tmp_path, LLAMA, {k: v for k, v in tensors.items() if k != GATE}),
        f"{tmp_path}/model.safetensors: lacks {GATE}; download it again",
    )
    refused(write(tmp_path, LLAMA | {"num_hidden_layers": 4}, tensors), r"lacks model.layers.3.\S+, \S+, \S+ and 6 more tensors")


@pytest.mark.parametrize(("index", "named"), [(True, f"/{INDEX}"), (False, "")])
def test_missing_tensors_of_shards(tmp_path, index, named):
    write(tmp_path, LLAMA, {k: v for k, v in random_tensors(LLAMA).items() if k != GATE}, shards=2)
    if not index:
        (tmp_path / INDEX).unlink()
    refused(tmp_path, f"^{tmp_path}{named}: lacks {GATE}; download it again")


def test_untied_without_a_head(tmp_path):
    refused(write(tmp_path, QWEN3 | {"tie_word_embeddings": False}, random_tensors(QWEN3)), "lacks lm_head.weight")


def test_wrong_shape(tmp_path):
    tensors = random_tensors(LLAMA) | {GATE: np.ones((INNER, HIDDEN + 1), np.float32)}
    refused(write(tmp_path, LLAMA, tensors), rf"model.safetensors: {GATE} has shape \(48, 33\) where config.json wants \(48, 32\)")


def test_wrong_vocabulary(tmp_path):
    directory = write(tmp_path, LLAMA | {"vocab_size": VOCAB + 1}, random_tensors(LLAMA))
    refused(directory, r"model.embed_tokens.weight has shape \(67, 32\) where config.json wants \(68, 32\)")


def test_unsupported_dtype(tmp_path):
    tensors = random_tensors(LLAMA) | {GATE: np.ones((INNER, HIDDEN), np.int8)}
    refused(write(tmp_path, LLAMA, tensors), f"{GATE} is I8; supported are BF16, F16, F32")


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.3.mlp.up_proj.weight"])
def test_unexpected_tensor(tmp_path, name):
    tensors = random_tensors(LLAMA) | {name: np.ones(8, np.float32)}
    refused(write(tmp_path, LLAMA, tensors), f"holds {name}, of which config.json says nothing")


@pytest.mark.parametrize("keep", [0, 100, 20_000])
def test_truncated_file(tmp_path, keep):
    path = write(tmp_path, LLAMA, random_tensors(LLAMA)) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(tmp_path, rf"model.safetensors: truncated or corrupt \(.*\), {keep} bytes; download it again")


def test_missing_shard(tmp_path):
    write(tmp_path, LLAMA, random_tensors(LLAMA), shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refused(tmp_path, f"model-00002-of-00002.safetensors: this shard is not there, though {INDEX} names it")


def test_shard_without_its_tensor(tmp_path):
    tensors = random_tensors(LLAMA)
    write(tmp_path, LLAMA, tensors, shards=2)
    shard = json.loads((tmp_path / INDEX).read_text())["weight_map"][GATE]
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, tmp_path / shard)
    refused(tmp_path, rf"{shard}: lacks model\S+, which {INDEX} places there; download the file again")


def test_without_the_extra(tmp_path, monkeypatch):
    write(tmp_path, LLAMA, random_tensors(LLAMA))
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r'the package safetensors is not installed: pip install "mkdsl\[hf\]"'):
        models.load(tmp_path)


def test_other_missing_modules_are_not_blamed_on_an_extra():
    with pytest.raises(ModuleNotFoundError, match="no_such_module"), models.extra("hf"):
        import no_such_module  # noqa: F401


@pytest.mark.medium
def test_extras_are_imported_only_where_used():
    check = """
import sys, mkdsl
assert "mkdsl.models" not in sys.modules
import mkdsl.engine
assert not {"safetensors", "tokenizers", "jinja2", "rich", "typer", "gguf"} & set(sys.modules), sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", check], check=True)
