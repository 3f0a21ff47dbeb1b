"""One item of an attention: it folds one split of one (sequence, kv head)'s cache past the kv head's queries.

The new token's own key and value come from registers as the first carry of share 0, so no item waits for the cache to be written; the
share whose turn it is for the block of `pos` appends them. A share is a split, or one worker's part of it in a cluster, whose workers send
what they have folded of each other's items to those who write them.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mkdsl.graph import AttentionPhase
from mkdsl.lower import _exchange
from mkdsl.lower._events import wait
from mkdsl.lower._machine import Machine, Request, bf16, f32, spread, zeros
from mkdsl.lower._ring import await_unit, free_stage, slot_of
from mkdsl.lower._types import Carry, Index, Layout
from mkdsl.lower._walk import cache_at, cache_of, kv_blocks, place, positions
from mkdsl.lower.evaluate._evaluator import fetch
from mkdsl.lower.evaluate._frames import iota
from mkdsl.lower.evaluate._heads import Halves, Heads, head_leaves
from mkdsl.lower.mosaic._layouts import ACC, LHS, RHS, grid
from mkdsl.lower.mosaic._stores import store_vectors
from mkdsl.schedule import SHARING, AttentionPlan

MASKED = -1e30
TINY = 1e-30  # keeps an empty split's division finite


@dataclasses.dataclass
class Item:
    """One attention item being emitted."""

    m: Machine
    phase: AttentionPhase
    plan: AttentionPlan
    iteration: Index
    sequence: Index
    head: Index
    split: Index
    share: Index

    @property
    def columns(self) -> int:
        return query_columns(self.phase)

    @property
    def chunks(self) -> tuple[tuple[int, int], ...]:
        """(first feature, how many) of what the tensor cores compute together: 64 rows at a time, of which the last ones overlap those before
        and compute the same values twice."""
        d = self.phase.head_dim
        return ((0, d - d % 64), (d - 64, 64)) if d % 64 else ((0, d),)

    @property
    def op(self) -> Any:
        return self.m.graph.node(self.m.graph.code[self.phase.name].parts[0][0][0]).op

    def ref(self, name: str) -> Any:
        return self.m.refs[f"{name}.{self.phase.name}"]

    def prepare(self) -> jax.Array:
        """Queries, the token's own key and value to shared memory; returns the own scores [columns]."""
        q, k, v = self._inputs()
        half = self.phase.head_dim // 2
        for h in range(2):
            columns = pl.ds(h * half, half)
            self.ref("q")[pl.ds(0, self.phase.queries), columns] = q[h].astype(bf16)
            for row, new in enumerate((k, v)):
                self.ref("new")[pl.ds(row, 1), columns] = new[h].astype(bf16)
        return self._own_scores(q, k)

    def _inputs(self) -> tuple[Halves, Halves, Halves]:
        inputs = self.m.graph.code[self.phase.name].parts[0][1]
        first, count = self.head * self.phase.queries, self.phase.queries
        queries = Heads(self.m, self.phase, self.iteration, sequence=self.sequence, first=first, count=count)
        own = Heads(self.m, self.phase, self.iteration, sequence=self.sequence, first=self.head)
        wanted = [(queries, head_leaves(self.m, inputs[:1])), (own, head_leaves(self.m, inputs[1:]))]
        queries.prepare(inputs[:1])
        own.prepare(inputs[1:])
        wait(self.m, self.phase, self.iteration)  # again for a second item, which then costs one look
        self.m.stamp(self.phase, self.iteration, "known")
        fetch(wanted)
        return queries.evaluate(inputs[0]), own.evaluate(inputs[1]), own.evaluate(inputs[2])

    def _own_scores(self, q: Halves, k: Halves) -> jax.Array:
        shape = (self.phase.queries, self.phase.head_dim // 2)
        layout = grid(*shape)
        half = shape[1]
        keys = [self.m.load(Request(self.ref("new"), (0,), None, (pl.ds(h * half, half),), layout.reduce(0))) for h in range(2)]
        products = [a.astype(bf16).astype(f32) * spread(b.astype(f32), shape, 1, layout) for a, b in zip(q, keys, strict=True)]
        self._store_scores(jnp.sum(products[0] + products[1], axis=1), layout)
        return self.m.load(Request(self.ref("score"), (), None, (pl.ds(0, self.columns),), ACC.reduce(0)))

    def _store_scores(self, scores: jax.Array, layout: Layout) -> None:
        """Of each query, a row of `layout`."""
        if self.m.interpret:
            self.ref("score")[pl.ds(0, self.phase.queries)] = scores
        else:
            store_vectors([scores], self.ref("score"), [(0,)], layout=layout.reduce(1))

    def first_carry(self, scores: jax.Array) -> tuple[jax.Array, ...]:
        """(m, z, sums of each of the chunks) of share 0: the own token alone; of others: nothing. Past the cache everything becomes NaN."""
        mine = ((self.share == 0) & self._attends_itself()).astype(f32)
        attended = self.m.address(positions(self.m, self.phase).attended, self.sequence)
        inside = jnp.where((attended >= 0) & (attended < self.phase.context), 0.0, jnp.nan).astype(f32)
        own = self.op.score(scores) * mine + (MASKED * (1.0 - mine) + inside)
        z = (own - own) + mine  # the own score's exp(s - s): 1, or NaN
        values = ((size, self._new(1, first, size)) for first, size in self.chunks)
        return own, z, *(spread(value.astype(f32) * mine, (size, self.columns), 0, ACC) for size, value in values)

    def _new(self, row: int, first: int, size: int) -> jax.Array:
        """Some features of the token's own key (0) or value (1)."""
        return self.m.load(Request(self.ref("new"), (row,), None, (pl.ds(first, size),), ACC.reduce(1)))

    def _attends_itself(self) -> Index:
        """Whether the token attends to its own key: always, unless it is appended elsewhere than where it attends up to."""
        at = positions(self.m, self.phase)
        if at.same:
            return True
        own, attended = (self.m.address(id, self.sequence) for id in (at.appended, at.attended))
        seen = (own >= 0) & (own <= attended)
        return seen if self.phase.window is None else seen & (own > attended - self.phase.window)

    def _keep(self, at: jax.Array) -> jax.Array:
        """Which of these positions of the cache count. Where the token's own is appended lies what was there before, if not half of it."""
        nodes, window = positions(self.m, self.phase), self.phase.window
        attended = self.m.address(nodes.attended, self.sequence)
        keep = at < attended if nodes.same else (at <= attended) & (at != self.m.address(nodes.appended, self.sequence))
        return keep if window is None else keep & (at > attended - window)

    def fold_block(self, j: Index, carry: Carry) -> Any:
        """A block of keys and the same positions' values, a unit each: scores, online softmax, weighted values."""
        m_old, z, *sums, i = carry
        m, plan = self.m, self.plan
        first, _ = kv_blocks(m, plan, self.phase, self.sequence, self.share)
        keys, values = slot_of(m, i), slot_of(m, i + 1)
        queries = self._queries()
        await_unit(m, keys)
        scores = self._scores(keys, queries, (first + j * (plan.splits * plan.cluster)) * plan.block, plan.block)
        free_stage(m, keys)
        m_new = m_old
        for s in scores:
            m_new = jnp.maximum(m_new, jnp.max(s, axis=0))
        old = jnp.exp(m_old - m_new)
        z, sums = z * old, [acc * spread(old, acc.shape, 1, ACC) for acc in sums]
        for b, s in enumerate(scores):
            p = jnp.exp(s - spread(m_new, (64, self.columns), 1, ACC))
            z = z + jnp.sum(p, axis=0)
            self.ref("p")[pl.ds(64 * b, 64), :] = p.astype(bf16)
        await_unit(m, values)
        for b in range(len(scores)):
            p = self._probabilities(b)
            sums = [m.mma(acc, self._values(values, 64 * b, *chunk), p) for acc, chunk in zip(sums, self.chunks, strict=True)]
        free_stage(m, values)
        return m_new, z, *sums, i + 2

    def _queries(self) -> jax.Array:
        q = self.ref("q")
        return q[...].T if self.m.interpret else plgpu.load(q.transpose((1, 0)), layout=RHS, optimized=False)

    def _scores(self, slot: Index, queries: jax.Array, start: Index, block: int) -> list[jax.Array]:
        """[64 positions, columns] each, masked by position."""
        out = []
        for b in range(block // 64):
            keys = self._keys(slot, 64 * b)
            s = self.op.score(self.m.mma(zeros((64, self.columns), ACC), keys, queries))
            at = iota(self.m, (64, self.columns), 0, ACC) + (start + 64 * b)
            out.append(jnp.where(self._keep(at), s, MASKED))
        return out

    def _keys(self, slot: Index, row: int) -> jax.Array:
        """Keys of 64 positions, [64, head_dim]."""
        view = self.m.refs[f"stage.{self.phase.name}"]
        return view[slot][row : row + 64] if self.m.interpret else plgpu.load(view.at[slot, pl.ds(row, 64)], layout=LHS)

    def _values(self, slot: Index, row: int, first: int, size: int) -> jax.Array:
        """Some features of the values of 64 positions, [size, 64]."""
        view = self.m.refs[f"stage.{self.phase.name}"]
        if self.m.interpret:
            return view[slot][row : row + 64, first : first + size].T
        block = view.at[slot, pl.ds(row, 64)] if size == self.phase.head_dim else view.at[slot, pl.ds(row, 64), pl.ds(first, size)]
        return plgpu.load(block.transpose((1, 0)), layout=LHS)

    def _probabilities(self, b: int) -> jax.Array:
        p = self.ref("p").at[pl.ds(64 * b, 64), :]
        return p[...] if self.m.interpret else plgpu.load(p, layout=RHS, optimized=False)

    def append(self) -> None:
        """Writes the token's key and value to the cache, if it is this share's turn and there is room."""
        m, plan = self.m, self.plan
        pos = m.address(positions(m, self.phase).appended, self.sequence)
        turn = lax.rem(lax.div(pos, plan.block), plan.splits * plan.cluster) == self.share

        here = place(m, self.phase, self.sequence, pos)

        @pl.when(turn & (pos >= 0) & (pos < self.phase.context) & here.exists)
        def _() -> None:
            for row, cache in enumerate(cache_of(m, self.phase)[:2]):
                there, (*at, _) = cache_at(m, cache, self.iteration, self.head, here)
                for first, size in self.chunks:
                    there[(*at, pl.ds(first, size))] = self._new(row, first, size)

    def keep(self, m_: jax.Array, z: jax.Array, sums: Sequence[jax.Array]) -> None:
        """The normalised result [head_dim, columns] and its log-sum-exps to shared memory."""
        z = jnp.maximum(z, TINY)
        for (first, size), acc in zip(self.chunks, sums, strict=True):
            self.ref("out")[pl.ds(first, size), :] = acc * spread(1.0 / z, acc.shape, 1, ACC)  # divisions are slow
        self.ref("score")[...] = m_ + jnp.log(z)

    def send(self, number: jax.Array, peer: jax.Array) -> None:
        """What was kept, to the worker that writes this item."""
        there = self.ref("received").at[_exchange.buffer(self.m, self.phase, number, self.m.rank)]
        size = self.phase.head_dim * self.columns
        _exchange.send_array(self.m, self.ref("out").reshape(-1), there.at[pl.ds(0, size)], number, peer)
        _exchange.send_array(self.m, self.ref("score"), there.at[pl.ds(size, self.columns)], number, peer)

    def kept(self) -> jax.Array:
        """The result of each head [group, head_dim]."""
        if self.m.interpret:
            return self.ref("out")[...].T[: self.phase.queries]
        out = self.ref("out").at[:, pl.ds(0, self.phase.queries)].transpose((1, 0))
        return plgpu.load(out, layout=grid(self.phase.queries, self.phase.head_dim), optimized=False)

    def merged(self, sets: Sequence[Any]) -> jax.Array:
        """The same of what all of the cluster have sent; their common log-sum-exps are kept."""
        layout, heads = grid(self.phase.queries, self.phase.head_dim), pl.ds(0, self.phase.queries)
        lse = [self._received(s, (self.phase.head_dim, heads), layout.reduce(1)) for s in sets]
        top = functools.reduce(jnp.maximum, lse)
        weights = [jnp.exp(e - top) for e in lse]
        total = functools.reduce(jnp.add, weights)
        self._store_scores(top + jnp.log(total), layout)
        values = [self._received(s, (pl.ds(0, self.phase.head_dim), heads), layout, transposed=True) for s in sets]
        shape = self.phase.queries, self.phase.head_dim
        return functools.reduce(jnp.add, [v * spread(w / total, shape, 0, layout) for v, w in zip(values, weights, strict=True)])

    def _received(self, which: Index, index: tuple[Any, ...], layout: Layout, *, transposed: bool = False) -> jax.Array:
        view = self.phase.head_dim + 1, self.columns
        return self.m.load(Request(self.ref("received"), (which,), view, index, layout, transposed))

    def hand_over(self, out: jax.Array) -> None:
        """Writes the heads' result, and the log-sum-exps that were kept where splits are to be merged."""
        name, shape = self.phase.writes[0], (self.phase.queries, self.phase.head_dim)
        heads, layout = pl.ds(self.head * self.phase.queries, self.phase.queries), grid(*shape)

        def rows(inc: Index) -> Request:
            return Request(self.m.refs[name], (inc, self.split, self.sequence), None, (heads, pl.ds(0, self.phase.head_dim)), layout)

        self.m.hand_over(name, self.phase, self.iteration, rows, out.astype(self.m.schedule.tensor(name).dtype))
        if self.m.schedule.tensor(name).splits > 1:
            self._hand_over_lse(name, heads)

    def _hand_over_lse(self, name: str, heads: Index) -> None:
        shape = self.phase.queries, self.phase.head_dim // SHARING
        layout = grid(*shape)
        value = self.m.load(Request(self.ref("score"), (), None, (pl.ds(0, self.phase.queries),), layout.reduce(1)))

        def rows(inc: Index) -> Request:
            view, index = (self.m.graph.tensors[name].heads, shape[1]), (heads, pl.ds(0, shape[1]))
            return Request(self.m.refs[f"{name}.lse"], (inc, self.split, self.sequence), view, index, layout)

        self.m.hand_over(name, self.phase, self.iteration, rows, spread(value, shape, 0, layout))


def carry_words(phase: AttentionPhase) -> int:
    """Words of what one worker sends of one item."""
    return (phase.head_dim + 1) * query_columns(phase)


def query_columns(phase: AttentionPhase) -> int:
    """Queries of a kv head as mma columns."""
    return -(-phase.queries // 8) * 8
