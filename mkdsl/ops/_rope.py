"""Rotary position embedding, with the two halves of a head rotated against each other (Hugging Face's order)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from mkdsl.ops._operator import Operator, bind, require, static


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's frequency scaling, with the names of Hugging Face's `rope_scaling`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class Rope(Operator):
    theta: float
    scaling: Llama3Scaling | None

    def frequencies(self, head_dim: int) -> np.ndarray:
        """[head_dim / 2] float32 radians per position: theta ** (-2 i / head_dim), scaled where asked."""
        inv = self.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        return (inv if self.scaling is None else _llama3(inv, self.scaling)).astype(np.float32)

    def table(self, positions: int, head_dim: int) -> np.ndarray:
        """[positions, 2, head_dim / 2] float32: the cosines and sines of every position."""
        angle = np.arange(positions, dtype=np.float32)[:, None] * self.frequencies(head_dim)
        return np.stack([np.cos(angle), np.sin(angle)], 1)

    def rotation(self, pos: jax.Array, head_dim: int) -> jax.Array:
        """[2, head_dim / 2] float32: the cosines and sines of a position."""
        angle = pos.astype(jnp.float32) * self.frequencies(head_dim)
        return jnp.stack([jnp.cos(angle), jnp.sin(angle)])

    def reference(self, x: jax.Array, pos: jax.Array) -> tuple[jax.Array, ...]:
        cos, sin = self.rotation(pos, x.shape[1])
        lo, hi = jnp.split(x, 2, axis=1)
        return (jnp.concatenate([lo * cos - hi * sin, hi * cos + lo * sin], axis=1),)


def _llama3(inv: np.ndarray, s: Llama3Scaling) -> np.ndarray:
    """Long waves are slowed by `factor`, short ones kept, those between blended (Llama 3.1)."""
    wavelength = 2 * math.pi / inv
    span = s.high_freq_factor - s.low_freq_factor
    smooth = np.clip((s.original_max_position_embeddings / wavelength - s.low_freq_factor) / span, 0.0, 1.0)
    return (1 - smooth) * inv / s.factor + smooth * inv


def rope(x: jax.Array, pos: jax.Array, *, theta: float = 10_000.0, scaling: Llama3Scaling | None = None) -> jax.Array:
    """Rotates x [heads, head_dim] by its position: feature i of the first half pairs with feature i of the second.

    Raises:
      ValueError: x is not [heads, even head_dim].
      TypeError: theta is no Python number.
    """
    require(x.ndim == 2 and x.shape[1] % 2 == 0, "rope", f"{x.shape=}", "pass [heads, head_dim] with an even head_dim: see mk.heads")
    return bind(Rope(static("rope", "theta", theta, float), scaling), x, jnp.asarray(pos, jnp.int32))[0]


def heads(x: jax.Array, count: int) -> jax.Array:
    """[count * head_dim] seen as [count, head_dim].

    Raises:
      ValueError: the features do not split evenly.
      TypeError: count is no Python int.
    """
    count = static("heads", "count", count, int)
    require(
        x.ndim == 1 and count > 0 and x.shape[0] % count == 0,
        "heads",
        f"{x.shape=} with {count=}",
        "the features must split evenly into heads",
    )
    return x.reshape(count, -1)
