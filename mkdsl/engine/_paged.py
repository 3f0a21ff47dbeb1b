"""The pool of pages on the device: how much of it fits, and what decodes and prefills through it where no kernel does.

`mk.Paged` says what a paged cache means. Here it is computed in another way: scanning layers, XLA would copy all pages; so each sequence's own
are gathered, the step runs on those, and only what is new is scattered.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from mkdsl.engine._scheduler import PagesError
from mkdsl.models import DecoderConfig, decode_step
from mkdsl.ops import Paged, contiguous, place, prefill

USABLE = 0.9  # of the free memory: the rest is for logits and what XLA needs beside
GATHERED = 2  # copies of one sequence's cache that exist during prefill
Step = Callable[[Any, Paged, jax.Array, jax.Array], tuple[jax.Array, Paged]]  # (params, kv, tokens, positions) -> (logits, kv), of a batch
PagedFill = Callable[[Any, Paged, jax.Array, jax.Array], Paged]


def empty_pages(config: DecoderConfig, *, count: int, size: int, dtype: DTypeLike = jnp.bfloat16) -> Any:
    """A pool of pages, each of `size` positions of all layers.

    Returns:
      {"k", "v"}, each [layers, count, kv_heads, size, head_dim].
    """
    shape = (config.layers, count, config.kv_heads, size, config.head_dim)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


def pages_that_fit(config: DecoderConfig, *, size: int, context: int, max_batch: int, free: int | None) -> int:
    """How many pages a device may have.

    Args:
      config: the model's shape.
      size: positions in a page.
      context: positions of a sequence at most.
      max_batch: sequences decoded together at most.
      free: bytes on the device, or None where it does not say.

    Returns:
      As many as all sequences need at most; or fewer, where they do not fit beside what prefill gathers.

    Raises:
      PagesError: those that fit do not hold one sequence.
    """
    width = -(-context // size)
    wanted = max_batch * width
    if free is None:
        return wanted
    leaves = jax.tree.leaves(jax.eval_shape(lambda: empty_pages(config, count=1, size=size)))
    page = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    usable = int(USABLE * free)
    fit = min(wanted, usable // page - GATHERED * width)
    if fit < width:
        needed = (1 + GATHERED) * width * page
        raise PagesError(
            f"of {free / 2**30:.1f} GiB of free memory {usable / 2**30:.1f} may be used for the cache, and {needed / 2**30:.1f} are needed for "
            f"{context=}; lower it"
        )
    return fit


@dataclasses.dataclass(frozen=True)  # equal for equal shapes: what is compiled for one engine serves the next
class PlainStep:
    """The decode step of several sequences in plain JAX. At position -1 it appends nothing."""

    config: DecoderConfig

    def __call__(self, params: Any, kv: Paged, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, Paged]:
        own = jax.vmap(lambda table: _gather(kv.pages, table))(kv.table)
        _, logits, own = jax.vmap(decode_step(self.config), (None, 0, 0, 0))(params, own, tokens, positions)
        new = jax.tree.map(lambda leaf: jax.vmap(lambda a, at: a.at[:, :, at].get(mode="clip"))(leaf, positions), own)
        return logits, Paged(_scatter(kv.pages, jax.vmap(functools.partial(_place, kv.pages))(kv.table, positions), new), kv.table)


def paged_fill(config: DecoderConfig) -> PagedFill:
    """Prefill of some sequences at once.

    Args:
      config: the model's shape.

    Returns:
      f(params, kv, tokens [b, n], positions [b, n]) -> kv, with int32 tokens and positions. A sequence's positions go up by one, all of them lie in its
      pages, and those before are written already; one past the table is a pad, which comes last, and writes nothing.
    """

    def fill(params: Any, kv: Paged, tokens: jax.Array, positions: jax.Array) -> Paged:
        own = jax.vmap(functools.partial(_gather, kv.pages), out_axes=1)(kv.table)
        step = prefill(decode_step(config), ascending=True)
        own = jax.vmap(step, (None, 1, 0, 0), (0, 0, 1))(params, own, tokens, positions)[-1]
        return Paged(_put_back(kv.pages, kv.table, own, positions), kv.table)

    return fill


def _put_back(pages: Any, tables: jax.Array, own: Any, positions: jax.Array) -> Any:
    """The pages with those of them replaced that hold the positions: one after another and in place, as XLA's scatter would want their axis first."""
    size, n = pages["k"].shape[3], positions.shape[1]
    most, inside = min(-(-n // size) + 1, tables.shape[1]), positions < tables.shape[1] * size
    first, stop = positions[:, 0] // size, jnp.where(inside, positions // size + 1, 0).max(1)

    def one(i: jax.Array, pages: Any) -> Any:
        row, number = i // most, first[i // most] + i % most
        there = (0, tables[row, number], 0, 0, 0)

        def put(leaf: jax.Array, own: jax.Array) -> jax.Array:
            new = lax.dynamic_slice(own, (0, row, 0, number * size, 0), (own.shape[0], 1, own.shape[2], size, own.shape[4]))
            old = lax.dynamic_slice(leaf, there, new.shape)
            return lax.dynamic_update_slice(leaf, jnp.where(number < stop[row], new, old), there)

        return jax.tree.map(put, pages, own)

    return lax.fori_loop(0, tables.shape[0] * most, one, pages)


def _gather(pages: Any, table: jax.Array) -> Any:
    """One sequence's cache as one, [layers, kv_heads, width * size, head_dim] each."""
    return jax.tree.map(lambda leaf: jax.vmap(contiguous, (0, None))(leaf, table), pages)


def _place(pages: Any, table: jax.Array, position: jax.Array) -> tuple[jax.Array, jax.Array]:
    count, size = pages["k"].shape[1], pages["k"].shape[3]
    return place(table, position, count, size)


def _scatter(pages: Any, at: tuple[jax.Array, jax.Array], new: Any) -> Any:
    """The pages with new rows [n, layers, kv_heads, head_dim] at n places."""
    page, row = at
    return jax.tree.map(lambda leaf, rows: leaf.at[:, page, :, row].set(rows, mode="drop"), pages, new)
