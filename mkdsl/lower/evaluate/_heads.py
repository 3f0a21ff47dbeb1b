"""Values as heads: what lies between a projection and attention, evaluated for the heads of one sequence that one item needs.

A piece is a pair of halves (lo, hi), each [heads, head_dim / 2]: rotary embedding mixes the halves, or other pairs of features by way of shared
memory, a norm over head_dim sums both, and everything else is elementwise on each.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from mkdsl.graph import AttentionPhase, Node
from mkdsl.lower._machine import Machine, Request, spread
from mkdsl.lower._types import Index, Layout, Ref, Value
from mkdsl.lower.evaluate._evaluator import COMBINE, GIVEN, Evaluator, PerRow, as_bool, filled, repeated
from mkdsl.lower.mosaic._layouts import grid
from mkdsl.lower.mosaic._partners import partners
from mkdsl.ops import Rope


class Halves(NamedTuple):
    lo: jax.Array
    hi: jax.Array


@dataclasses.dataclass
class Heads(Evaluator):
    """Heads [first, first + count) of one sequence."""

    whole: ClassVar[type] = Halves
    phase: AttentionPhase
    sequence: Index = 0
    first: Index = 0
    count: int = 1
    tables: dict[int, list[list[jax.Array]]] = dataclasses.field(default_factory=dict)

    @property
    def half(self) -> int:
        return self.phase.head_dim // 2

    @property
    def shape(self) -> tuple[int, int]:
        return self.count, self.half

    @property
    def layout(self) -> Layout:
        return grid(*self.shape)

    def requests(self, id: int) -> list[Request]:
        """Both halves of a projection's heads."""
        m, name = self.m, self.m.graph.tensor_of[id]
        inc = m.slot_read(name, self.phase, self.iteration)
        return self._halves(m.refs[name], (inc, self.sequence))

    def _halves(self, ref: Ref, lead: tuple[Any, ...]) -> list[Request]:
        view = (math.prod(ref.shape[len(lead) :]) // self.phase.head_dim, 2, self.half)
        return [Request(ref, lead, view, (pl.ds(self.first, self.count), h, pl.ds(0, self.half)), self.layout) for h in range(2)]

    def combine(self, id: int, loaded: list[jax.Array]) -> Halves:
        return Halves(*loaded)

    def rules(self) -> dict[str, Callable[[Node], Value]]:
        given = dict.fromkeys(GIVEN, self._given)
        return {"param": self._param, "rope": self._rope, "reduce": self._reduce, **given}

    def is_view(self, node: Node) -> bool:
        return node.kind in ("reshape", "broadcast")

    def apply(self, primitive: Any, params: dict[str, Any], pieces: list[Halves]) -> Halves:
        return Halves(*(primitive.bind(*half, **params) for half in zip(*pieces, strict=True)))

    def full(self, value: Value) -> Halves:
        if isinstance(value, Halves):
            return value
        if isinstance(value, PerRow):
            wide = (
                spread(value.vector, self.shape, 0, self.layout) if value.vector.ndim else repeated(value.vector, self.shape, self.layout)
            )
        else:
            wide = filled(value, self.shape)
        return Halves(wide, wide)

    def _given(self, node: Node) -> PerRow:
        return PerRow(as_bool(node, self.m.given(node.id)[self.sequence]))

    def _param(self, node: Node) -> Value:
        if node.is_scalar:
            return PerRow(as_bool(node, self.m.refs[node.op.parameter][self.m.layer(node.op, self.iteration)]))
        ref, lead = self.m.refs[node.op.parameter], (self.m.layer(node.op, self.iteration),)
        if node.width == self.phase.head_dim:  # the same for every head
            vectors = (Request(ref, lead, None, (pl.ds(h * self.half, self.half),), self.layout.reduce(0)) for h in range(2))
            halves = [spread(self.m.load(v), self.shape, 1, self.layout) for v in vectors]
        else:
            halves = list(map(self.m.load, self._halves(ref, lead)))
        return Halves(*(as_bool(node, h) for h in halves))

    def prepare(self, roots: Sequence[int]) -> None:
        """Loads what does not depend on other workers: weights and rotary tables."""
        stack = list(roots)
        while stack:
            node = self.m.graph.node(stack.pop())
            if node.kind == "param":
                self.value(node.id)
            if node.kind == "rope":
                self.tables[node.id] = self._rotation(node)
            if node.id not in self.m.graph.tensor_of and node.kind != "given":
                stack.extend(node.inputs)

    def _rotation(self, node: Node) -> list[list[jax.Array]]:
        """Cosines and sines of this sequence's position, of the pairs of halves, or of both halves' features."""
        graph, table, row = self.m.graph, self.m.refs[f"rope{node.id}"], self.sequence
        if graph.has_table(node):
            row = jnp.clip(self.m.refs["pos"][self.sequence], 0, graph.table_length - 1)
        halves = range(1 if node.op.by_halves(self.phase.head_dim) else 2)
        return [[self._table(table, (row, which), h) for h in halves] for which in range(2)]

    def _rope(self, node: Node) -> Halves:
        x, (cos, sin) = self.evaluate(node.inputs[0]), self.tables[node.id]
        if node.op.by_halves(self.phase.head_dim):
            (lo, hi), (cos,), (sin,) = x, cos, sin
            return Halves(lo * cos - hi * sin, hi * cos + lo * sin)
        return Halves(*(a * c + b * s for a, b, c, s in zip(x, self._partners(node.op, x), cos, sin, strict=True)))

    def _partners(self, op: Rope, x: Halves) -> Sequence[jax.Array]:
        """What each feature is rotated against, 0 for those that pass."""
        if op.dims == self.phase.head_dim and not op.interleaved:
            return x[::-1]
        if self.m.interpret:
            return jnp.split(op.partners(jnp.concatenate(x, axis=1)), 2, axis=1)
        scratch = self.m.refs[f"out.{self.phase.name}"]  # nothing is kept there yet
        return partners(x, scratch, dims=op.dims, interleaved=op.interleaved, layout=self.layout)

    def _table(self, table: Ref, lead: tuple[Any, ...], half: int) -> jax.Array:
        row = self.m.load(Request(table, lead, None, (pl.ds(half * self.half, self.half),), self.layout.reduce(0)))
        return spread(row, self.shape, 1, self.layout)

    def _reduce(self, node: Node) -> PerRow:
        lo, hi = self.evaluate(node.inputs[0])
        combine, reduce, _ = COMBINE[node.op]
        return PerRow(combine(reduce(lo, axis=1), reduce(hi, axis=1)))


def head_leaves(m: Machine, roots: tuple[int, ...]) -> list[int]:
    """Tensor nodes that evaluating heads loads."""
    found: dict[int, None] = {}
    stack = list(roots)
    while stack:
        id = stack.pop()
        if id in m.graph.tensor_of:
            found[id] = None
        else:
            stack.extend(m.graph.node(id).inputs)
    return list(found)
