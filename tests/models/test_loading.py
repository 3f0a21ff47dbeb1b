"""What is in memory while weights are loaded: never more than two tensors on the host, nor more of the model on the device than one copy and those."""

import collections
import tracemalloc
import weakref
from typing import ClassVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from tiny_checkpoint import LAYERS, LLAMA, QWEN3, random_tensors, write

from mkdsl import models
from mkdsl.models._checkpoint import ENDS, LAYER, _with_row

SHARDS = 3
LARGE = LLAMA | {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 12}


def one_after_the_other(config, tensors):
    """The parameters, stacked in host memory from all tensors at once."""
    named = {leaf: [f"model.layers.{i}.{name}.weight" for i in range(LAYERS)] for leaf, name in LAYER.items()}
    layers = {leaf: np.stack([tensors[n] for n in names]) for leaf, names in named.items() if names[0] in tensors}
    ends = {
        leaf: tensors[name] for leaf, name in ENDS.items() if name in tensors and not (config["tie_word_embeddings"] and leaf == "lm_head")
    }
    return jax.tree.map(lambda a: a.astype(ml_dtypes.bfloat16), ends | {"layers": layers})


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("shards", [1, SHARDS])
@pytest.mark.parametrize("raw", [LLAMA, QWEN3], ids=["llama", "qwen3"])
def test_the_bits_are_those_of_the_files(tmp_path, raw, shards, dtype):
    tensors = {name: (1.001 * value.astype(np.float32)).astype(dtype) for name, value in random_tensors(raw).items()}
    _, params = models.load(write(tmp_path, raw, tensors, shards=shards))
    expected = one_after_the_other(raw, tensors)
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint16), b.view(np.uint16), err_msg=str(path))


class Watched:
    """safetensors' reader, which counts the files that are open and the tensors of layers that somebody still has."""

    open, read, most = 0, collections.Counter(), collections.Counter()
    alive: ClassVar = weakref.WeakSet()
    real = safetensors.safe_open

    def __init__(self, path, framework):
        self.file = Watched.real(path, framework)

    def __enter__(self):
        Watched.open += 1
        Watched.most["open"] = max(Watched.most["open"], Watched.open)
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        Watched.open -= 1
        self.file.__exit__(*error)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def get_tensor(self, name):
        tensor = self.file.get_tensor(name).view(Tensor)
        Watched.read[name] += 1
        if ".layers." in name:  # the others are the device's own from here on, where that is a CPU
            Watched.alive.add(tensor)
        Watched.most["tensors"] = max(Watched.most["tensors"], len(Watched.alive))
        return tensor


class Tensor(np.ndarray):
    __hash__ = object.__hash__  # for the set


def test_one_file_and_two_tensors_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors, "safe_open", Watched)
    tensors = random_tensors(QWEN3)
    directory = write(tmp_path, QWEN3, tensors, shards=SHARDS)
    models.load(directory)
    assert Watched.read == dict.fromkeys(tensors, 1)
    assert Watched.most["open"] == 1 and Watched.open == 0
    assert 1 <= Watched.most["tensors"] <= 2


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A checkpoint of 9 MB, whose largest tensor has 131 kB."""
    for name, value in {"HIDDEN": 128, "INNER": 512, "LAYERS": 12}.items():
        monkeypatch.setattr(f"tiny_checkpoint.{name}", value)
    tensors = random_tensors(LARGE)
    return write(tmp_path, LARGE, tensors, shards=SHARDS), sum(t.nbytes for t in tensors.values()), max(t.nbytes for t in tensors.values())


def test_host_memory(large):
    """tracemalloc knows what Python and numpy allocate, and not what JAX's device, though it is the CPU here, does."""
    directory, whole, largest = large
    models.load(directory)  # what is compiled is not to be counted
    tracemalloc.start()
    try:
        models.load(directory)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert largest < peak < 4 * largest < whole / 10


def test_device_memory(large):
    directory, whole, largest = large
    before, seen = sum(a.nbytes for a in jax.live_arrays()), []
    _, params = models.load(directory, progress=lambda *_: seen.append(sum(a.nbytes for a in jax.live_arrays()) - before))
    assert sum(a.nbytes for a in jax.tree.leaves(params)) == whole
    assert whole / 2 < max(seen) <= whole + 2 * largest
    assert len(seen) > 12


def test_a_row_is_written_in_place():
    stack = jax.ShapeDtypeStruct((4, 64, 64), jnp.bfloat16)
    memory = _with_row.lower(stack, jax.ShapeDtypeStruct((64, 64), jnp.bfloat16), 1).compile().memory_analysis()
    assert (memory.alias_size_in_bytes, memory.temp_size_in_bytes) == (4 * 64 * 64 * 2, 0)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_progress(tmp_path, dtype):
    """In bytes of the files; what is not read does not count."""
    tensors, seen = {name: value.astype(dtype) for name, value in random_tensors(QWEN3).items()}, []
    spare = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    models.load(write(tmp_path, QWEN3, tensors | spare, shards=SHARDS), progress=lambda *now: seen.append(now))
    total = sum(t.nbytes for t in tensors.values())
    assert seen[0] == (0, total) and seen[-1] == (total, total)
    assert {of for _, of in seen} == {total}
    assert seen == sorted(set(seen)) and len(seen) == len(tensors) + 1
