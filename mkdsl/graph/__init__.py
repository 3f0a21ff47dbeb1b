"""From a decode step to its operator DAG: values, fused phases, verification."""

from mkdsl.graph._build import build_graph
from mkdsl.graph._forms import form_of, neighbours, orders
from mkdsl.graph._types import Code, Form, Leaf, Node, OpGraph, Part, Phase, Segment, Step, Tensor, UnsupportedError, depth
from mkdsl.graph._verify import verify_graph

__all__ = [
    "Code",
    "Form",
    "Leaf",
    "Node",
    "OpGraph",
    "Part",
    "Phase",
    "Segment",
    "Step",
    "Tensor",
    "UnsupportedError",
    "build_graph",
    "depth",
    "form_of",
    "neighbours",
    "orders",
    "verify_graph",
]
