"""Whether a kernel can compute each value where a phase needs it. A frame is features of vectors, in which every shape lies flat; attention's
inputs are computed head by head. What cannot be is refused when the decode step is traced."""

from collections.abc import Iterable

from mkdsl.graph._elementwise import DTYPES, LEAF_DTYPES, TABLE_DTYPES
from mkdsl.graph._phases import AttentionPhase, FoldPhase, Phase
from mkdsl.graph._step import check_step
from mkdsl.graph._types import Node, OpGraph, UnsupportedError
from mkdsl.ops import LINEAR

GIVEN = frozenset(("token", "pos", "given", "literal"))
VIEWS = frozenset(("reshape", "broadcast"))
FLAT = "arithmetic on [heads, head_dim] belongs between a projection and mk.attention; elsewhere flatten it with reshape(-1)"
ELSEWHERE = {
    "argmax": "mk.argmax is what a decode step returns, and is found after the kernel; jnp.max is known within",
    "cache": "the cache is read by mk.attention only; what is not a cache belongs in params",
    "append": "the cache is read by mk.attention only; what is not a cache belongs in params",
}


def check_code(graph: OpGraph, phase: Phase) -> None:
    """Refuses a phase that needs a value no kernel computes there.

    Raises:
      UnsupportedError: names the value, the user's line and the remedy.
    """
    if isinstance(phase, AttentionPhase):
        for node, per_head in _on_heads(graph, graph.code[phase.name].parts[0][1]):
            _check_on_heads(graph, phase, node, per_head=per_head)
        return
    for node in _framed(graph, phase):
        _check_framed(graph, phase, node)
    for node in _folds(graph, phase):
        if node.op != LINEAR:
            check_step(node, graph.node(node.inputs[0]).dtype)


def _folds(graph: OpGraph, phase: Phase) -> list[Node]:
    return [graph.node(f) for folds, _ in graph.code[phase.name].parts for f in folds] if isinstance(phase, FoldPhase) else []


def _framed(graph: OpGraph, phase: Phase) -> Iterable[Node]:
    """What the prologue and the epilogue evaluate: down to tensors, to reductions, which have a sweep each, and to what is given."""
    code = graph.code[phase.name]
    written = {id for _, ids in code.parts for id in ids}
    roots = [*written, *code.stats] + ([] if code.resident is None else [code.resident])
    seen, stack = {f.id for f in _folds(graph, phase)}, roots
    while stack:
        node = graph.node(id := stack.pop())
        loaded = id in graph.tensor_of and not (id in written and graph.computes(phase, id))
        if id in seen or loaded:
            continue
        seen.add(id)
        yield node
        if node.kind not in GIVEN and node.kind != "embed":
            stack.extend(node.inputs)


def _check_framed(graph: OpGraph, phase: Phase, node: Node) -> None:
    spread = node.kind == "map" and {graph.node(i).width for i in node.inputs} - {1, node.width}
    wide = spread or (node.kind in VIEWS and len(node.shape) > 1)
    if wide or node.kind not in {"map", "param", "embed", "reduce", *VIEWS, *GIVEN}:
        raise UnsupportedError(
            f"{node.where}: {node.kind}{list(node.shape)} cannot be computed inside {phase.name}; {ELSEWHERE.get(node.kind, FLAT)}"
        )
    if node.kind == "embed":
        table = graph.node(node.inputs[0])
        if node.is_scalar or table.dtype not in TABLE_DTYPES:
            what = f"mk.embed of the table {table.op.path}, {table.dtype}{list(table.shape)}"
            raise UnsupportedError(f"{node.where}: {what}; a table has several columns of {', '.join(TABLE_DTYPES)}: convert it")
    _check_dtype(node)


def _on_heads(graph: OpGraph, roots: Iterable[int]) -> Iterable[tuple[Node, bool]]:
    """What is evaluated for attention's heads, down to tensors, and whether it stands beside them as a number for each."""
    seen, stack = set(), [(id, False) for id in roots]
    while stack:
        if (at := stack.pop()) in seen:
            continue
        seen.add(at)
        node = graph.node(at[0])
        per_head = at[1] or (len(node.shape) == 2 and node.shape[1] == 1 != node.shape[0])
        yield node, per_head
        if node.id not in graph.tensor_of and node.kind not in {"param", *GIVEN}:
            stack += [(i, per_head and node.kind != "reduce") for i in node.inputs[: 1 if node.kind == "rope" else None]]


def _check_on_heads(graph: OpGraph, phase: AttentionPhase, node: Node, *, per_head: bool) -> None:
    if node.id in graph.tensor_of:
        if graph.tensors[graph.tensor_of[node.id]].heads:
            raise UnsupportedError(f"{phase.where}: attention reads another attention's result directly; project it first")
        return
    if node.kind not in {"map", "param", "rope", "reduce", *VIEWS, *GIVEN}:
        what = f"{node.kind}{list(node.shape)} cannot be computed for attention's heads"
        raise UnsupportedError(f"{node.where}: {what}; apply it before the projection, or to each head")
    _check_dtype(node)
    if node.kind == "param" and not node.is_scalar and (per_head or node.width % phase.head_dim):
        what = f"a weight of {list(node.shape)} meets heads of {phase.head_dim}"
        raise UnsupportedError(f"{phase.where}: {what}; store it as [heads, head_dim], or as [head_dim]")


def _check_dtype(node: Node) -> None:
    if node.kind == "given" and not node.is_scalar:
        what = f"{node.op[0].name} makes {node.dtype}{list(node.shape)}, known before the kernel starts"
        raise UnsupportedError(f"{node.where}: {what}; a kernel is handed numbers: make one of it, or look a row up with mk.embed")
    allowed = LEAF_DTYPES if node.kind == "param" else DTYPES
    if node.dtype not in allowed:
        what = f"the leaf {node.op.path} is " if node.kind == "param" else ""
        raise UnsupportedError(f"{node.where}: {what}{node.dtype}{list(node.shape)}; a kernel takes {', '.join(allowed)} there: convert it")
    if node.kind == "reduce" and node.dtype != "float32":
        raise UnsupportedError(f"{node.where}: {node.op} of {node.dtype}; reductions are of float32: convert with astype(jnp.float32)")
