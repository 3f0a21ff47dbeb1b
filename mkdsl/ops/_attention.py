"""Attention of one new token over a KV cache: a fold over positions with an online softmax as its carry."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mkdsl.ops._causal import Causal
from mkdsl.ops._operator import Operator, in_front, require, sharing, static
from mkdsl.ops._paged import contiguous, is_paged, place

MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class Attention(Operator):
    """Grouped-query attention. carry = (running maximum m, sum of exp(s - m), weighted sum of values)."""

    scale: float
    window: int | None = None
    softcap: float | None = None

    def score(self, s: jax.Array) -> jax.Array:
        """Raw dot products to scores: scale and soft-cap (cap * tanh(s / cap), as in Gemma 2)."""
        s = s * self.scale
        return s if self.softcap is None else self.softcap * jnp.tanh(s / self.softcap)

    def step(self, carry: Any, k: jax.Array, v: jax.Array, q: jax.Array, keep: jax.Array) -> Any:
        """Folds positions in: k, v [kv_heads, c, head_dim], q [kv_heads, group, head_dim], keep [c] says which positions count."""
        m, z, acc = carry
        s = lax.dot_general(
            k, q.astype(k.dtype), (((2,), (2,)), ((0,), (0,))), precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )
        s = jnp.where(keep[:, None], self.score(s), MASKED)  # [kv_heads, c, group]
        m_new = jnp.maximum(m, s.max(1))
        p = jnp.where(keep[:, None], jnp.exp(s - m_new[:, None]), 0.0)
        old = jnp.exp(m - m_new)
        pv = lax.dot_general(
            p.astype(v.dtype), v, (((1,), (1,)), ((0,), (0,))), precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )
        return m_new, z * old + p.sum(1), acc * old[..., None] + pv

    def merge(self, a: Any, b: Any) -> Any:
        """Log-sum-exp merge of two carries over disjoint positions."""
        m = jnp.maximum(a[0], b[0])
        ea, eb = jnp.exp(a[0] - m), jnp.exp(b[0] - m)
        return m, a[1] * ea + b[1] * eb, a[2] * ea[..., None] + b[2] * eb[..., None]

    def init(self, kv_heads: int, group: int, head_dim: int) -> Any:
        return jnp.full((kv_heads, group), MASKED), jnp.zeros((kv_heads, group)), jnp.zeros((kv_heads, group, head_dim))

    def finish(self, carry: Any) -> jax.Array:
        return carry[2] / carry[1][..., None]

    def reference(self, q: jax.Array, k: jax.Array, v: jax.Array, pos: jax.Array, *table: jax.Array) -> tuple[jax.Array, ...]:
        """With a table, k and v are pages."""
        k, v = (contiguous(pages, *table) for pages in (k, v)) if table else (k, v)
        kv_heads, context, head_dim = k.shape
        at = jnp.arange(context)
        keep = at <= pos
        if self.window is not None:
            keep &= at > pos - self.window
        grouped = q.reshape(kv_heads, -1, head_dim)
        out = self.finish(self.step(self.init(*grouped.shape), k, v, grouped, keep))
        return (jnp.where(pos < context, out, jnp.nan).reshape(-1),)  # past the cache: loudly nothing

    def batched(self, args: Any, axes: Any) -> Any:
        cache = [1, 2, *range(4, len(args))]
        how = sharing()
        if how is None or any(axes[i] is not None for i in cache):
            return super().batched(args, axes)
        k, v, *table = (args[i] for i in cache)  # prefill: the tokens of one sequence share it
        k, v = (contiguous(pages, *table) for pages in (k, v)) if table else (k, v)
        q, pos = in_front((args[0], args[3]), (axes[0], axes[3]))
        (out,) = Causal(self, ascending=how.ascending).bind(q[None], k[None], v[None], pos[None])
        return (out[0],), (0,)


def attention(
    q: jax.Array, kv: Any, pos: jax.Array, *, scale: float | None = None, window: int | None = None, softcap: float | None = None
) -> jax.Array:
    """Causal attention of the token at `pos` over the cached positions 0..pos (its own included: append first).

    Args:
      q: [heads, head_dim] queries; heads is a multiple of the cache's kv_heads (GQA).
      kv: a pytree with two leaves (keys, values) of [kv_heads, context, head_dim], or `mk.Paged`.
      pos: int32 scalar.
      scale: multiplies q·k; head_dim ** -0.5 by default.
      window: only the last `window` positions count.
      softcap: scores become softcap * tanh(score / softcap).

    Returns:
      [heads * head_dim] float32; NaN when pos lies past the cache.

    Raises:
      ValueError: the shapes do not meet.
      TypeError: scale, window or softcap is no Python number.
    """
    (k, v), table = cache_leaves(kv, "attention")
    require(
        q.ndim == 2 and q.shape[1] == k.shape[-1], "attention", f"{q.shape=} with cache {k.shape=}", "q is [heads, head_dim]: see mk.heads"
    )
    require(
        q.shape[0] % k.shape[-3] == 0,
        "attention",
        f"heads={q.shape[0]} is no multiple of kv_heads={k.shape[-3]}",
        "use a cache whose kv_heads divides heads",
    )
    window = None if window is None else static("attention", "window", window, int)
    require(window is None or window > 0, "attention", f"{window=}", "a window counts positions; None means all")
    softcap = None if softcap is None else static("attention", "softcap", softcap, float)
    op = Attention(static("attention", "scale", q.shape[1] ** -0.5 if scale is None else scale, float), window, softcap)
    return op.bind(q, k, v, jnp.asarray(pos, jnp.int32), *table)[0]


@dataclasses.dataclass(frozen=True)
class Append(Operator):
    """Writes one token's keys or values into the cache at pos; a position outside the cache writes nothing."""

    def reference(self, cache: jax.Array, new: jax.Array, pos: jax.Array) -> tuple[jax.Array, ...]:
        at = jnp.where(pos < 0, cache.shape[1], pos)  # jnp would count negative positions from the end
        return (cache.at[:, at].set(new.astype(cache.dtype), mode="drop"),)

    def batched(self, args: Any, axes: Any) -> Any:
        if sharing() is None or axes[0] is not None:
            return super().batched(args, axes)
        cache, new, pos = args[0], *in_front(args[1:], axes[1:])  # prefill: the tokens of one sequence share its cache
        at = jnp.where(pos < 0, cache.shape[1], pos)
        token = jnp.full(cache.shape[1], -1).at[at].set(jnp.arange(at.size), mode="drop")  # of each position
        rows = jnp.moveaxis(new, 0, 1).at[:, token].get(mode="clip").astype(cache.dtype)
        return (jnp.where(token[:, None] >= 0, rows, cache),), (None,)


@dataclasses.dataclass(frozen=True)
class AppendToPage(Operator):
    """Writes tokens' keys or values into pages that all sequences share. Axes that a batch brings stand first, of all but the pages."""

    @property
    def name(self) -> str:
        return "append"

    def reference(self, pages: jax.Array, new: jax.Array, pos: jax.Array, table: jax.Array) -> tuple[jax.Array, ...]:
        at = functools.partial(place, count=pages.shape[0], size=pages.shape[2])
        for _ in range(pos.ndim):
            at = jax.vmap(at)
        page, row = (i.reshape(-1) for i in at(table, pos))
        rows = new.reshape(-1, *new.shape[-2:]).astype(pages.dtype)
        return (pages.at[page, :, row].set(rows, mode="drop"),)

    def batched(self, args: Any, axes: Any) -> Any:
        require(
            axes[0] is None, "append", "under vmap the pages have a batch axis", "share them: jax.vmap with in_axes of mk.batch_axes(kv)"
        )
        return self.bind(args[0], *in_front(args[1:], axes[1:])), (None,)


def append(kv: Any, k: jax.Array, v: jax.Array, pos: jax.Array) -> Any:
    """The cache with this token's keys and values [kv_heads, head_dim] written at `pos`.

    Args:
      kv: a pytree with two leaves (keys, values) of [kv_heads, context, head_dim], or `mk.Paged`.
      k, v: [kv_heads, head_dim] each.
      pos: int32 scalar; outside the cache nothing is written.

    Raises:
      ValueError: the shapes do not meet.
    """
    leaves, table = cache_leaves(kv, "append")
    for what, new, cache in zip("kv", (k, v), leaves, strict=True):
        expected = (cache.shape[-3], cache.shape[-1])
        require(
            new.shape == expected, "append", f"{what} has shape {new.shape} where the cache wants {expected}", "pass [kv_heads, head_dim]"
        )
    pos = jnp.asarray(pos, jnp.int32)
    op = AppendToPage() if table else Append()
    out = [op.bind(cache, new, pos, *table)[0] for cache, new in zip(leaves, (k, v), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(kv), (*out, *table))


def cache_leaves(kv: Any, where: str) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    """The (keys, values) of a cache pytree, and its table if it is paged."""
    paged = is_paged(kv)
    leaves = jax.tree.leaves(kv.pages if paged else kv)
    require(len(leaves) == 2, where, f"the cache has {len(leaves)} leaves", "kv is a pytree of two arrays, keys then values, or mk.Paged")
    k, v = leaves
    shape = "[pages, kv_heads, size, head_dim]" if paged else "[kv_heads, context, head_dim]"
    fits = k.ndim == (4 if paged else 3) and k.shape == v.shape
    require(fits, where, f"cache leaves {k.shape} and {v.shape}", f"inside a layer they are {shape}")
    if not paged:
        return (k, v), ()
    table = kv.table
    one = table.ndim == 1 and table.size > 0 and jnp.issubdtype(table.dtype, jnp.integer)
    require(
        one,
        where,
        f"{table.shape=} {table.dtype=}",
        "a sequence's table is int32 [width], of a page at least; batch with jax.vmap or mk.jit(batch=)",
    )
    return (k, v), (table.astype(jnp.int32),)
