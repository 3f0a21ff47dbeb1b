"""Operators that need the whole feature vector. They are plain jnp: the compiler reads their reductions from the jaxpr."""

import jax
import jax.numpy as jnp
from jax import lax

from mkdsl.ops._operator import require


def rms_norm(x: jax.Array, weight: jax.Array | None = None, *, eps: float = 1e-6) -> jax.Array:
    """x / sqrt(mean(x ** 2) + eps) * weight over the last axis, in float32. x is [features] or [heads, head_dim].

    Raises:
      ValueError: the weight does not match x's last axis.
    """
    _check("rms_norm", x, weight)
    x = x.astype(jnp.float32)
    y = x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps)
    return y if weight is None else y * weight.astype(jnp.float32)


def layer_norm(x: jax.Array, weight: jax.Array | None = None, bias: jax.Array | None = None, *, eps: float = 1e-5) -> jax.Array:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis, in float32. x is [features] or [heads, head_dim].

    Raises:
      ValueError: the weight or bias does not match x's last axis.
    """
    _check("layer_norm", x, weight, bias)
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, -1, keepdims=True)
    y = x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps)
    y = y if weight is None else y * weight.astype(jnp.float32)
    return y if bias is None else y + bias.astype(jnp.float32)


def _check(name: str, x: jax.Array, *weights: jax.Array | None) -> None:
    for w in weights:
        require(
            w is None or w.shape == x.shape[-1:],
            name,
            f"{x.shape=} with a weight of {None if w is None else w.shape}",
            "weights are [features] of the last axis",
        )
