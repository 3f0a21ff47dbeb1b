"""Numbers that are known before the kernel starts: whatever is computed from the token, its position, constants and parameters that are numbers.

XLA computes them, once for all layers, and the kernel is handed one for each sequence. So a position may be any expression of `pos`, and `pos` may
stand in arithmetic. Constant vectors, such as an index along features, become parameters of the graph's own.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np

from mkdsl.graph._trace import Tracer
from mkdsl.graph._types import Leaf, Node, OpGraph

SOURCES = ("token", "pos", "given")
VIEWS = ("reshape", "broadcast")


def find_given(tracer: Tracer, params: int) -> tuple[Any, ...]:
    """Marks what is given (node kind "given"), and turns constant vectors into parameters behind the caller's `params` leaves. Returns those."""
    for id in nx.topological_sort(tracer.dag):
        node = tracer.node(id)
        number = node.kind == "param" and node.shape == () and not node.op.stacked
        if number or (node.kind in ("map", *VIEWS) and node.shape == () and _is_known(tracer, node)):
            op = node.op if node.kind in ("map", "param") else None
            tracer.dag.nodes[id]["node"] = dataclasses.replace(node, kind="given", op=op)
    constants: list[Any] = []
    for id in tracer.dag:
        node = tracer.node(id)
        if node.kind == "literal" and np.size(node.op) > 1:
            leaf = Leaf(f"constant{len(constants)}", params + len(constants), False)
            constants.append(np.asarray(node.op).reshape(-1))
            tracer.dag.nodes[id]["node"] = dataclasses.replace(node, kind="param", op=leaf)
    return tuple(constants)


def _is_known(tracer: Tracer, node: Node) -> bool:
    inputs = [tracer.node(i) for i in node.inputs]
    known = all(i.kind in SOURCES or (i.kind == "literal" and np.size(i.op) == 1) for i in inputs)
    return known and any(i.kind in SOURCES for i in inputs)


def given_value(graph: OpGraph, id: int, params: Sequence[jax.Array], token: jax.Array, pos: jax.Array) -> jax.Array:
    """The value of a given node, of one sequence."""
    node = graph.node(id)
    if node.kind in ("token", "pos"):
        return jnp.asarray({"token": token, "pos": pos}[node.kind], jnp.int32)
    if node.kind == "literal":
        return jnp.asarray(node.op).reshape(())
    if isinstance(node.op, Leaf):
        return params[node.op.index]
    inputs = [given_value(graph, i, params, token, pos) for i in node.inputs]
    return inputs[0] if node.op is None else node.op[0].bind(*inputs, **node.op[1])
