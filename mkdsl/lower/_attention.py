"""The compute side of attention: an item folds one split of one (sequence, kv head)'s cache past the queries of its group.

The new token's own key and value come from registers as the first carry of split 0, so no item waits for the cache to be written; the
split whose turn it is for the block of `pos` appends them.
"""

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mkdsl.graph import Phase
from mkdsl.lower._frames import fetch, iota
from mkdsl.lower._heads import Halves, Heads, head_leaves
from mkdsl.lower._layouts import ACC, LHS, RHS, grid
from mkdsl.lower._loader import COMPUTE, kv_blocks, kv_item
from mkdsl.lower._machine import Machine, Request, bf16, f32, spread, zeros
from mkdsl.search import SHARING

MASKED = -1e30
TINY = 1e-30  # keeps an empty split's division finite


@dataclasses.dataclass
class Item:
    """One attention item being emitted."""

    m: Machine
    phase: Phase
    l: Any
    sequence: Any
    head: Any
    split: Any

    @property
    def group(self) -> int:
        return self.phase.heads // self.phase.kv_heads

    @property
    def columns(self) -> int:
        """Queries as mma columns."""
        return -(-self.group // 8) * 8

    @property
    def shape(self) -> tuple[int, int]:
        return self.phase.head_dim, self.columns

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
            self.ref("q")[pl.ds(0, self.group), columns] = q[h].astype(bf16)
            for row, new in enumerate((k, v)):
                self.ref("own")[pl.ds(row, 1), columns] = new[h].astype(bf16)
        return self._own_scores(q, k)

    def _inputs(self) -> tuple[Halves, Halves, Halves]:
        inputs = self.m.graph.code[self.phase.name].parts[0][1]
        queries = Heads(self.m, self.phase, self.l, self.sequence, self.head * self.group, self.group)
        own = Heads(self.m, self.phase, self.l, self.sequence, self.head, 1)
        wanted = [(queries, head_leaves(self.m, inputs[:1])), (own, head_leaves(self.m, inputs[1:]))]
        queries.prepare(inputs[:1])
        own.prepare(inputs[1:])
        plan = self.m.schedule.plan(self.phase.name)
        self.m.wait(self.phase, plan, self.l)  # again for a second item, which then costs one look
        self.m.stamp(self.phase, self.l, "known")
        fetch(wanted)
        return queries.evaluate(inputs[0]), own.evaluate(inputs[1]), own.evaluate(inputs[2])

    def _own_scores(self, q: Halves, k: Halves) -> jax.Array:
        shape = (self.group, self.phase.head_dim // 2)
        layout = grid(*shape)
        half = shape[1]
        keys = [self.m.load(Request(self.ref("own"), (0,), None, (pl.ds(h * half, half),), layout.reduce(0))) for h in range(2)]
        products = [a.astype(bf16).astype(f32) * spread(b.astype(f32), shape, 1, layout) for a, b in zip(q, keys, strict=True)]
        self.ref("score")[pl.ds(0, self.group)] = jnp.sum(products[0] + products[1], axis=1)
        return self.m.load(Request(self.ref("score"), (), None, (pl.ds(0, self.columns),), ACC.reduce(0)))

    def first_carry(self, scores: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(m, z, acc) of split 0: the own token alone; of other splits: nothing. Past the cache everything becomes NaN."""
        mine = (self.split == 0).astype(f32)
        inside = jnp.where(self.m.refs["pos"][self.sequence] < self.phase.k, 0.0, jnp.nan).astype(f32)
        own = self.op.score(scores) * mine + (MASKED * (1.0 - mine) + inside)
        value = self.m.load(Request(self.ref("own"), (1,), None, (pl.ds(0, self.phase.head_dim),), ACC.reduce(1))).astype(f32)
        z = plgpu.layout_cast(jnp.full((self.columns,), 1.0, f32), ACC.reduce(0)) * mine
        return own, z, spread(value * mine, self.shape, 0, ACC)

    def fold_block(self, j: Any, carry: Any) -> Any:
        """A block of keys and the same positions' values, a unit each: scores, online softmax, weighted values."""
        m_old, z, acc, i = carry
        plan, stages = self.m.schedule.plan(self.phase.name), self.m.schedule.stages
        first, _ = kv_blocks(self.m, self.phase, self.sequence, self.split)
        keys, values = lax.rem(i, stages), lax.rem(i + 1, stages)
        queries = self._queries()
        plgpu.barrier_wait(self.m.refs["full"].at[keys])
        scores = self._scores(keys, queries, (first + j * plan.splits) * plan.chunk, plan.chunk)
        self.m.free_stage(keys)
        m_new = m_old
        for s in scores:
            m_new = jnp.maximum(m_new, jnp.max(s, axis=0))
        old = jnp.exp(m_old - m_new)
        z, acc = z * old, acc * spread(old, self.shape, 1, ACC)
        for b, s in enumerate(scores):
            p = jnp.exp(s - spread(m_new, (64, self.columns), 1, ACC))
            z = z + jnp.sum(p, axis=0)
            self.ref("p")[pl.ds(64 * b, 64), :] = p.astype(bf16)
        plgpu.barrier_wait(self.m.refs["full"].at[values])
        for b in range(len(scores)):
            acc = self.m.mma(acc, self._stage(values, 64 * b, transpose=True), self._probabilities(b))
        self.m.free_stage(values)
        return m_new, z, acc, i + 2

    def _queries(self) -> jax.Array:
        q = self.ref("q")
        return q[...].T if self.m.interpret else plgpu.load(q.transpose((1, 0)), layout=RHS, optimized=False)

    def _scores(self, slot: Any, queries: jax.Array, start: Any, chunk: int) -> list[jax.Array]:
        """[64 positions, columns] each, masked by position."""
        pos = self.m.refs["pos"][self.sequence]
        out = []
        for b in range(chunk // 64):
            keys = self._stage(slot, 64 * b, transpose=False)
            s = self.op.score(self.m.mma(zeros((64, self.columns), ACC), keys, queries))
            at = iota(self.m, (64, self.columns), 0, ACC) + (start + 64 * b)
            keep = at < pos if self.phase.window is None else (at < pos) & (at > pos - self.phase.window)
            out.append(jnp.where(keep, s, MASKED))
        return out

    def _stage(self, slot: Any, row: int, *, transpose: bool) -> jax.Array:
        view = self.m.refs[f"stage.{self.phase.name}"]
        if self.m.interpret:
            block = view[slot][row : row + 64]
            return block.T if transpose else block
        block = view.at[slot, pl.ds(row, 64)]
        return plgpu.load(block.transpose((1, 0)) if transpose else block, layout=LHS)

    def _probabilities(self, b: int) -> jax.Array:
        p = self.ref("p").at[pl.ds(64 * b, 64), :]
        return p[...] if self.m.interpret else plgpu.load(p, layout=RHS, optimized=False)

    def append(self) -> None:
        """Writes the token's key and value to the cache, if it is this split's turn and there is room."""
        plan = self.m.schedule.plan(self.phase.name)
        pos = self.m.refs["pos"][self.sequence]
        turn = lax.rem(lax.div(pos, plan.chunk), plan.splits) == self.split

        @pl.when(turn & (pos < self.phase.k))
        def _() -> None:
            node = self.m.graph.node(self.m.graph.code[self.phase.name].parts[0][0][0])
            for row, cache in enumerate(node.inputs[1:3]):
                leaf = self.m.graph.node(self.m.graph.node(cache).inputs[0]).op
                new = self.m.load(Request(self.ref("own"), (row,), None, (pl.ds(0, self.phase.head_dim),), ACC.reduce(1)))
                self.m.refs[f"cache{leaf.index}"][self.sequence, self.m.layer(leaf, self.l), self.head, pos, :] = new

    def hand_over(self, m_: jax.Array, z: jax.Array, acc: jax.Array) -> None:
        """The normalised result, and its log-sum-exp where splits are to be merged."""
        name = self.phase.writes[0]
        z = jnp.maximum(z, TINY)
        self.ref("out")[...] = acc * spread(1.0 / z, self.shape, 1, ACC)  # divisions are slow
        shape = (self.group, self.phase.head_dim)
        layout = grid(*shape)
        heads = pl.ds(self.head * self.group, self.group)
        if self.m.interpret:
            out = self.ref("out")[...].T[: self.group]
        else:
            out = plgpu.load(self.ref("out").at[:, pl.ds(0, self.group)].transpose((1, 0)), layout=layout, optimized=False)
        clears = self.m.home(name) == self.phase.segment

        def rows(inc: Any) -> Request:
            return Request(self.m.refs[name], (inc, self.split, self.sequence), None, (heads, pl.ds(0, self.phase.head_dim)), layout)

        self.m.hand_over(name, self.l, rows, out.astype(self.m.schedule.tensor(name).dtype), clears=clears)
        if self.m.schedule.tensor(name).splits > 1:
            self._hand_over_lse(name, m_ + jnp.log(z), heads, clears)

    def _hand_over_lse(self, name: str, lse: jax.Array, heads: Any, clears: bool) -> None:
        shape = self.group, self.phase.head_dim // SHARING
        layout = grid(*shape)
        self.ref("score")[...] = lse
        value = self.m.load(Request(self.ref("score"), (), None, (pl.ds(0, self.group),), layout.reduce(1)))

        def rows(inc: Any) -> Request:
            view, index = (self.phase.heads, shape[1]), (heads, pl.ds(0, shape[1]))
            return Request(self.m.refs[f"{name}.lse"], (inc, self.split, self.sequence), view, index, layout)

        self.m.hand_over(name, self.l, rows, spread(value, shape, 0, layout), clears=clears)


def attention_phase(m: Machine, phase: Phase, l: Any, i: Any) -> Any:
    """One execution of attention by a worker that has items of it; i counts ring units."""
    first, n = m.tasks(phase, 0, COMPUTE)

    def one(t: Any, i: Any) -> Any:
        item = Item(m, phase, l, *kv_item(m, phase, first + t))
        carry = item.first_carry(item.prepare())
        m.stamp(phase, l, "read")
        _, blocks = kv_blocks(m, phase, item.sequence, item.split)
        m_, z, acc, i = lax.fori_loop(0, blocks, item.fold_block, (*carry, i))
        m.stamp(phase, l, "folded")
        item.append()
        item.hand_over(m_, z, acc)
        return i

    return lax.fori_loop(0, n, one, i)
