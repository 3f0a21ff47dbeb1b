"""The two ends of a decode step: a token's embedding, and the best token."""

import dataclasses

import jax
import jax.numpy as jnp

from mkdsl.ops._operator import Operator, require


@dataclasses.dataclass(frozen=True)
class Embed(Operator):
    def reference(self, table: jax.Array, index: jax.Array) -> tuple[jax.Array, ...]:
        return (table[jnp.clip(index, 0, table.shape[0] - 1)].astype(jnp.float32),)


def embed(table: jax.Array, index: jax.Array) -> jax.Array:
    """Row `index` of table [rows, features] as float32: a token's embedding, or a learned position's. An index outside is clamped to the table.

    Raises:
      ValueError: the table is not a matrix or the index no integer scalar.
    """
    index = jnp.asarray(index)
    require(table.ndim == 2, "embed", f"{table.shape=}", "a table is [rows, features]")
    one = index.ndim == 0 and jnp.issubdtype(index.dtype, jnp.integer)
    require(one, "embed", f"{index.shape=} {index.dtype=}", "pass one integer; batch with jax.vmap or mk.jit(batch=)")
    return Embed().bind(table, index.astype(jnp.int32))[0]


@dataclasses.dataclass(frozen=True)
class Argmax(Operator):
    def reference(self, x: jax.Array) -> tuple[jax.Array, ...]:
        return (jnp.argmax(x).astype(jnp.int32),)


def argmax(x: jax.Array) -> jax.Array:
    """The index of the largest of x [features], int32; the lowest where several are equal."""
    require(x.ndim == 1, "argmax", f"{x.shape=}", "pass [features]")
    return Argmax().bind(x)[0]
