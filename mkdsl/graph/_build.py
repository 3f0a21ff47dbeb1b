"""Decode step -> `OpGraph`."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from mkdsl.graph._given import find_given
from mkdsl.graph._orders import orders
from mkdsl.graph._rewrite import pull_out_scalars
from mkdsl.graph._trace import trace
from mkdsl.graph._types import DecodeStep, OpGraph, UnsupportedError
from mkdsl.graph._verify import verify_graph
from mkdsl.ops import Paged


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
    constants = find_given(tracer, len(jax.tree.leaves(params)))
    pull_out_scalars(tracer)
    now = tracer.replaced
    carries = tuple((carry, now.get(init, init), now.get(final, final)) for carry, init, final in tracer.carries)
    context = min(map(_context, jax.tree.leaves(kv, is_leaf=lambda x: isinstance(x, Paged))), default=0)
    outputs = tuple(now.get(o, o) for o in outputs)
    graph, *others = orders(DecodeStep(tracer.dag, tuple(tracer.repeats), carries, outputs, context, constants, tracer.where))
    verify_graph(graph)
    return dataclasses.replace(graph, others=tuple(filter(_has_a_lowering, others))), tree


def _context(cache: Any) -> int:
    """Positions in a sequence's cache."""
    if isinstance(cache, Paged):
        return cache.table.shape[-1] * jax.tree.leaves(cache.pages)[0].shape[-2]
    return cache.shape[-2] if cache.ndim > 1 else 0


def _has_a_lowering(graph: OpGraph) -> bool:
    """Whether every phase has a tile lowering. A step may have one in some orders only, as what a fold's epilogue computes depends on the order."""
    with contextlib.suppress(UnsupportedError):
        verify_graph(graph)
        return True
    return False
