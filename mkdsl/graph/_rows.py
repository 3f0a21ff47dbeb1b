"""Slices: rows of a projection are a projection by rows of its weight, which are tiles like others.

fold(w, x)[a:b] = fold(w[a:b], x), and slice(f(y)) = f(slice(y)) of all f that stand between: elementwise code, heads, what is computed head by head.
So a slice goes down to the leaves of params, and nothing is copied for it.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax

from mkdsl.graph._types import Leaf, Node, Rows

if TYPE_CHECKING:
    from mkdsl.graph._trace import Tracer

type Inputs = Sequence[int | None] | None  # of a node, some rows of which are computed; None where there is no such node


def slices(tracer: "Tracer", eqn: Any, inputs: Sequence[int]) -> list[int]:
    """The nodes of what a slice or a split makes; none where it is another equation, or of what has no rows of its own."""
    found = [rows(tracer, inputs[0], first, count) for first, count in _ranges(eqn)]
    return [id for id in found if id is not None] if None not in found else []


def _ranges(eqn: Any) -> list[tuple[int, int]]:
    """(first, count) along the first axis of each result; nothing of what takes something else."""
    name, params = eqn.primitive.name, eqn.params
    if name == "split" and params["axis"] == 0:
        sizes = [int(n) for n in params["sizes"]]
        return [(sum(sizes[:i]), n) for i, n in enumerate(sizes)]
    if name == "slice" and eqn.invars[0].aval.shape[1:] == eqn.outvars[0].aval.shape[1:] and set(params["strides"] or (1,)) == {1}:
        return [(params["start_indices"][0], eqn.outvars[0].aval.shape[0])]
    return []


def rows(tracer: "Tracer", id: int, first: int, count: int) -> int | None:
    """The node of rows [first, first + count) of a value, along its first axis; None if it has none, or there are none."""
    node = tracer.node(id)
    if not count:
        return None
    if (first, count) == (0, node.shape[0]):
        return id
    if (id, first, count) not in tracer.rows:
        tracer.rows[id, first, count] = found = _rows(tracer, node, first, count)
        tracer.spare |= {id, found} - {None}
    return tracer.rows[id, first, count]


def _rows(tracer: "Tracer", node: Node, first: int, count: int) -> int | None:
    inputs, op = node.inputs, node.op
    if node.kind == "param":
        op = _of_leaf(node, first, count)
    elif node.kind == "literal":
        op = op[first : first + count] if op.ndim else op
    else:
        rule = RULES.get(node.kind)
        inputs = rule and rule(tracer, node, first, count)
    if inputs is None or None in inputs or (node.kind == "param" and op is None):
        return None
    aval = jax.ShapeDtypeStruct((count, *node.shape[1:]), node.dtype)
    return tracer.add(node.kind, aval, [i for i in inputs if i is not None], op, node.where, node.segment)


def _of_leaf(node: Node, first: int, count: int) -> Leaf | None:
    """What is left of a weight or a vector; None of a stack of them, whose rows have another axis."""
    if len(node.shape) > 2:
        return None
    leaf, rows = node.op, node.rows
    found = Rows(rows.first + first, count, rows.whole)
    return Leaf(f"{leaf.path.removesuffix(str(rows))}{found}", leaf.index, leaf.stacked, found)


def _of_first(tracer: "Tracer", node: Node, first: int, count: int) -> Inputs:
    """A fold's rows are of its weight's, rotated heads of heads, and so are reductions of heads."""
    return rows(tracer, node.inputs[0], first, count), *node.inputs[1:]


def _of_map(tracer: "Tracer", node: Node, first: int, count: int) -> Inputs:
    return [rows(tracer, i, first, count) if tracer.node(i).shape[:1] == node.shape[:1] else i for i in node.inputs]


def _of_reshape(tracer: "Tracer", node: Node, first: int, count: int) -> Inputs:
    """Rows of the other shape that hold the same numbers, if there are whole ones."""
    source = tracer.node(node.inputs[0])
    own, other = math.prod(node.shape[1:]), math.prod(source.shape[1:])
    if not source.shape or first * own % other or count * own % other or (source.kind == "param" and len(source.shape) > 2):
        return None
    return [rows(tracer, source.id, first * own // other, count * own // other)]


def _of_broadcast(tracer: "Tracer", node: Node, first: int, count: int) -> Inputs:
    """A number for each head is spread over features, anything else over heads."""
    source = tracer.node(node.inputs[0])
    per_head = len(source.shape) == 2 and source.shape[0] == node.shape[0] > 1
    return [rows(tracer, source.id, first, count)] if per_head else node.inputs


RULES: dict[str, Callable[["Tracer", Node, int, int], Inputs]] = {
    "fold": _of_first, "rope": _of_first, "reduce": _of_first, "map": _of_map, "reshape": _of_reshape, "broadcast": _of_broadcast,
}  # fmt: skip


def as_number(tracer: "Tracer", node: Node, out: Any, where: str) -> int:
    """The node of a value that meets others: of one feature that meets many, or none, the number that it is, which any worker can know."""
    if node.id not in tracer.features or (out.size == 1 and out.shape):
        return node.id
    flat = tracer.add("reshape", jax.ShapeDtypeStruct((1,), node.dtype), [node.id], None, where)
    return tracer.add("reduce", jax.ShapeDtypeStruct((), node.dtype), [flat], "reduce_sum", where)


def drop_spare(tracer: "Tracer", outputs: Sequence[int]) -> None:
    """Removes what nobody uses, such as a projection whose rows are computed instead."""
    kept = {*outputs, *tracer.known, *(id for carry in tracer.carries for id in carry)}
    stack = list(tracer.spare)
    while stack:
        id = stack.pop()
        if id in tracer.dag and id not in kept and tracer.node(id).kind in RULES and not tracer.dag.succ[id]:
            stack += tracer.node(id).inputs
            tracer.dag.remove_node(id)
