"""Which files hold the weights, by what a directory holds."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_checkpoint import LLAMA, random_tensors, write

from mkdsl import models
from mkdsl.models import CheckpointError
from mkdsl.models._files import INDEX, SINGLE

GATE = "model.layers.1.mlp.gate_proj"


def refused(directory, message):
    with pytest.raises(CheckpointError, match=message):
        models.load(directory)


@pytest.fixture
def whole(tmp_path):
    return write(tmp_path, LLAMA, random_tensors(LLAMA))


@pytest.fixture
def sharded(tmp_path):
    return write(tmp_path, LLAMA, random_tensors(LLAMA), shards=3)


def test_shards_without_an_index(sharded):
    (sharded / INDEX).unlink()
    _, params = models.load(sharded)
    np.testing.assert_array_equal(params["layers"]["wg"][1], random_tensors(LLAMA)[f"{GATE}.weight"])


def test_a_missing_shard_without_an_index(sharded):
    (sharded / INDEX).unlink()
    (sharded / "model-00002-of-00003.safetensors").unlink()
    refused(sharded, "lacks model-00002-of-00003.safetensors, one of 1 missing shards of 3; download it")


def test_shards_of_two_sets(sharded):
    (sharded / INDEX).unlink()
    save_file({"a": np.ones(1)}, sharded / "model-00001-of-00002.safetensors")
    refused(sharded, "holds shards of sets of 00002 and 00003; remove those of all sets but one")


@pytest.mark.parametrize(
    "name", ["model.fp16.safetensors", "model.fp16-00001-of-00002.safetensors", "model-00001-of-00002.fp16.safetensors"]
)
def test_a_variant(whole, name):
    (whole / SINGLE).rename(whole / name)
    refused(whole, rf"holds the weights as variant fp16 \({name}\); take .fp16 out of the names of its files")


def test_other_names(whole):
    (whole / SINGLE).rename(whole / "consolidated.safetensors")
    refused(whole, f"holds consolidated.safetensors; the weights' files should be {SINGLE}, or model-00001-of-0000N.safetensors")


def test_no_safetensors(whole):
    (whole / SINGLE).rename(whole / "pytorch_model.bin")
    refused(whole, f"holds neither {SINGLE} nor {INDEX}, only config.json, pytorch_model.bin; convert")


@pytest.mark.parametrize("places", [None, "all", {"a": 3}, {"a": "../model.safetensors"}])
def test_an_index_without_a_map(sharded, places):
    (sharded / INDEX).write_text(json.dumps({"weight_map": places}))
    refused(sharded, f"{INDEX}: has no weight_map from tensors to files beside it")


ORIGINAL = "only unquantised bf16, f16 and f32 weights are supported: take the original checkpoint"


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (
            {f"{GATE}.qweight": np.int32, f"{GATE}.qzeros": np.int32, f"{GATE}.scales": np.float16},
            f"4-bit weights of AWQ or GPTQ; {ORIGINAL}",
        ),
        ({f"{GATE}.qweight": np.int32, f"{GATE}.g_idx": np.int32}, f"4-bit weights of AWQ or GPTQ; {ORIGINAL}"),
        ({f"{GATE}.weight": np.int8, f"{GATE}.weight_scale": np.float32}, f"FP8 or INT8 weights with scales; {ORIGINAL}"),
        ({f"{GATE}.weight": np.int8, f"{GATE}.weight_scale_inv": np.float32}, f"FP8 or INT8 weights with scales; {ORIGINAL}"),
        ({f"{GATE}.weight_packed": np.int32, f"{GATE}.weight_shape": np.int32}, f"packed weights of compressed-tensors; {ORIGINAL}"),
        ({f"{GATE}.weight": np.uint8, f"{GATE}.weight.absmax": np.uint8}, f"4-bit or 8-bit weights of bitsandbytes; {ORIGINAL}"),
        ({f"base_model.model.{GATE}.lora_A.weight": np.float32}, "a LoRA adapter; merge it into its model"),
    ],
    ids=["AWQ", "GPTQ", "FP8", "FP8 in blocks", "compressed-tensors", "bitsandbytes", "LoRA"],
)
def test_weights_stored_otherwise_though_config_json_does_not_say_so(tmp_path, stored, message):
    tensors = random_tensors(LLAMA)
    del tensors[f"{GATE}.weight"]
    refused(
        write(tmp_path, LLAMA, tensors | {name: np.ones(8, dtype) for name, dtype in stored.items()}),
        f"holds .*{GATE}.*, which is of {message}",
    )
