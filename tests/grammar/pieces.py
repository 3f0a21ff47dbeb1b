"""Pieces of a phase's values: what a worker computes of them for itself, from the tensors that the phase says it reads.

A prologue and an epilogue see some features of every vector (`Features`), attention's inputs are seen head by head (`Heads`). What such a piece
cannot have is `NotComputable`: a decode step with that in it should have been refused.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from grammar.arithmetic import REDUCTIONS, Array
from grammar.plain import rotated
from mkdsl.graph import Node, OpGraph

if TYPE_CHECKING:
    from grammar.phases import Run


class NotComputable(AssertionError):
    """The graph asks for what no piece of a value can be computed from."""


@dataclasses.dataclass
class Piece:
    """values: what is known, by node. tensors: names that may be read. own: nodes that this phase writes, which are computed and not read back."""

    run: "Run"
    tensors: tuple[str, ...]
    values: dict[int, Array]
    own: frozenset[int] = frozenset()
    what: ClassVar[str]

    @property
    def graph(self) -> OpGraph:
        return self.run.graph

    def value(self, id: int) -> Array:
        """A node's piece, or a number that all of it has."""
        if id not in self.values:
            self.values[id] = self._value(self.graph.node(id))
        return self.values[id]

    def _value(self, node: Node) -> Array:
        if node.id in self.graph.tensor_of and node.id not in self.own:
            return self.tensor(self.graph.tensor_of[node.id])
        if node.kind in ("token", "pos", "given"):
            return self.run.given(node.id)
        if node.kind == "literal":
            return self.run.constant(node)
        if node.kind == "map":
            primitive, params = node.op
            self.check_dtypes(node)
            return self.run.arithmetic.apply(primitive.name, params, [self.value(i) for i in node.inputs], node.dtype)
        if node.kind == "param":
            leaf = self.run.leaf(node)
            return leaf.reshape(()) if leaf.size == 1 else self.weight(node, leaf)
        if rule := self.rules().get(node.kind):
            return rule(node)
        raise NotComputable(f"{node.where}: {node.kind}{list(node.shape)} of {self.what}")

    def check_dtypes(self, node: Node) -> None:
        """A kernel converts nothing by itself."""
        dtypes = {self.graph.node(i).dtype for i in node.inputs[node.op[0].name == "select_n" :]}
        if len(dtypes) > 1:
            raise NotComputable(f"{node.where}: {node.op[0].name} of {sorted(dtypes)}")

    def tensor(self, name: str) -> Array:
        if name not in self.tensors:
            raise NotComputable(f"{self.run.phase.name} reads {name}, and says {self.tensors}")
        return self.cut(self.run.read(name))

    def cut(self, vector: Array) -> Array:
        """This piece of a whole vector."""
        raise NotImplementedError

    def weight(self, node: Node, leaf: Array) -> Array:
        """This piece of a parameter."""
        raise NotImplementedError

    def rules(self) -> dict[str, Callable[[Node], Array]]:
        raise NotImplementedError


@dataclasses.dataclass
class Features(Piece):
    """Features [first, last) of every vector."""

    first: int = 0
    last: int = 0
    what: ClassVar[str] = "a piece of features"

    def cut(self, vector: Array) -> Array:
        return vector[self.first : self.last]

    def weight(self, node: Node, leaf: Array) -> Array:
        return self.cut(leaf.reshape(-1))

    def rules(self) -> dict[str, Callable[[Node], Array]]:
        return {"embed": self._row, "reshape": self._view, "broadcast": self._view}

    def _row(self, node: Node) -> Array:
        table = self.run.leaf(self.graph.node(node.inputs[0]))
        return self.cut(table[np.clip(self.run.given(node.inputs[1]), 0, len(table) - 1)])

    def _view(self, node: Node) -> Array:
        if len(node.shape) != 1:
            raise NotComputable(f"{node.where}: {node.kind}{list(node.shape)} of {self.what}")
        return self.value(node.inputs[0])


@dataclasses.dataclass
class Heads(Piece):
    """Heads [first, last) of what attention takes: [heads, head_dim], or one number of each head [heads, 1]."""

    head_dim: int = 0
    first: int = 0
    last: int = 0
    what: ClassVar[str] = "heads"

    def cut(self, vector: Array) -> Array:
        return vector.reshape(-1, self.head_dim)[self.first : self.last]

    def weight(self, node: Node, leaf: Array) -> Array:
        if leaf.size == self.head_dim:  # the same for every head
            return leaf.reshape(1, -1)
        if leaf.size % self.head_dim:
            raise NotComputable(f"{node.where}: a weight of {list(node.shape)} on heads of {self.head_dim}")
        return self.cut(leaf.reshape(-1))

    def rules(self) -> dict[str, Callable[[Node], Array]]:
        return {"rope": self._rotated, "reduce": self._reduced, "reshape": self._view, "broadcast": self._view}

    def whole(self, id: int) -> Any:
        """A node's piece, spread over the features."""
        return np.broadcast_to(self.value(id), (self.last - self.first, self.head_dim))

    def _view(self, node: Node) -> Array:
        return self.value(node.inputs[0])

    def _rotated(self, node: Node) -> Array:
        if node.shape[1] != self.head_dim:
            raise NotComputable(f"{node.where}: a rotation of {list(node.shape)} on heads of {self.head_dim}")
        return rotated(node.op, self.whole(node.inputs[0]), self.run.given(node.inputs[1]))

    def _reduced(self, node: Node) -> Array:
        if self.graph.node(node.inputs[0]).shape[-1] != self.head_dim:
            raise NotComputable(f"{node.where}: a reduction of {list(self.graph.node(node.inputs[0]).shape)} on heads of {self.head_dim}")
        return REDUCTIONS[node.op](self.whole(node.inputs[0]), axis=1, keepdims=True)
