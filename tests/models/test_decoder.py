import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoint import LLAMA, QWEN3, VOCAB, forward, random_tensors, write

import mkdsl as mk
from mkdsl import models

CONTEXT = 24
FAMILIES = {
    "llama untied": LLAMA,
    "llama tied": LLAMA | {"tie_word_embeddings": True, "rope_scaling": None},
    "qwen3 tied": QWEN3,
    "qwen3 untied": QWEN3 | {"tie_word_embeddings": False},
}
TOKENS = np.random.default_rng(1).integers(0, VOCAB, 17)


def as_float32(tree):
    return jax.tree.map(lambda a: a.astype(jnp.float32), tree)


def stepwise(config, params, tokens, dtype=jnp.float32):
    step, kv = jax.jit(models.decode_step(config)), models.init_cache(config, CONTEXT, dtype=dtype)
    best, logits = [], []
    for pos, token in enumerate(tokens):
        b, l, kv = step(params, kv, jnp.int32(token), jnp.int32(pos))
        best.append(int(b))
        logits.append(l)
    return np.array(best), np.stack(logits), kv


@pytest.mark.medium
@pytest.mark.parametrize("raw", FAMILIES.values(), ids=FAMILIES)
def test_equals_plain_numpy(tmp_path, raw):
    tensors = random_tensors(raw)
    config, params = models.load(write(tmp_path, raw, tensors))
    expected = forward(raw, tensors, TOKENS)
    best, logits, _ = stepwise(config, as_float32(params), TOKENS)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=2e-5)
    np.testing.assert_array_equal(best, logits.argmax(-1))


@pytest.mark.medium
@pytest.mark.parametrize("raw", [LLAMA, QWEN3], ids=["llama", "qwen3"])
def test_bf16_stays_near_float32(tmp_path, raw):
    tensors = random_tensors(raw)
    config, params = models.load(write(tmp_path, raw, tensors))
    _, logits, _ = stepwise(config, params, TOKENS, jnp.bfloat16)
    error = np.abs(logits - forward(raw, tensors, TOKENS))
    assert error.max() < 0.1  # logits are of order one


@pytest.mark.medium
@pytest.mark.parametrize("raw", [LLAMA, QWEN3], ids=["llama", "qwen3"])
def test_prefill_equals_stepwise(tmp_path, raw):
    config, params = models.load(write(tmp_path, raw, random_tensors(raw)))
    params = as_float32(params)
    best, logits, kv = stepwise(config, params, TOKENS)
    padded = np.pad(TOKENS, (0, 3)), np.pad(np.arange(len(TOKENS)), (0, 3), constant_values=CONTEXT)
    empty = models.init_cache(config, CONTEXT, dtype=jnp.float32)
    all_best, all_logits, filled = jax.jit(mk.prefill(models.decode_step(config)))(params, empty, *map(jnp.asarray, padded))
    np.testing.assert_array_equal(all_best[:-3], best)
    np.testing.assert_allclose(all_logits[:-3], logits, rtol=1e-4, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), filled, kv)


@pytest.mark.medium
def test_a_batch_is_vmap(tmp_path):
    config, params = models.load(write(tmp_path, QWEN3, random_tensors(QWEN3)))
    kv = models.init_cache(config, CONTEXT, batch=3)
    step = jax.jit(jax.vmap(models.decode_step(config), (None, 0, 0, 0)))
    token, logits, kv = step(params, kv, jnp.arange(3), jnp.zeros(3, jnp.int32))
    assert (token.shape, logits.shape, kv["k"].shape) == ((3,), (3, VOCAB), (3, 3, 2, CONTEXT, 16))
    one = jax.jit(models.decode_step(config))(params, models.init_cache(config, CONTEXT), jnp.int32(1), jnp.int32(0))
    np.testing.assert_allclose(logits[1], one[1], atol=0.05)


def test_one_function_per_shape():
    shape = models.SHAPES["qwen3-0.6b"]
    assert models.decode_step(shape) is models.decode_step(models.SHAPES["qwen3-0.6b"])


@pytest.mark.medium
@pytest.mark.parametrize("raw", [LLAMA, QWEN3], ids=["llama", "qwen3"])
def test_random_params_are_as_described(tmp_path, raw):
    config, loaded = models.load(write(tmp_path, raw, random_tensors(raw)))
    params = models.random_params(config, jax.random.key(0))
    described = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
    assert described == models.abstract_params(config)
    assert jax.tree.structure(params) == jax.tree.structure(loaded)
    _, logits, _ = stepwise(config, params, TOKENS, jnp.bfloat16)
    assert np.isfinite(logits).all()
    assert 0.3 < logits.std() < 3


BILLIONS = {
    "llama-3.2-1b": 1.236,
    "llama-3.1-8b": 8.030,
    "qwen3-0.6b": 0.596,
    "qwen3-1.7b": 1.721,
    "qwen3-8b": 8.191,
    "smollm2-135m": 0.1345,
}


@pytest.mark.parametrize("name", models.SHAPES)
def test_known_shapes_have_their_known_size_and_trace(name):
    config = models.SHAPES[name]
    params = models.abstract_params(config)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e9 == pytest.approx(BILLIONS[name], rel=1e-3)
    kv = jax.eval_shape(lambda: models.init_cache(config, 64))
    token, logits, after = jax.eval_shape(models.decode_step(config), params, kv, jnp.int32(0), jnp.int32(0))
    assert (token.shape, token.dtype, logits.shape, logits.dtype) == ((), jnp.int32, (config.vocab,), jnp.float32)
    assert after == kv
