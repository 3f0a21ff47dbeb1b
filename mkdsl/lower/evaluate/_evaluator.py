"""What evaluating values of the DAG on tiles has in common, whatever a tile is: each value once, constants and numbers per row as they are until a
whole piece is asked for."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from mkdsl.graph import Node, Phase
from mkdsl.lower._machine import Machine, Request
from mkdsl.lower._types import Index, Layout, Value

COMBINE = {
    "reduce_sum": (jnp.add, jnp.sum, 0.0),
    "reduce_max": (jnp.maximum, jnp.max, -jnp.inf),
    "reduce_min": (jnp.minimum, jnp.min, jnp.inf),
}


GIVEN = ("token", "pos", "given")


class PerRow(NamedTuple):
    """One number per row of a piece, not yet spread over features."""

    vector: jax.Array


@dataclasses.dataclass
class Evaluator:
    """A piece of every vector. values: what has been evaluated, by node: a whole piece (`whole`, a type), a `PerRow` or a constant."""

    whole: ClassVar[type]
    m: Machine
    phase: Phase
    iteration: Index
    values: dict[int, Value] = dataclasses.field(default_factory=dict)

    # What subclasses know.

    def requests(self, id: int) -> list[Request]:
        """The loads that a tensor's piece takes."""
        raise NotImplementedError

    def combine(self, id: int, loaded: list[jax.Array]) -> Value:
        """The tensor's piece from its loads."""
        raise NotImplementedError

    def rules(self) -> dict[str, Callable[[Node], Value]]:
        """How each kind of node is computed, besides elementwise ones."""
        raise NotImplementedError

    def is_view(self, node: Node) -> bool:
        """Whether a node is its input in another shape, which no piece sees."""
        raise NotImplementedError

    def full(self, value: Value) -> Any:
        """A whole piece of a value."""
        raise NotImplementedError

    def apply(self, primitive: Any, params: dict[str, Any], pieces: list[Any]) -> Any:
        """An elementwise primitive on whole pieces."""
        raise NotImplementedError

    # Evaluation.

    def evaluate(self, id: int) -> Any:
        """A node's whole piece."""
        return self.full(self.value(id))

    def value(self, id: int) -> Value:
        if id not in self.values:
            self.values[id] = self._compute(self.m.graph.node(id))
        return self.values[id]

    def _compute(self, node: Node) -> Value:
        if node.kind == "literal":
            return np.asarray(node.op)
        if node.kind == "map":
            return self._map(node, [self.value(i) for i in node.inputs])
        if self.is_view(node):
            return self.value(node.inputs[0])
        return self.rules()[node.kind](node)  # verify_graph lets no node through that has no rule here

    def _map(self, node: Node, args: Sequence[Value]) -> Value:
        primitive, params = node.op
        if any(isinstance(a, self.whole) for a in args):
            return self.apply(primitive, params, [self.full(a) for a in args])
        if rows := [a.vector for a in args if isinstance(a, PerRow)]:
            shape = max((r.shape for r in rows), key=len)
            vectors = (jnp.broadcast_to(a.vector, shape) if isinstance(a, PerRow) else filled(a, shape) for a in args)
            return PerRow(primitive.bind(*vectors, **params))
        return np.asarray(primitive.bind(*args, **params))


def repeated(number: jax.Array, shape: tuple[int, ...], layout: Layout) -> jax.Array:
    """A number that the kernel computes, repeated."""
    return plgpu.layout_cast(jnp.broadcast_to(number, shape), layout)


def as_bool(node: Node, value: jax.Array) -> jax.Array:
    """A given value as its node has it: booleans are handed over as int32."""
    return value != 0 if node.dtype == "bool" else value


def filled(value: Value, shape: tuple[int, ...]) -> jax.Array:
    """A constant, repeated."""
    value = np.asarray(value)
    return jnp.full(shape, value.reshape(()).item(), value.dtype)


def fetch(wanted: Sequence[tuple[Evaluator, Sequence[int]]]) -> None:
    """Loads pieces of tensors into (evaluator, nodes) pairs all at once, so that their latencies overlap."""
    plan = [(piece, id, piece.requests(id)) for piece, ids in wanted for id in ids if id not in piece.values]
    if not plan:
        return
    m, phase, iteration = plan[0][0].m, plan[0][0].phase, plan[0][0].iteration
    tensors = [m.graph.tensor_of[id] for _, id, rs in plan for _ in rs]
    loaded = m.load_handed_over([r for _, _, rs in plan for r in rs], tensors, phase, iteration)
    at = 0
    for piece, id, rs in plan:
        piece.values[id] = piece.combine(id, loaded[at : at + len(rs)])
        at += len(rs)
