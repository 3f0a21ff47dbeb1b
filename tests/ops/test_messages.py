"""What operators refuse, each with the numbers and the remedy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mkdsl as mk

KV = (jnp.zeros((2, 8, 4)), jnp.zeros((2, 8, 4)))
V8, W, K = jnp.zeros(8), jnp.zeros((4, 8)), jnp.zeros((2, 4))


def keep(carry, tile, x):
    return carry


def pair(carry, tile, x):
    return carry, carry


REFUSED = [
    (lambda: mk.linear(W, W), "linear: weight.shape=(4, 8) and x.shape=(4, 8); pass [out, in] and [in]; flatten heads with reshape(-1)"),
    (lambda: mk.linear(W.T, V8), "linear: weight.shape=(8, 4) does not meet x.shape=(8,); weights are [out, in], as Hugging Face"),
    (lambda: mk.linear(W.astype(jnp.int8), V8), "linear: weight.dtype=dtype('int8'); use a floating point weight, or mk.fold with a step"),
    (lambda: mk.linear(W, V8, V8), "linear: bias.shape=(8,) with weight.shape=(4, 8); a bias is [out]"),
    (lambda: mk.fold(keep, W, W, name="mine"), "mine: streamed.shape=(4, 8) and resident.shape=(4, 8); pass [rows, k] and [k]"),
    (lambda: mk.fold(keep, W, V8[:7]), "fold: streamed.shape=(4, 8) does not meet resident.shape=(7,); their k must agree"),
    (lambda: mk.fold(pair, W, V8), "fold: step makes ((4,), (4,)) of carries (4,); return what comes in"),
    (
        lambda: mk.fold(lambda c, t, x: c + mk.dot(t, x).sum(), W, V8, finish=jnp.sum),
        "fold: finish returns () of carries (4,); return one array [rows]",
    ),
    (lambda: mk.attention(V8, KV, 0), "attention: q.shape=(8,) with cache k.shape=(2, 8, 4); q is [heads, head_dim]: see mk.heads"),
    (lambda: mk.attention(jnp.zeros((2, 6)), KV, 0), "attention: q.shape=(2, 6) with cache k.shape=(2, 8, 4); q is [heads, head_dim]"),
    (lambda: mk.attention(jnp.zeros((3, 4)), KV, 0), "attention: heads=3 is no multiple of kv_heads=2; use a cache whose kv_heads divides"),
    (lambda: mk.attention(K, KV, 0, window=0), "attention: window=0; a window counts positions; None means all"),
    (lambda: mk.attention(K, KV[:1], 0), "attention: the cache has 1 leaves; kv is a pytree of two arrays, keys then values"),
    (
        lambda: mk.append((W[None, None],) * 2, K, K, 0),
        "append: cache leaves (1, 1, 4, 8) and (1, 1, 4, 8); inside a layer they are [kv_heads,",
    ),
    (lambda: mk.append(KV, V8, K, 0), "append: k has shape (8,) where the cache wants (2, 4); pass [kv_heads, head_dim]"),
    (lambda: mk.append(KV, K, V8, 0), "append: v has shape (8,) where the cache wants (2, 4); pass [kv_heads, head_dim]"),
    (lambda: mk.rope(jnp.zeros((2, 5)), 0), "rope: x.shape=(2, 5); pass [heads, head_dim] with an even head_dim: see mk.heads"),
    (lambda: mk.rope(V8, 0), "rope: x.shape=(8,); pass [heads, head_dim]"),
    (lambda: mk.heads(V8, 3), "heads: x.shape=(8,) with count=3; the features must split evenly into heads"),
    (lambda: mk.heads(V8, 0), "heads: x.shape=(8,) with count=0; the features must split evenly into heads"),
    (lambda: mk.rms_norm(V8, V8[:4]), "rms_norm: x.shape=(8,) with a weight of (4,); weights are [features] of the last axis"),
    (lambda: mk.layer_norm(V8, V8, V8[:4]), "layer_norm: x.shape=(8,) with a weight of (4,); weights are [features] of the last axis"),
    (lambda: mk.embed(V8, 0), "embed: table.shape=(8,); a table is [rows, features]"),
    (
        lambda: mk.embed(W, jnp.array([0, 1])),
        "embed: index.shape=(2,) index.dtype=dtype('int32'); pass one integer; batch with jax.vmap or",
    ),
    (lambda: mk.embed(W, 1.0), "embed: index.shape=() index.dtype=dtype('float32'); pass one integer"),
    (
        lambda: mk.prefill(lambda p, kv, token, pos: {"kv": kv})(V8, KV, jnp.zeros(2, int), jnp.zeros(2, int)),
        "prefill: the decode step returns PyTreeDef({'kv': (*, *)}); return a tuple with its cache last",
    ),
    (lambda: mk.argmax(W), "argmax: x.shape=(4, 8); pass [features]"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[f"{i}-{m.split(':')[0]}" for i, (_, m) in enumerate(REFUSED)])
def test_refusals(call, message):
    with pytest.raises(ValueError, match=re.escape(f"mk.{message}")):
        call()


STATIC = {
    "window": lambda n: mk.attention(K, KV, 0, window=n),
    "scale": lambda n: mk.attention(K, KV, 0, scale=n),
    "softcap": lambda n: mk.attention(K, KV, 0, softcap=n),
    "theta": lambda n: mk.rope(K, 0, theta=n),
    "dims": lambda n: mk.rope(K, 0, dims=n),
    "count": lambda n: mk.heads(V8, n),
}


@pytest.mark.parametrize("name", STATIC)
def test_what_a_kernel_is_made_for_is_a_number(name):
    """Regression: a window that is traced was a TracerBoolConversionError."""
    for wrong in (jax.jit(STATIC[name]), lambda n: STATIC[name]("2"), lambda n: STATIC[name](True)):
        with pytest.raises(TypeError, match=rf"mk\.\w+: {name} is .*; pass (an int|a float) of Python's: a kernel is made for one"):
            wrong(jnp.int32(2))
    assert STATIC[name](np.int64(2)).shape == STATIC[name](2).shape == STATIC[name](jnp.int32(2)).shape
