"""What operators refuse, each with the numbers and the remedy."""

import jax.numpy as jnp
import pytest

import mkdsl as mk

KV = (jnp.zeros((2, 8, 4)), jnp.zeros((2, 8, 4)))
V8, W = jnp.zeros(8), jnp.zeros((4, 8))
REFUSED = {
    "linear of a matrix": (lambda: mk.linear(W, W), r"mk.linear: weight.shape=\(4, 8\) and x.shape=\(4, 8\); pass \[out, in\] and \[in\]; flatten"),
    "linear transposed": (lambda: mk.linear(W.T, V8), r"mk.linear: weight.shape=\(8, 4\) does not meet x.shape=\(8,\); weights are \[out, in\], as Hugging"),
    "linear of integers": (lambda: mk.linear(W.astype(jnp.int8), V8), "mk.linear: weight.dtype=.*int8.*; use a floating point weight, or mk.fold"),
    "bias": (lambda: mk.linear(W, V8, V8), r"mk.linear: bias.shape=\(8,\) with weight.shape=\(4, 8\); a bias is \[out\]"),
    "fold of a matrix": (lambda: mk.fold(lambda c, t, x: c, W, W, name="mine"), r"mk.mine: streamed.shape=\(4, 8\) and .* pass \[rows, k\] and \[k\]"),
    "fold of another k": (lambda: mk.fold(lambda c, t, x: c, W, jnp.zeros(7)), r"mk.fold: streamed.shape=\(4, 8\) does not meet resident.shape=\(7,\); their k"),
    "queries flat": (lambda: mk.attention(V8, KV, 0), r"mk.attention: q.shape=\(8,\) with cache k.shape=\(2, 8, 4\); q is \[heads, head_dim\]: see mk.heads"),
    "another head_dim": (lambda: mk.attention(jnp.zeros((2, 6)), KV, 0), r"mk.attention: q.shape=\(2, 6\) with cache"),
    "group": (lambda: mk.attention(jnp.zeros((3, 4)), KV, 0), "mk.attention: heads=3 is no multiple of kv_heads=2; use a cache whose kv_heads divides"),
    "window": (lambda: mk.attention(jnp.zeros((2, 4)), KV, 0, window=0), "mk.attention: window=0; a window counts positions; None means all"),
    "cache of one leaf": (lambda: mk.attention(jnp.zeros((2, 4)), KV[:1], 0), "mk.attention: the cache has 1 leaves; kv is a pytree of two arrays, keys then"),
    "cache of all layers": (lambda: mk.append((jnp.zeros((3, 2, 8, 4)),) * 2, jnp.zeros((2, 4)), jnp.zeros((2, 4)), 0), r"mk.append: cache leaves .* inside a layer"),
    "keys flat": (lambda: mk.append(KV, V8, jnp.zeros((2, 4)), 0), r"mk.append: k has shape \(8,\) where the cache wants \(2, 4\); pass \[kv_heads, head_dim\]"),
    "values": (lambda: mk.append(KV, jnp.zeros((2, 4)), V8, 0), r"mk.append: v has shape \(8,\) where the cache wants \(2, 4\)"),
    "rope odd": (lambda: mk.rope(jnp.zeros((2, 5)), 0), r"mk.rope: x.shape=\(2, 5\); pass \[heads, head_dim\] with an even head_dim: see mk.heads"),
    "rope flat": (lambda: mk.rope(V8, 0), r"mk.rope: x.shape=\(8,\)"),
    "heads": (lambda: mk.heads(V8, 3), r"mk.heads: x.shape=\(8,\) with count=3; the features must split evenly into heads"),
    "rms_norm": (lambda: mk.rms_norm(V8, jnp.zeros(4)), r"mk.rms_norm: x.shape=\(8,\) with a weight of \(4,\); weights are \[features\] of the last axis"),
    "layer_norm": (lambda: mk.layer_norm(V8, V8, jnp.zeros(4)), r"mk.layer_norm: x.shape=\(8,\) with a weight of \(4,\)"),
    "embed of a vector": (lambda: mk.embed(V8, 0), r"mk.embed: table.shape=\(8,\); a table is \[rows, features\]"),
    "embed of many": (lambda: mk.embed(W, jnp.array([0, 1])), r"mk.embed: index.shape=\(2,\) .*; pass one integer; batch with jax.vmap or mk.jit"),
    "embed of a float": (lambda: mk.embed(W, 1.0), "mk.embed: index.shape=.* index.dtype=.*float32.*; pass one integer"),
    "argmax": (lambda: mk.argmax(W), r"mk.argmax: x.shape=\(4, 8\); pass \[features\]"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
