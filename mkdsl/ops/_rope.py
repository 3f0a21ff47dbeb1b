"""Rotary position embedding: pairs of features of a head are turned by an angle that grows with the position."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mkdsl.ops._operator import Operator, require, static
from mkdsl.ops._rope_scaling import Scaling


@dataclasses.dataclass(frozen=True)
class Rope(Operator):
    """The first `dims` features of each head are rotated, as pairs (i, i + dims / 2), or (2 i, 2 i + 1) if interleaved; others pass."""

    theta: float
    scaling: Scaling | None
    dims: int
    interleaved: bool

    def by_halves(self, head_dim: int) -> bool:
        """Whether the two halves of a whole head are rotated against each other."""
        return self.dims == head_dim and not self.interleaved

    def frequencies(self, length: Any) -> Any:
        """[dims / 2] float32 radians per position, in a sequence of so many tokens: theta ** (-2 i / dims), scaled where asked."""
        inverse = self.theta ** -(np.arange(0, self.dims, 2, dtype=np.float64) / self.dims)
        return (inverse if self.scaling is None else self.scaling.scaled(inverse, self.theta, length)).astype(np.float32)

    def table(self, positions: int, head_dim: int) -> np.ndarray:
        """`rotation` of every position, [positions, 2, ..]."""
        return self._rotation(np, np.arange(positions, dtype=np.float32)[:, None], head_dim)

    def rotation(self, pos: jax.Array, head_dim: int) -> jax.Array:
        """What a kernel is handed for a position, float32: cosines and sines [2, head_dim / 2] of what is rotated by halves. Else [2, head_dim]: what
        each feature is multiplied with, and what its partner is, where those that pass have 1 and 0."""
        return self._rotation(jnp, pos.astype(jnp.float32), head_dim)

    def partners(self, x: jax.Array) -> jax.Array:
        """For each feature of x [heads, head_dim] the one that it is rotated against; 0 for those that pass."""
        swapped = jnp.flip(self._pairs(x), self._axis).reshape(len(x), self.dims)
        return jnp.pad(swapped, ((0, 0), (0, x.shape[1] - self.dims)))

    def reference(self, x: jax.Array, pos: jax.Array) -> tuple[jax.Array, ...]:
        cos, sin = self._cos_sin(jnp, pos.astype(jnp.float32))
        lo, hi = jnp.moveaxis(self._pairs(x), self._axis, 0)
        rotated = jnp.stack([lo * cos - hi * sin, hi * cos + lo * sin], self._axis).reshape(len(x), self.dims)
        return (jnp.concatenate([rotated, x[:, self.dims :]], axis=1),)

    @property
    def _axis(self) -> int:
        """Of `_pairs`: along which the two of a pair lie."""
        return 2 if self.interleaved else 1

    def _pairs(self, x: jax.Array) -> jax.Array:
        return x[:, : self.dims].reshape(len(x), *((-1, 2) if self.interleaved else (2, -1)))

    def _cos_sin(self, xp: Any, pos: Any) -> tuple[Any, Any]:
        """[.., dims / 2] each of positions [.., 1], by NumPy or JAX."""
        angle = pos * self.frequencies(pos + 1)
        amplitude = 1.0 if self.scaling is None else float(self.scaling.amplitude)
        return xp.cos(angle) * amplitude, xp.sin(angle) * amplitude

    def _rotation(self, xp: Any, pos: Any, head_dim: int) -> Any:
        cos, sin = self._cos_sin(xp, pos)
        if not self.by_halves(head_dim):
            at, half = np.arange(head_dim), self.dims // 2
            pair, sign = (at // 2 % half, at % 2 * 2 - 1) if self.interleaved else (at % half, np.where(at < half, -1, 1))
            cos = xp.where(at < self.dims, cos[..., pair], np.float32(1))
            sin = xp.where(at < self.dims, sin[..., pair] * sign.astype(np.float32), np.float32(0))
        return xp.stack([cos, sin], -2)


def rope(
    x: jax.Array,
    pos: jax.Array,
    *,
    theta: float = 10_000.0,
    scaling: Scaling | None = None,
    dims: int | None = None,
    interleaved: bool = False,
) -> jax.Array:
    """Rotates x [heads, head_dim] by its position.

    Args:
      x: [heads, head_dim].
      pos: an integer.
      theta: the base of the frequencies.
      scaling: for long contexts: `mk.LinearScaling`, `mk.DynamicScaling`, `mk.Llama3Scaling`, `mk.YarnScaling` or `mk.LongRopeScaling`.
      dims: how many features of each head are rotated, from the first; the others pass as they are (GPT-NeoX, Phi, StableLM). None: all.
      interleaved: feature 2 i is paired with 2 i + 1 (GPT-J, Cohere), not i with i + dims / 2.

    Returns:
      [heads, head_dim], float32.

    Raises:
      ValueError: x is not [heads, even head_dim], or dims is no even number up to head_dim.
      TypeError: theta or dims is no Python number, or scaling none of these.
    """
    require(x.ndim == 2 and x.shape[1] % 2 == 0, "rope", f"{x.shape=}", "pass [heads, head_dim] with an even head_dim: see mk.heads")
    dims = x.shape[1] if dims is None else static("rope", "dims", dims, int)
    require(
        0 < dims <= x.shape[1] and dims % 2 == 0, "rope", f"{dims=} of {x.shape=}", f"rotate an even number of features up to {x.shape[1]}"
    )
    if scaling is not None and not isinstance(scaling, Scaling):
        raise TypeError(f"mk.rope: {scaling=}; pass one such as mk.YarnScaling(factor=4.0, original_max_position_embeddings=4096)")
    op = Rope(static("rope", "theta", theta, float), scaling, dims, bool(interleaved))
    return op.bind(x, jnp.asarray(pos, jnp.int32))[0]


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
