"""Decode steps over a paged cache: the pages of some sequences are gathered once, steps append to what was gathered, and the new rows are scattered.

Of the pages nothing else knows how they lie in memory.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mkdsl.engine._scheduler import PagesError
from mkdsl.models import DecoderConfig, decode_step
from mkdsl.ops import prefill

USABLE = 0.9  # of the free memory: the rest is for logits and what XLA needs beside
GATHERED = 2  # copies of a batch's cache that exist during a step
Step = Callable[[Any, Any, jax.Array, jax.Array], tuple[jax.Array, Any]]  # (params, kv, tokens, positions) -> (logits, kv), all [b, ..]
PagedFill = Callable[[Any, Any, jax.Array, jax.Array, jax.Array], Any]


def empty_pages(config: DecoderConfig, *, count: int, size: int, dtype: DTypeLike = jnp.bfloat16) -> Any:
    """A pool of pages, each of `size` positions of all layers.

    Returns:
      {"k", "v"}, each [count, layers, kv_heads, size, head_dim].
    """
    shape = (count, config.layers, config.kv_heads, size, config.head_dim)
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
      As many as all sequences need at most; or fewer, where they do not fit beside what is gathered of them.

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
    fit = min(wanted, usable // page - GATHERED * wanted)
    if fit < width:
        needed = (width + GATHERED * wanted) * page
        raise PagesError(
            f"of {free / 2**30:.1f} GiB of free memory {usable / 2**30:.1f} may be used for the cache, and {needed / 2**30:.1f} are needed for "
            f"{context=} with {max_batch=}; lower one of the two"
        )
    return fit


@dataclasses.dataclass(frozen=True)
class BatchedStep:
    """The decode step of several sequences as plain JAX means it."""

    config: DecoderConfig

    def __call__(self, params: Any, kv: Any, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, Any]:
        _, logits, kv = jax.vmap(decode_step(self.config), (None, 0, 0, 0))(params, kv, tokens, positions)
        return logits, kv


def gathered(pages: Any, tables: jax.Array, positions: jax.Array) -> Any:
    """What some sequences have before their positions, as a decode step knows it.

    Args:
      pages: the pool.
      tables: int32 [b, width]: in which page each `size` positions of a sequence lie.
      positions: int32 [b], where each goes on.

    Returns:
      {"k", "v"}, each [b, layers, kv_heads, width * size, head_dim], with zeros from the positions on.
    """
    return jax.vmap(_gather, (None, 0, 0))(pages, tables, positions)


def written_back(pages: Any, tables: jax.Array, kv: Any, first: jax.Array, counts: jax.Array, *, most: int) -> Any:
    """The pool with what decode steps have appended to gathered caches.

    Args:
      pages, tables, kv: as above.
      first: int32 [b], the first new position of each sequence.
      counts: int32 [b], how many are new, at most `most`.
    """
    steps = jnp.arange(most)
    positions = jnp.where(steps < counts[:, None], first[:, None] + steps, capacity(pages, tables))  # [b, most]
    rows = jax.vmap(lambda leaf, at: jnp.moveaxis(leaf.at[:, :, at].get(mode="clip"), 2, 0))
    new = jax.tree.map(lambda leaf: rows(leaf, positions).reshape(-1, *leaf.shape[1:3], leaf.shape[-1]), kv)
    page, row = jax.vmap(jax.vmap(_place, (None, None, 0)), (None, 0, 0))(pages, tables, positions)
    return _scatter(pages, (page.reshape(-1), row.reshape(-1)), new)


def capacity(pages: Any, tables: jax.Array) -> int:
    """Positions that a table has."""
    return tables.shape[-1] * pages["k"].shape[3]


def paged_fill(config: DecoderConfig) -> PagedFill:
    """Prefill of one sequence.

    Args:
      config: the model's shape.

    Returns:
      f(params, pages, table [width], tokens [n], positions [n]) -> pages, all int32. Positions before these are written already; one past the
      table is a pad, and writes nothing.
    """

    def fill(params: Any, pages: Any, table: jax.Array, tokens: jax.Array, positions: jax.Array) -> Any:
        kv = prefill(decode_step(config))(params, _gather(pages, table, positions[0]), tokens, positions)[-1]
        new = jax.tree.map(lambda leaf: jnp.moveaxis(leaf.at[:, :, positions].get(mode="clip"), 2, 0), kv)
        at = jax.vmap(_place, (None, None, 0))(pages, table, positions)
        return _scatter(pages, at, new)

    return fill


def _gather(pages: Any, table: jax.Array, position: jax.Array) -> Any:
    """One sequence's cache as a decode step knows it, [layers, kv_heads, width * size, head_dim] each.

    What lies at the position and after is another sequence's of long ago. It weighs nothing, but nothing times NaN is NaN: hence the zeros.
    """

    def one(leaf: jax.Array) -> jax.Array:
        own = jnp.moveaxis(leaf[table], 0, 2)
        own = own.reshape(*own.shape[:2], -1, own.shape[-1])
        return jnp.where(jnp.arange(own.shape[2])[:, None] < position, own, 0)

    return jax.tree.map(one, pages)


def _place(pages: Any, table: jax.Array, position: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The page and the row in it of a position; a page that there is not for one past the table."""
    count, size = pages["k"].shape[0], pages["k"].shape[3]
    return table.at[position // size].get(mode="fill", fill_value=count), position % size


def _scatter(pages: Any, at: tuple[jax.Array, jax.Array], new: Any) -> Any:
    """The pages with new rows [n, layers, kv_heads, head_dim] at n places."""
    page, row = at
    return jax.tree.map(lambda leaf, rows: leaf.at[page, :, :, row].set(rows, mode="drop"), pages, new)
