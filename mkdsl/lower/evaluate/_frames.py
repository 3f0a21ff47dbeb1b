"""Evaluates values of the DAG on tiles. A frame says which piece of every vector is looked at, and in which layout.

`Rows`: some features of some sequences, [sequences, features]: epilogues and maps.
`Cell`: up to 8 of the mma's columns as rows, [rows, features]: prologues. Row n of a fold that cuts K into P pieces holds piece n % P of sequence n // P.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from mkdsl.graph import Node
from mkdsl.lower._machine import Machine, Request, f32, spread
from mkdsl.lower._types import Index, Layout, Ref, Value
from mkdsl.lower.evaluate._evaluator import COMBINE, GIVEN, Evaluator, PerRow, as_bool, filled, repeated
from mkdsl.lower.mosaic._layouts import grid
from mkdsl.schedule import SHARING


@dataclasses.dataclass
class Frame(Evaluator):
    """A piece [rows, features]."""

    whole: ClassVar[type] = jax.Array
    vector: ClassVar[int] = 1

    @property
    def shape(self) -> tuple[int, int]:
        raise NotImplementedError

    @property
    def layout(self) -> Layout:
        return grid(*self.shape, self.vector)

    def param(self, node: Node) -> jax.Array:
        raise NotImplementedError

    def embedding(self, node: Node) -> jax.Array:
        raise NotImplementedError

    def statistic(self, node: Node) -> PerRow:
        raise NotImplementedError

    def given(self, node: Node) -> Value:
        raise NotImplementedError

    def rules(self) -> dict[str, Callable[[Node], Value]]:
        given = dict.fromkeys(GIVEN, self.given)
        return {"param": self.param, "embed": self.embedding, "reduce": self.statistic, **given}

    def is_view(self, node: Node) -> bool:
        return node.kind in ("broadcast", "reshape") and len(node.shape) <= 1

    def combine(self, id: int, loaded: list[jax.Array]) -> Value:
        return loaded[0]

    def apply(self, primitive: Any, params: dict[str, Any], pieces: list[jax.Array]) -> jax.Array:
        return primitive.bind(*pieces, **params)

    def full(self, value: Value) -> jax.Array:
        if isinstance(value, PerRow):
            return (
                spread(value.vector, self.shape, 0, self.layout) if value.vector.ndim else repeated(value.vector, self.shape, self.layout)
            )
        return value if isinstance(value, jax.Array) else filled(value, self.shape)

    def stack(self, rows: list[jax.Array]) -> jax.Array:
        """Rows r, r + n, r + 2n, ... of the frame from n vectors; the frame itself if that is what there is."""
        if rows[0].ndim == 2:
            return rows[0]
        wide = [spread(r, self.shape, 1, self.layout) for r in rows]
        out = wide[0]
        for r, w in enumerate(wide[1:], 1):
            out = jnp.where(lax.rem(iota(self.m, self.shape, 0, self.layout), len(rows)) == r, w, out)
        return out


@dataclasses.dataclass
class Rows(Frame):
    """Features [first, first + count) of sequences [sequence, sequence + sequences)."""

    sequence: Index = 0
    sequences: int = 1
    first: Index = 0
    count: int = 8

    @property
    def shape(self) -> tuple[int, int]:
        return self.sequences, self.count

    def at(self, tensor: str, incarnation: Any) -> Request:
        """This frame's piece of a tensor."""
        t = self.m.graph.tensors[tensor]
        view = (self.m.batch, t.width) if t.heads else None
        lead = (incarnation, 0) if t.heads else (incarnation,)
        return Request(self.m.refs[tensor], lead, view, (pl.ds(self.sequence, self.sequences), pl.ds(self.first, self.count)), self.layout)

    def requests(self, id: int) -> list[Request]:
        name = self.m.graph.tensor_of[id]
        return [self.at(name, self.m.slot_read(name, self.phase, self.iteration))]

    def _features(self, ref: Ref, row: Index) -> jax.Array:
        return self.m.load(Request(ref, (row,), None, (pl.ds(self.first, self.count),), self.layout.reduce(0)))

    def param(self, node: Node) -> Value:
        ref, layer = self.m.refs[node.op.parameter], self.m.layer(node.op, self.iteration)
        return PerRow(as_bool(node, ref[layer])) if node.is_scalar else as_bool(node, self.stack([self._features(ref, layer)]))

    def given(self, node: Node) -> PerRow:
        ref = self.m.given(node.id)
        if self.sequences == 1:
            return PerRow(as_bool(node, ref[self.sequence]))
        rows = Request(ref, (), None, (pl.ds(self.sequence, self.sequences),), self.layout.reduce(1))
        return PerRow(as_bool(node, self.m.load(rows)))

    def embedding(self, node: Node) -> jax.Array:
        rows = (embedding_row(self.m, node, self.sequence + s) for s in range(self.sequences))
        return self.stack([self._features(table, row) for table, row in rows]).astype(f32)

    def statistic(self, node: Node) -> PerRow:
        id = node.id
        slot, plan = self.m.graph.code[self.phase.name].stats.index(id), self.m.schedule.plan(self.phase.name)
        combine = COMBINE[self.m.graph.node(id).op][0]
        alone = [("statistics", (slot,))]
        places = alone if plan.cluster == 1 else [("received", (source, slot)) for source in range(plan.cluster)]
        pieces = 1 if (self.phase.name, id) in self.m.settled else plan.split_k
        return PerRow(functools.reduce(combine, [self._partial(*at, plan.split_k, p) for at in places for p in range(pieces)]))

    def _partial(self, name: str, lead: tuple[int, ...], split_k: int, piece: int) -> jax.Array:
        """One worker's reduction over one piece of K, its own or one received from its cluster."""
        rows = self.m.refs[name]
        if self.sequences == 1:
            return rows[(*lead, self.sequence * split_k + piece)]
        view = (rows.shape[-1] // (self.m.batch * split_k), self.m.batch, split_k)
        return self.m.load(Request(rows, lead, view, (0, pl.ds(self.sequence, self.sequences), piece), self.layout.reduce(1)))


def embedding_row(m: Machine, node: Node, sequence: Index) -> tuple[Ref, Index]:
    """The table's reference and the row that a sequence looks up in it."""
    table = m.graph.node(node.inputs[0])
    return m.refs[table.op.parameter], jnp.clip(m.address(node.inputs[1], sequence), 0, table.shape[0] - 1)


@dataclasses.dataclass
class Cell(Frame):
    """Columns [block * width, + width) of rows [height * group, + height) of a vector seen as [batch * split_k, k / split_k]. k: as it is laid out."""

    split_k: int = 8
    height: int = 8
    group: int = 0
    block: Index = 0
    width: int = 64
    k: int = 0
    weights: dict[int, Any] = dataclasses.field(default_factory=dict)
    vector: ClassVar[int] = 4

    @property
    def shape(self) -> tuple[int, int]:
        return self.height, self.width

    def _rows(self, ref: Ref, lead: tuple[Any, ...], rows: int) -> list[Request]:
        """Requests for the frame's rows of ref[lead] seen as [rows, k / split_k]: one, or one for each of fewer rows."""
        columns = pl.ds(self.block * self.width, self.width)
        view = (rows, self.k // self.split_k)
        if rows >= self.height:
            first = self.height * (self.group % (rows // self.height))
            return [Request(ref, lead, view, (pl.ds(first, self.height), columns), self.layout)]
        return [Request(ref, lead, view, (r, columns), self.layout.reduce(0)) for r in range(rows)]

    def masked(self, value: jax.Array, width: int, neutral: float) -> jax.Array:
        """A value of a vector of so many features; something neutral where these end before the vector's last tile does."""
        if width == self.k:
            return value
        at = iota(self.m, self.shape, 1, self.layout) + self.block * self.width
        if self.split_k > 1:
            row = iota(self.m, self.shape, 0, self.layout) + self.height * self.group
            at = at + lax.rem(row, self.split_k) * (self.k // self.split_k)
        return jnp.where(at < width, value, filled(np.float32(neutral), self.shape))

    def requests(self, id: int) -> list[Request]:
        name = self.m.graph.tensor_of[id]
        tensor, ref = self.m.graph.tensors[name], self.m.refs[name]
        inc = self.m.slot_read(name, self.phase, self.iteration)
        rows = self.m.batch * self.split_k
        if not tensor.heads:
            return self._rows(ref, (inc,), rows)
        splits = self.m.schedule.tensor(name).splits
        values = [r for s in range(splits) for r in self._rows(ref, (inc, s), rows)]
        spans = range(self._spans(name) if splits > 1 else 0)
        return values + [self._lse(name, (inc, s), rows, n) for s in range(splits) for n in spans]

    def _spans(self, name: str) -> int:
        """How many log-sum-exps a row's columns have: one, or one for every 16 columns where blocks reach over the ends of heads."""
        tensor = self.m.graph.tensors[name]
        return 1 if (tensor.width // tensor.heads) % self.width == 0 else self.width // SHARING

    def _lse(self, name: str, lead: tuple[Index, int], rows: int, span: int) -> Request:
        """Log-sum-exps of the heads in which each row's columns, or a span of them, lie."""
        view, column = (rows, self.k // self.split_k // SHARING), self.block * self.width // SHARING + span
        return Request(self.m.refs[f"{name}.lse"], lead, view, (self._span(), column), self.layout.reduce(1))

    def _span(self) -> Index:
        """Which rows of all this frame's are; a vector of one is a scalar."""
        return pl.ds(self.height * self.group, self.height) if self.height > 1 else self.group

    def combine(self, id: int, loaded: list[jax.Array]) -> Value:
        name = self.m.graph.tensor_of[id]
        splits = self.m.schedule.tensor(name).splits
        if splits == 1:
            return self.stack(loaded)
        spans = self._spans(name)
        each = len(loaded) // splits - spans
        values = [self.stack(loaded[s * each : (s + 1) * each]) for s in range(splits)]
        weights = [_merging(loaded[splits * each + n :: spans]) for n in range(spans)]
        *wide, last = (self._by_span(numbers) for numbers in zip(*weights, strict=True))
        merged = [v * w for v, w in zip(values, wide, strict=True)]
        return sum(merged[1:], merged[0]) * last

    def _by_span(self, numbers: Sequence[jax.Array]) -> jax.Array:
        """A number of each row for each span of columns."""
        out = self.full(PerRow(numbers[0]))
        for n, number in enumerate(numbers[1:], 1):
            out = jnp.where(iota(self.m, self.shape, 1, self.layout) >= n * SHARING, self.full(PerRow(number)), out)
        return out

    def param(self, node: Node) -> Value:
        if node.is_scalar:
            return PerRow(as_bool(node, self.m.refs[node.op.parameter][self.m.layer(node.op, self.iteration)]))
        if node.id not in self.weights:
            lead = (self.m.layer(node.op, self.iteration),)
            self.weights[node.id] = self.stack([self.m.load(r) for r in self._rows(self.m.refs[node.op.parameter], lead, self.split_k)])
        return as_bool(node, self.weights[node.id])

    def given(self, node: Node) -> jax.Array:
        """Row r is of sequence (height * group + r) // split_k."""
        first, ref = self.height * self.group, self.m.given(node.id)
        numbers = [ref[(first + r) // self.split_k] for r in range(0, self.height, min(self.split_k, self.height))]
        rows, each = iota(self.m, self.shape, 0, self.layout), self.height // len(numbers)
        out = repeated(numbers[0], self.shape, self.layout)
        for n, number in enumerate(numbers[1:], 1):
            out = jnp.where(rows >= n * each, repeated(number, self.shape, self.layout), out)
        return as_bool(node, out)

    def prepare(self, roots: Sequence[int]) -> None:
        """Loads what does not depend on other workers: weights."""
        stack = list(roots)
        while stack:
            node = self.m.graph.node(stack.pop())
            if node.kind == "param" and not node.is_scalar:
                self.param(node)
            if node.id not in self.m.graph.tensor_of and node.kind not in ("embed", "given"):
                stack.extend(node.inputs)

    def embedding(self, node: Node) -> jax.Array:
        loads = []
        for r in range(self.height):
            sequence, piece = divmod(self.height * self.group + r, self.split_k)
            table, row = embedding_row(self.m, node, sequence)
            columns = pl.ds(piece * (self.k // self.split_k) + self.block * self.width, self.width)
            loads.append(self.m.load(Request(table, (row,), None, (columns,), self.layout.reduce(0))))
        return self.stack(loads).astype(f32)

    def statistic(self, node: Node) -> PerRow:
        slot = self.m.graph.code[self.phase.name].stats.index(node.id)
        return PerRow(self.m.load(Request(self.m.refs["statistics"], (slot,), None, (self._span(),), self.layout.reduce(1))))


def _merging(lse: list[jax.Array]) -> list[jax.Array]:
    """What splits are weighed with, by their log-sum-exps; and last what their sum is multiplied with, since divisions are slow."""
    top = functools.reduce(jnp.maximum, lse)
    weights = [jnp.exp(e - top) for e in lse]
    return [*weights, 1.0 / sum(weights[1:], weights[0])]


def iota(m: Machine, shape: tuple[int, int], axis: int, layout: Layout) -> jax.Array:
    """0, 1, 2, ... along an axis, in a layout."""
    return lax.broadcasted_iota(jnp.int32, shape, axis) if m.interpret else plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout)
