"""Numbers that are known before the kernel starts: whatever is computed from the token, its position, constants and parameters that are numbers.

XLA computes them, once for all layers, by way of vectors if need be, and the kernel is handed one for each sequence. So a position may be any
expression of `pos`, and `pos` may stand in arithmetic. Constant vectors, such as an index along features, become parameters of the graph's own.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mkdsl.graph._trace import Tracer
from mkdsl.graph._types import Leaf, OpGraph

REDUCE = {"reduce_sum": jnp.sum, "reduce_max": jnp.max, "reduce_min": jnp.min}


def find_given(tracer: Tracer, params: int) -> tuple[Any, ...]:
    """Marks what is given (node kind "given"), and turns constant vectors into parameters behind the caller's `params` leaves. Returns those."""
    for id in tracer.known:
        node = tracer.node(id)
        if node.is_scalar and node.kind not in ("token", "pos"):
            tracer.dag.nodes[id]["node"] = dataclasses.replace(node, kind="given")
    constants: list[Any] = []
    for id in tracer.dag:
        node = tracer.node(id)
        if node.kind == "literal" and np.size(node.op) > 1:
            leaf = Leaf(f"constant{len(constants)}", params + len(constants), False)
            constants.append(np.asarray(node.op))
            tracer.dag.nodes[id]["node"] = dataclasses.replace(node, kind="param", op=leaf)
    return tuple(constants)


def given_value(graph: OpGraph, id: int, params: Sequence[jax.Array], token: jax.Array, pos: jax.Array) -> jax.Array:
    """The value of a given node, of one sequence."""

    @functools.cache
    def value(id: int) -> jax.Array:
        node = graph.node(id)
        if node.kind in ("token", "pos"):
            return jnp.asarray({"token": token, "pos": pos}[node.kind], jnp.int32)
        if node.kind == "literal":
            return jnp.broadcast_to(jnp.asarray(node.op), node.shape)
        if isinstance(node.op, Leaf):
            return node.op.of(params).reshape(node.shape)
        inputs = [value(i) for i in node.inputs]
        if node.op is None:  # a reshape or a broadcast
            return inputs[0].reshape(node.shape) if inputs[0].size == node.width else jnp.broadcast_to(inputs[0], node.shape)
        if isinstance(node.op, str):
            return REDUCE[node.op](inputs[0], -1)
        primitive, options, *which = node.op
        out = primitive.bind(*inputs, **options)
        return out[which[0]] if which else out

    return value(id)
