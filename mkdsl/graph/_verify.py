"""`verify_graph`: what must hold of an `OpGraph` before a schedule is searched for it."""

from collections.abc import Sequence

from mkdsl.graph._computable import check_code
from mkdsl.graph._phases import AttentionPhase, FoldPhase
from mkdsl.graph._types import Node, OpGraph, UnsupportedError

MMA_K = 16  # elements of the streamed axis that one mma takes
HEAD_DIMS = 64, 256  # the least and the most: of rows of an mma, and of registers for its sums
POSITIONS = 8  # of a cache in one block of shared memory
PAGE = 64  # positions: scores are computed for so many at a time


def verify_graph(graph: OpGraph) -> None:
    """Checks that every tensor is written before it is read, once, and that every shape has a tile lowering.

    Raises:
      UnsupportedError: a shape or dtype that no tile fits, with the numbers.
      ValueError: the graph is inconsistent (a fault of the compiler, not of the user).
    """
    if not graph.phases:
        raise UnsupportedError(f"{graph.where}: the decode step returns nothing that a kernel computes; run it with jax.jit")
    written: dict[str, str] = {}
    for segment in graph.segments:
        for phase in map(graph.phase, segment.phases):
            for name in (*phase.reads, *phase.row_reads):
                if name not in written:
                    raise ValueError(f"{phase.name} reads {name}, which nothing before it writes")
            for name in phase.writes:
                if name in written and not graph.tensors[name].carried:
                    raise ValueError(f"{name} is written by {written[name]} and by {phase.name}")
                written[name] = phase.name
            if isinstance(phase, FoldPhase):
                _check_fold(graph, phase)
            if isinstance(phase, AttentionPhase):
                _check_attention(graph, phase)
            check_code(graph, phase)
    if missing := set(graph.tensors) - set(written):
        raise ValueError(f"nothing writes {sorted(missing)}")
    for id in graph.outputs:
        _check_output(graph, id)
    _check_appends(graph)
    for id in graph.dag:
        _check_address(graph, id)


INTEGERS = ("int32", "uint32")  # which a float32 does not hold


def _check_output(graph: OpGraph, id: int) -> None:
    node = graph.node(id)
    if node.kind in ("append", "cache", "token", "pos", "literal", "given") or (id in graph.output_of and node.dtype not in INTEGERS):
        return
    if node.kind not in ("argmax", "map") or id in graph.output_of:
        what = f"{node.dtype}{list(node.shape)} ({node.kind})"
        raise UnsupportedError(
            f"{node.where}: the decode step returns {what}; it returns float32 [features], mk.argmax of one, and the cache"
        )
    for i in node.inputs:
        _check_output(graph, i)


def _check_appends(graph: OpGraph) -> None:
    """Attention is what writes the cache in a kernel."""
    nodes = [graph.node(id) for id in graph.dag]
    attended = {i for n in nodes if n.kind == "attention" for i in n.inputs}
    for node in (n for n in nodes if n.kind == "append"):
        if node.id not in attended:
            raise UnsupportedError(
                f"{node.where}: mk.append without an mk.attention over the result that the outputs depend on; "
                "a kernel writes the cache as it attends"
            )
    _check_in_place(graph, nodes)


def _check_in_place(graph: OpGraph, nodes: Sequence[Node]) -> None:
    """A kernel writes the cache in place: once, and keys and values at one position."""
    written: dict[int, Node] = {}
    for node in (n for n in nodes if n.kind == "append" and graph.node(n.inputs[0]).kind == "cache"):
        cache = graph.node(node.inputs[0]).op
        if cache.index in written:
            raise UnsupportedError(
                f"{node.where}: the cache {cache.path} is appended to a second time, after {written[cache.index].where}; a kernel writes it in "
                "place: append once and attend as often as you like, or give each a cache of its own"
            )
        written[cache.index] = node
    for node in (n for n in nodes if n.kind == "attention"):
        keys, values = (graph.node(graph.node(i).inputs[2]) for i in node.inputs[1:3])
        if _place(keys) != _place(values):
            raise UnsupportedError(
                f"{node.where}: keys and values were appended at different positions; attend over what one mk.append returned"
            )


def _place(at: Node) -> tuple[str, int]:
    """What tells a position from another one: constants are nodes of their own wherever they stand."""
    return at.kind, int(at.op) if at.kind == "literal" else at.id


ADDRESSES = {"append": (2,), "attention": (3,), "rope": (1,), "embed": (1,)}  # inputs that say where


def _check_address(graph: OpGraph, id: int) -> None:
    """An address is known before the kernel starts."""
    node = graph.node(id)
    for i in ADDRESSES.get(node.kind, ()):
        at = graph.node(node.inputs[i])
        if at.kind not in ("token", "pos", "given", "literal"):
            raise UnsupportedError(
                f"{node.where}: mk.{node.kind} at a computed {at.dtype}{list(at.shape)} ({at.kind}); an address is an int32 expression of the "
                "token, `pos`, constants and parameters that are numbers"
            )
    if node.kind == "embed" and not _is_table(graph.node(node.inputs[0])):
        raise UnsupportedError(f"{node.where}: mk.embed looks up rows of a leaf of params that is not stacked over layers, nor sliced")


def _is_table(node: Node) -> bool:
    return node.kind == "param" and not node.op.stacked and node.op.rows is None


def _check_fold(graph: OpGraph, phase: FoldPhase) -> None:
    if not phase.parallel and phase.k % MMA_K:
        raise UnsupportedError(
            f"{phase.where}: {phase.name} folds k={phase.k} elements of each row with a step of its own; such a k is a multiple of {MMA_K}"
        )
    for id in (f for folds, _ in graph.code[phase.name].parts for f in folds):
        weight = graph.node(graph.node(id).inputs[0])
        if weight.dtype != "bfloat16":
            raise UnsupportedError(
                f"{phase.where}: the weight {weight.op.path} is {weight.dtype}{list(weight.shape)}; kernels stream bfloat16: cast it once"
            )


def _check_attention(graph: OpGraph, phase: AttentionPhase) -> None:
    (low, high), whole = HEAD_DIMS, -(-phase.context // POSITIONS) * POSITIONS
    if phase.head_dim % MMA_K or not low <= phase.head_dim <= high:
        what = f"head_dim={phase.head_dim}; kernels have heads of {low} to {high} features, multiples of {MMA_K}"
        raise UnsupportedError(f"{phase.where}: {what}")
    if phase.context != whole:
        what = f"a cache of context={phase.context} positions; make it one of {whole}: copies take {POSITIONS} positions at a time"
        raise UnsupportedError(f"{phase.where}: {what}")
    caches = [graph.node(graph.node(i).inputs[0]) for i in graph.node(graph.code[phase.name].parts[0][0][0]).inputs[1:3]]
    if any(c.dtype != "bfloat16" for c in caches):
        raise UnsupportedError(f"{phase.where}: the cache is {caches[0].dtype}; kernels stream a bfloat16 cache")
    _check_pages(graph, phase)
    _check_heads(graph, phase)


def _check_pages(graph: OpGraph, phase: AttentionPhase) -> None:
    """Keys and values lie, and are appended, where one table says that came in with the cache."""
    attention = graph.node(graph.code[phase.name].parts[0][0][0])
    if phase.page is None:
        return
    if phase.page % PAGE:
        what = f"pages of size={phase.page}; kernels read pages of a multiple of {PAGE} positions"
        raise UnsupportedError(f"{phase.where}: {what}")
    tables = {attention.inputs[4], *(graph.node(append).inputs[3] for append in attention.inputs[1:3])}
    if len(tables) > 1 or any(graph.node(t).kind != "cache" or graph.node(t).op.stacked for t in tables):
        what = "a cache that is not read and appended to through one table, as it came in"
        raise UnsupportedError(f"{phase.where}: {what}; hand the decode step's own mk.Paged to mk.layers, mk.append and mk.attention")


def _check_heads(graph: OpGraph, phase: AttentionPhase) -> None:
    """Attention computes its inputs head by head: it knows no table's row, and no sum over more than a head."""
    stack = list(graph.code[phase.name].parts[0][1])
    while stack:
        node = graph.node(stack.pop())
        if node.id in graph.tensor_of:
            continue
        wide = node.kind == "reduce" and graph.node(node.inputs[0]).shape[-1] != phase.head_dim
        wide |= node.kind == "rope" and node.shape[-1] != phase.head_dim
        if wide or node.kind == "embed":
            raise UnsupportedError(
                f"{node.where}: {node.kind}{list(node.shape)} cannot be computed for attention's heads; apply it before the projection, or to each head"
            )
        stack += node.inputs
