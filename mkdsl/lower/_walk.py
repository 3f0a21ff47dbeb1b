"""The order in which a worker goes through its items. The loader and compute walk it alike, each with its own body, so that the n-th unit that the
loader issues is the n-th that compute folds.

From the outside in: an epilogue's tiles, K stages of the resident, the workers of the cluster, parts, their matrices, their tiles, units.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mkdsl.graph import AttentionPhase, Leaf, Phase
from mkdsl.lower._machine import Machine, i32
from mkdsl.lower._types import Carry, Index, Ref
from mkdsl.schedule import AttentionPlan


class Epilogue(NamedTuple):
    """Items that are finished together: of each of these parts the `number`-th of `count` equal shares of a worker's items."""

    parts: tuple[int, ...]
    number: Index
    count: Index

    def share(self, n: Index) -> tuple[Index, Index]:
        """(first, count) of its share of n items."""
        if isinstance(self.count, int) and self.count == 1:
            return 0, n
        first = lax.div(self.number * n, i32(self.count))
        return first, lax.div((self.number + 1) * n, i32(self.count)) - first

    def items(self, m: Machine, phase: Phase, part: int, peer: Index = None) -> tuple[Index, Index, Index]:
        """(first item of this worker, or of a peer; from where on, and how many, are of this epilogue)."""
        first, n = m.tasks(phase, part, peer)
        return first, *self.share(n)

    @property
    def begins(self) -> Index | None:
        """Whether it is the phase's first; None if it never is."""
        if isinstance(self.number, int):
            return True
        return self.number == 0 if self.parts[0] == 0 else None


def over_epilogues(m: Machine, phase: Phase, body: Callable[[Epilogue, Carry], Carry], carry: Carry) -> Carry:
    """body(epilogue, carry) for all epilogues of a worker: one of all parts, or where some worker has more tiles than are finished together,
    part by part as few as it takes; in a cluster as many for all workers."""
    plan = m.schedule.plan(phase.name)
    if not plan.several_epilogues and plan.kind == "fold":
        return body(Epilogue(tuple(range(len(phase.parts))), 0, 1), carry)
    for part in range(len(phase.parts)):
        count = plan.epilogues(part) if plan.cluster > 1 else _epilogues(m.tasks(phase, part)[1], plan.epilogue_tiles)
        carry = lax.fori_loop(0, count, lambda j, c, part=part, count=count: body(Epilogue((part,), j, count), c), carry)
    return carry


def _epilogues(n: Index, together: int) -> Index:
    return lax.div(n + (together - 1), together)


def over_peers(m: Machine, phase: Phase, body: Callable[[Index, Carry], Carry], carry: Carry) -> Carry:
    """body(peer, carry) for all workers that fold this one's items with it, itself last; once with None if it folds its items alone."""
    cluster = m.schedule.plan(phase.name).cluster
    if cluster == 1:
        return body(None, carry)
    return m.times(cluster, lambda j, carry: body(lax.rem(m.rank + 1 + j, cluster), carry), carry)


# Attention: items, and the blocks of the cache that a worker folds of them.


def kv_item(plan: AttentionPlan, phase: AttentionPhase, item: Index) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(sequence, kv head, split) of an attention item."""
    head = lax.div(item, plan.splits)
    return lax.div(head, phase.kv_heads), lax.rem(head, phase.kv_heads), lax.rem(item, plan.splits)


def kv_share(m: Machine, plan: AttentionPlan, split: Index, peer: Index) -> Index:
    """Which share of an item's cache this worker folds: all of a split, or of one that a peer has to write, what falls to this one."""
    return split if plan.cluster == 1 else split + plan.splits * lax.rem(m.rank - peer + plan.cluster, plan.cluster)


def kv_blocks(m: Machine, plan: AttentionPlan, phase: AttentionPhase, sequence: Index, share: Index) -> tuple[jax.Array, jax.Array]:
    """(first, count) of the cache blocks of a share: first, first + shares, ...; those that hold a position that is attended to."""
    shares, at = plan.splits * plan.cluster, positions(m, phase)
    pos = jnp.minimum(m.address(at.attended, sequence), phase.context)
    end = (
        lax.div(pos + (plan.block - 1), plan.block)
        if at.same
        else lax.div(jnp.clip(pos + 1, 0, phase.context) + (plan.block - 1), plan.block)
    )
    low = 0 if phase.window is None else lax.div(jnp.maximum(pos - (phase.window - 1), 0), plan.block)
    first = low + lax.rem(share - low + shares * (phase.blocks(plan.block) + 1), shares)
    return first, lax.div(jnp.maximum(end - first, 0) + (shares - 1), shares)


class Positions(NamedTuple):
    """Nodes that say up to where a token attends, and where its own key and value are appended."""

    attended: int
    appended: int

    @property
    def same(self) -> bool:
        return self.attended == self.appended


def positions(m: Machine, phase: AttentionPhase) -> Positions:
    attention = m.graph.node(m.graph.code[phase.name].parts[0][0][0])
    return Positions(attention.inputs[3], m.graph.node(attention.inputs[1]).inputs[2])


class Cache(NamedTuple):
    """The leaves of an attention's cache: keys, values, and where it is paged the table."""

    keys: Leaf
    values: Leaf
    table: Leaf | None


def cache_of(m: Machine, phase: AttentionPhase) -> Cache:
    attention = m.graph.node(m.graph.code[phase.name].parts[0][0][0])
    keys, values = (m.graph.node(m.graph.node(append).inputs[0]).op for append in attention.inputs[1:3])
    tables = [m.graph.node(table).op for table in attention.inputs[4:]]
    return Cache(keys, values, tables[0] if tables else None)


class Place(NamedTuple):
    """Where some neighbouring positions of a sequence's cache lie: in a page, or in the cache that is its own; `row` is the first of them.
    `exists`: whether there is such a page; True where there is no question."""

    owner: Index
    row: Index
    exists: Index


def place(m: Machine, phase: AttentionPhase, sequence: Index, position: Index) -> Place:
    """Where a position lies. A page that is not there, or past the table, is read as another one: nothing there is attended to."""
    cache = cache_of(m, phase)
    if cache.table is None or phase.page is None:
        return Place(sequence, position, True)
    inside = jnp.clip(position, 0, phase.context - 1)
    page, count = m.refs[f"cache{cache.table.index}"][sequence, lax.div(inside, phase.page)], m.refs[f"cache{cache.keys.index}"].shape[1]
    return Place(jnp.clip(page, 0, count - 1), lax.rem(inside, phase.page), (page >= 0) & (page < count))


def cache_at(m: Machine, cache: Leaf, iteration: Index, head: Index, at: Place, rows: int | None = None) -> tuple[Ref, tuple[Index, ...]]:
    """The reference and the index into it of one position of a kv head, or of so many rows: a cache is [batch, layers, kv_heads, context, head_dim],
    pages are [layers, pages, kv_heads, size, head_dim]."""
    layer, row = m.layer(cache, iteration), at.row if rows is None else pl.ds(at.row, rows)
    first = (layer, at.owner) if at.exists is not True else (at.owner, layer)
    return m.refs[f"cache{cache.index}"], (*first, head, row, slice(None))


def total(counts: list[Index]) -> Index:
    return functools.reduce(jnp.add, counts)
