"""From a decode step to its operator DAG: values, fused phases, verification."""

from mkdsl.graph._build import build_graph
from mkdsl.graph._types import Code, Leaf, Node, OpGraph, Part, Phase, Segment, Tensor, UnsupportedError, depth
from mkdsl.graph._verify import verify_graph

__all__ = [
    "Code",
    "Leaf",
    "Node",
    "OpGraph",
    "Part",
    "Phase",
    "Segment",
    "Tensor",
    "UnsupportedError",
    "build_graph",
    "depth",
    "verify_graph",
]
