"""From a decode step to its operator DAG.

In: a function `f(params, kv, token, pos)` in JAX. Out: an `OpGraph` of fused phases, verified, or an `UnsupportedError` with the user's line.
Never imports what knows of schedules, GPUs or kernels.
"""

from mkdsl.graph._build import build_graph
from mkdsl.graph._given import given_value
from mkdsl.graph._phases import ITEMSIZE, AttentionPhase, FoldPhase, MapPhase, Part, Phase, Segment, Tensor, tiled
from mkdsl.graph._step import StepWalker
from mkdsl.graph._types import Code, Leaf, Node, OpGraph, Rows, UnsupportedError, depth
from mkdsl.graph._verify import verify_graph

__all__ = [
    "ITEMSIZE", "AttentionPhase", "Code", "FoldPhase", "Leaf", "MapPhase", "Node", "OpGraph", "Part", "Phase", "Rows", "Segment", "StepWalker",
    "Tensor", "UnsupportedError", "build_graph", "depth", "given_value", "tiled", "verify_graph",
]  # fmt: skip
