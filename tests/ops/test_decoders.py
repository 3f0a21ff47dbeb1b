"""`mk.layers` and `mk.prefill`: transformations of whole decoders."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mkdsl as mk

LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCAB, CONTEXT = 2, 4, 2, 8, 16, 24, 12


def layer(x, p, kv, pos):
    h = mk.rms_norm(x, p["norm"])
    q = mk.rope(mk.heads(mk.linear(p["q"], h), HEADS), pos)
    k = mk.rope(mk.heads(mk.linear(p["k"], h), KV_HEADS), pos)
    kv = mk.append(kv, k, mk.heads(mk.linear(p["v"], h), KV_HEADS), pos)
    return x + mk.linear(p["o"], mk.attention(q, kv, pos)), kv


def step(params, kv, token, pos):
    x, kv = mk.layers(layer, mk.embed(params["embed"], token), params["layers"], kv, pos)
    logits = mk.linear(params["embed"], x)
    return mk.argmax(logits), logits, kv


def model(seed=0):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32) * shape[-1] ** -0.5)

    inner = {"q": (HEADS * HEAD_DIM, HIDDEN), "k": (KV_HEADS * HEAD_DIM, HIDDEN), "v": (KV_HEADS * HEAD_DIM, HIDDEN)}
    inner |= {"o": (HIDDEN, HEADS * HEAD_DIM), "norm": (HIDDEN,)}
    params = {"embed": draw(VOCAB, HIDDEN), "layers": {name: draw(LAYERS, *shape) for name, shape in inner.items()}}
    return params, tuple(jnp.zeros((LAYERS, KV_HEADS, CONTEXT, HEAD_DIM)) for _ in "kv")


def close(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), a, b)


@pytest.mark.medium
def test_layers_are_a_loop():
    params, kv = model()
    x = mk.embed(params["embed"], 3)
    found, cache = mk.layers(layer, x, params["layers"], kv, 0)
    for i in range(LAYERS):
        x, one = layer(x, jax.tree.map(lambda a, i=i: a[i], params["layers"]), tuple(c[i] for c in kv), 0)
        close(one, tuple(c[i] for c in cache))
    close(found, x)


def test_layers_disagree():
    params, kv = model()
    with pytest.raises(ValueError, match=r"mk.layers: leaves of params and kv start with axes \[\(2,\), \(3,\)\]; stack every leaf"):
        mk.layers(layer, jnp.zeros(HIDDEN), params["layers"], tuple(jnp.zeros((3, *c.shape[1:])) for c in kv), 0)


@pytest.mark.medium
@settings(max_examples=6, deadline=None)
@given(n=st.integers(1, CONTEXT), pads=st.integers(0, 3), seed=st.integers(0, 9))
def test_prefill_equals_step_by_step(n, pads, seed):
    params, kv = model(seed)
    tokens = np.random.default_rng(seed).integers(0, VOCAB, n).astype(np.int32)
    one, logits, cache = jax.jit(step), [], kv
    for pos, token in enumerate(tokens):
        _, l, cache = one(params, cache, token, pos)
        logits.append(l)
    padded = np.pad(tokens, (0, pads)), np.pad(np.arange(n, dtype=np.int32), (0, pads), constant_values=CONTEXT)
    best, found, filled = jax.jit(mk.prefill(step))(params, kv, *padded)
    close(found[:n], np.stack(logits))
    close(filled, cache)
    np.testing.assert_array_equal(best[:n], np.argmax(logits, -1))


@pytest.mark.medium
def test_prefill_continues_a_cache():
    params, kv = model()
    tokens = np.arange(7, dtype=np.int32)
    _, whole, _ = mk.prefill(step)(params, kv, tokens, tokens)
    _, _, half = mk.prefill(step)(params, kv, tokens[:4], tokens[:4])
    _, rest, _ = mk.prefill(step)(params, half, tokens[4:], tokens[4:])
    close(rest, whole[4:])


@pytest.mark.medium
def test_a_batch_has_a_cache_for_each_sequence():
    params, kv = model()
    caches = jax.tree.map(lambda c: jnp.stack([c, c, c]), kv)
    tokens, pos = jnp.array([1, 2, 3]), jnp.array([0, 5, 2])
    found = jax.jit(jax.vmap(step, (None, 0, 0, 0)))(params, caches, tokens, pos)
    for i in range(3):
        close(jax.tree.map(lambda a, i=i: a[i], found), jax.jit(step)(params, kv, tokens[i], pos[i]))
