"""A decode step over a paged cache, in plain jnp: its pages are gathered, the step is vmapped, and the new row is scattered.

This is what a paged cache means, and runs everywhere. Of the pages nothing else knows how they lie in memory.
"""

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
PagedStep = Callable[[Any, Any, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
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


def paged_step(config: DecoderConfig) -> PagedStep:
    """The decode step of several sequences.

    Args:
      config: the model's shape.

    Returns:
      f(params, pages, tables [b, width], tokens [b], positions [b]) -> (logits [b, vocab] float32, pages), all int32. Row i of tables says
      in which page each size positions of sequence i lie. A position past the table writes nothing, and its logits are meaningless.
    """

    def step(params: Any, pages: Any, tables: jax.Array, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, Any]:
        kv = jax.vmap(_gather, (None, 0, 0))(pages, tables, positions)
        _, logits, kv = jax.vmap(decode_step(config), (None, 0, 0, 0))(params, kv, tokens, positions)
        rows = jax.vmap(lambda leaf, at: leaf.at[:, :, at].get(mode="clip"), (0, 0))
        new = jax.tree.map(lambda leaf: rows(leaf, positions), kv)
        at = jax.vmap(_place, (None, 0, 0))(pages, tables, positions)
        return logits, _scatter(pages, at, new)

    return step


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
