"""A KV cache in pages: where a position lies is data, a table of each sequence's own.

Sequences share the pages, and pages the memory of those that have ended. Whoever attends through a table sees its own sequence alone.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Paged:
    """A cache whose positions lie in pages; stands where a cache's arrays do, in a decode step's kv.

    Positions i * size to (i + 1) * size - 1 of a sequence lie in page table[i]. An entry that is no page's number is a page that is not there: what is
    appended there is lost. Several sequences may have one page as long as none of them appends to it. What a page holds at positions that
    are not attended to does not matter, but must be numbers: in a kernel nothing times NaN is NaN.

    Under `jax.vmap` over sequences, and in `mk.jit(batch=)`, tables have a batch axis and pages have none: see `batch_axes`.

    Attributes:
      pages: a pytree of two arrays, keys and values, each [layers, pages, kv_heads, size, head_dim]; in a layer, without the first axis.
      table: int32 [width]; the context is width * size positions.
    """

    pages: Any
    table: Any


jax.export.register_pytree_node_serialization(
    Paged, serialized_name="mkdsl.ops.Paged", serialize_auxdata=lambda _: b"", deserialize_auxdata=lambda _: ()
)


def is_paged(x: Any) -> bool:
    return isinstance(x, Paged)


def batch_axes(kv: Any) -> Any:
    """The axes of a cache that is decoded in a batch, as `jax.vmap` takes them: 0 for arrays and tables, None for pages, which all sequences share.

    Args:
      kv: a cache, a pytree of arrays and `Paged`.

    Returns:
      The same tree of numbers and None.
    """

    def axes(node: Any) -> Any:
        return Paged(jax.tree.map(lambda _: None, node.pages), 0) if is_paged(node) else 0

    return jax.tree.map(axes, kv, is_leaf=is_paged)


def shared_leaves(kv: Any) -> list[bool]:
    """Of each leaf of a cache, whether all sequences share it."""
    return [axis is None for axis in jax.tree.leaves(batch_axes(kv), is_leaf=lambda x: x is None)]


def without_tables(kv: Any) -> Any:
    """The cache without what all layers have in common."""
    return jax.tree.map(lambda node: dataclasses.replace(node, table=None) if is_paged(node) else node, kv, is_leaf=is_paged)


def with_tables_of(whole: Any) -> Callable[[Any], Any]:
    """What puts the tables back that `without_tables` has taken out of a cache."""
    tables = [node.table for node in jax.tree.leaves(whole, is_leaf=is_paged) if is_paged(node)]

    def put_back(kv: Any) -> Any:
        remaining = iter(tables)
        return jax.tree.map(lambda node: dataclasses.replace(node, table=next(remaining)) if is_paged(node) else node, kv, is_leaf=is_paged)

    return put_back


def place(table: jax.Array, pos: jax.Array, count: int, size: int) -> tuple[jax.Array, jax.Array]:
    """(page, row in it) of a position; page `count`, which is none, where there is nothing.

    Args:
      table: int32 [width].
      pos: int32 scalar.
      count: pages in all.
      size: positions in each.
    """
    page = table.at[jnp.maximum(pos, 0) // size].get(mode="fill", fill_value=count)
    return jnp.where((pos >= 0) & (page >= 0) & (page < count), page, count), pos % size


def contiguous(pages: jax.Array, table: jax.Array) -> jax.Array:
    """One layer's pages [count, kv_heads, size, head_dim] as a sequence has them, [kv_heads, width * size, head_dim]."""
    own = jnp.moveaxis(pages[jnp.clip(table, 0, pages.shape[0] - 1)], 0, 1)
    return own.reshape(own.shape[0], -1, own.shape[-1])
