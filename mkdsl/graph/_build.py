"""Decode step -> `OpGraph`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from mkdsl.graph._fuse import Fuser, orders
from mkdsl.graph._rewrite import pull_out_scalars
from mkdsl.graph._trace import Tracer, trace
from mkdsl.graph._types import OpGraph, Segment
from mkdsl.graph._verify import verify_graph


def build_graph(f: Callable[..., Any], params: Any, kv: Any, token: Any, pos: Any) -> tuple[OpGraph, Any]:
    """Traces `f(params, kv, token, pos)` for one token, fuses it, and verifies the result.

    Args:
      f: the decode step.
      params, kv: pytrees of arrays or jax.ShapeDtypeStruct, without a batch axis.
      token, pos: int32 scalars, likewise.

    Returns:
      The graph, and the tree structure of f's outputs.

    Raises:
      UnsupportedError: something in f has no tile lowering.
    """
    tracer, outputs, tree = trace(f, params, kv, token, pos)
    pull_out_scalars(tracer)
    context = min((leaf.shape[-2] for leaf in jax.tree.leaves(kv)), default=0)
    graph, *others = (_graph(tracer, fuser, context) for fuser in orders(tracer, outputs))
    return dataclasses.replace(graph, others=tuple(others)), tree


def _graph(tracer: Tracer, fuser: Fuser, context: int) -> OpGraph:
    segments = []
    for s, repeats in enumerate(tracer.repeats):
        segments.append(Segment(phases=tuple(p.name for p in fuser.phases if p.segment == s), repeats=repeats))
    graph = OpGraph(
        tracer.dag, tuple(fuser.phases), tuple(segments), fuser.tensors, fuser.code, fuser.tensor_of, fuser.output_of,
        tuple(fuser.outputs), context,
    )  # fmt: skip
    verify_graph(graph)
    return graph
