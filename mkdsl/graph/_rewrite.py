"""Algebra that shortens the critical path: a number per token is moved from a linear fold's operand to its result.

linear(w, r * h) = r * linear(w, h) for a per-token r such as RMS norm's 1/rms, so that weights need not wait for the reduction.
"""

import dataclasses

from jax import lax

from mkdsl.graph import _networkx as nx
from mkdsl.graph._trace import Tracer
from mkdsl.graph._types import Node
from mkdsl.ops import LINEAR


def pull_out_scalars(tracer: Tracer) -> None:
    """Rewrites every linear fold whose resident is a product with a reduced per-token number."""
    stripped: dict[int, tuple[int, int] | None] = {}
    for id in list(nx.topological_sort(tracer.dag)):
        node = tracer.node(id)
        if node.kind != "fold" or node.op != LINEAR:
            continue
        resident = node.inputs[1]
        if resident not in stripped:
            stripped[resident] = _strip(tracer, resident)
        if found := stripped[resident]:
            _move(tracer, node, *found)


def _strip(tracer: Tracer, id: int) -> tuple[int, int] | None:
    """(id without its scalar factor, the scalar), or None where there is no such factor."""
    node = tracer.node(id)
    if node.kind != "map" or node.op[0] is not lax.mul_p or node.dtype != "float32":
        return None
    for vector, other in (node.inputs, node.inputs[::-1]):
        if _is_own_statistic(tracer, vector, other):
            return vector, other
        if vector != other and (found := _strip(tracer, vector)):  # of a square, only one of the factors would lose it
            rest, scalar = found
            inputs = tuple(rest if i == vector else i for i in node.inputs)
            return tracer.add("map", node, inputs, node.op, node.where, node.segment), scalar
    return None


def _is_own_statistic(tracer: Tracer, vector: int, other: int) -> bool:
    """Whether `other` is a number per token reduced from `vector`, as in a norm. Numbers reduced from elsewhere stay: the phase would
    have to read that elsewhere again."""
    node = tracer.node(other)
    if node.kind == "broadcast":
        return _is_own_statistic(tracer, vector, node.inputs[0])
    above = nx.ancestors(tracer.dag, other) | {other}
    return node.is_scalar and not tracer.node(vector).is_scalar and vector in above and any(tracer.node(a).kind == "reduce" for a in above)


def _move(tracer: Tracer, fold: Node, resident: int, scalar: int) -> None:
    """Points the fold at its bare resident and multiplies its result; users see the product under a new node."""
    users = list(tracer.dag.successors(fold.id))
    _replace_input(tracer, fold.id, fold.inputs[1], resident)
    product = tracer.add("map", fold, (fold.id, scalar), (lax.mul_p, {}), fold.where, fold.segment)
    for user in users:
        _replace_input(tracer, user, fold.id, product)
    tracer.replaced[fold.id] = product


def _replace_input(tracer: Tracer, id: int, old: int, new: int) -> None:
    node = tracer.node(id)
    tracer.dag.remove_edge(old, id)
    inputs = tuple(new if i == old else i for i in node.inputs)
    tracer.dag.nodes[id]["node"] = dataclasses.replace(node, inputs=inputs)
    tracer.dag.add_edges_from((i, id) for i in inputs)
