"""jaxpr -> values. Calls are inlined, `lax.scan` over layers becomes a segment, and everything else must be a known primitive."""

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src import source_info_util
from jax.extend.core import ClosedJaxpr, Literal
from jax.interpreters.partial_eval import dce_jaxpr

from mkdsl.graph import _networkx as nx
from mkdsl.graph._by_hand import Pieces
from mkdsl.graph._elementwise import IDENTITIES, KNOWN, composed
from mkdsl.graph._rows import as_number, drop_spare, slices
from mkdsl.graph._types import Leaf, Node, UnsupportedError
from mkdsl.ops import Append, AppendToPage, Argmax, Attention, Embed, Fold, Operator, Rope, operator_p

REDUCTIONS = frozenset(("reduce_sum", "reduce_max", "reduce_min"))
SOURCES = frozenset(("token", "pos", "given"))
ROWWISE = frozenset(("map", "broadcast", "reshape"))
PURE = ROWWISE | {"reduce"}
CALLS = frozenset(("jit", "custom_jvp_call", "custom_vjp_call", "remat2"))  # remat2 is jax.checkpoint
KINDS: dict[type[Operator], str] = {
    Fold: "fold", Attention: "attention", Append: "append", AppendToPage: "append", Rope: "rope", Embed: "embed", Argmax: "argmax",
}  # fmt: skip
SLICE = (
    "a slice takes neighbouring rows of a projection, of its heads or, in the layer that uses it, of a weight; take other features with mk.linear "
    "and rows of an identity in params"
)
REMEDIES = {
    "dot_general": "multiply by weights with mk.linear, or stream them with mk.fold",
    "scan": "write layers with mk.layers: one activation carried, weights and cache scanned",
    "while": "a decode step has no run-time control flow; use mk.layers for layers",
    "cond": "a decode step has no run-time control flow; blend with jnp.where",
    "gather": "look rows up with mk.embed; stack per-layer weights and use mk.layers",
    "dynamic_slice": "stack per-layer weights on a leading axis and use mk.layers",
    "concatenate": "project with separate weights and keep the parts apart",
    "slice": SLICE,
    "split": SLICE,
    "cum": "a running sum is mk.linear with a triangular matrix of ones in params; others are an mk.fold of such a matrix",
    "sort": "sample outside the decode step, from its logits",
    "top_k": "sample outside the decode step, from its logits",
    "argmax": "use mk.argmax, on the logits",
    "argmin": "use mk.argmax of the negative, on the logits",
    "rev": "no reordering of features; store the weights in the order that is needed",
    "transpose": "store the weights transposed",
    "stack": "keep the parts apart; jnp.select is jnp.where inside jnp.where",
    "random": "draw random numbers outside the decode step, and pass them as params or sample from its logits",
    "threefry2x32": "draw random numbers outside the decode step, and pass them as params or sample from its logits",
    "callback": "print and call back outside the decode step",
    "debug": "print and call back outside the decode step",
}


def callee(eqn: Any) -> tuple[Any, Sequence[Any]] | None:
    """(jaxpr, constants) of an equation that does nothing but call another jaxpr, such as jax.jit or jax.checkpoint; None of any other."""
    if eqn.primitive.name not in CALLS:
        return None
    inner = next(eqn.params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in eqn.params)
    return getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())


class Tracer:
    """Collects nodes while it walks a jaxpr."""

    def __init__(self) -> None:
        self.dag = nx.DiGraph()
        self.where = ""  # of the decode step, and of the call being inlined
        self.repeats: list[int] = [1]
        self.carries: list[tuple[int, int, int]] = []  # (carry node, initial node, final node)
        self.replaced: dict[int, int] = {}  # by rewrites: node -> the node that stands for its value now
        self.known: set[int] = set()  # what is known before the kernel starts
        self.pieces = Pieces(self)  # of rotations, as negative numbers where nodes are expected
        self.features: set[int] = set()  # vectors of one feature, of a weight of one row; a number of each token is none
        self.rows: dict[tuple[int, int, int], int | None] = {}  # of (node, first, count): the node of so many of its rows
        self.spare: set[int] = set()  # nodes that may have no users, as these use others
        self.ids = itertools.count()

    @property
    def segment(self) -> int:
        return len(self.repeats) - 1

    def add(self, kind: str, aval: Any, inputs: Sequence[int] = (), op: Any = None, where: str = "", segment: int | None = None) -> int:
        id = next(self.ids)
        segment = self.segment if segment is None else segment
        node = Node(id, kind, tuple(aval.shape), str(aval.dtype), tuple(inputs), op, where or self.where, segment)
        self.dag.add_node(id, node=node)
        self.dag.add_edges_from((i, id) for i in inputs)
        if kind in SOURCES or _is_number(node) or (kind in PURE and self.are_known(inputs)):
            self.known.add(id)
        if node.is_scalar and (kind == "fold" or (kind in ROWWISE and not self.features.isdisjoint(inputs))):
            self.features.add(id)
        return id

    def are_known(self, ids: Sequence[int]) -> bool:
        """Whether these are known before the kernel starts, or constants, but not constants alone."""
        return any(i in self.known for i in ids) and all(i in self.known or self.node(i).kind == "literal" for i in ids)

    def constant(self, aval: Any, value: Any) -> int:
        return self.add("literal", aval, op=np.asarray(value, aval.dtype) if _is_numeric(aval) else value)

    def node(self, id: int) -> Node:
        return self.dag.nodes[id]["node"]

    def walk(self, jaxpr: Any, env: dict[Any, int]) -> list[int]:
        """Adds every equation; returns the nodes of the outputs."""

        def read(atom: Any) -> int:
            return self.constant(atom.aval, atom.val) if isinstance(atom, Literal) else env[atom]

        for eqn in jaxpr.eqns:
            where = source_info_util.summarize(eqn.source_info) or self.where  # JAX's own functions carry no user's line
            outs = self.equation(eqn, [read(a) for a in eqn.invars], where)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(a) for a in jaxpr.outvars]

    def equation(self, eqn: Any, inputs: list[int], where: str) -> list[int]:
        name, params = eqn.primitive.name, eqn.params
        if inner := callee(eqn):
            outer, self.where = self.where, where
            outs = self.call(*inner, inputs)
            self.where = outer
            return outs
        if name in IDENTITIES:
            return inputs
        if pieces := self.pieces.follow(eqn, inputs, where):
            return pieces
        inputs = [self.pieces.settled(i) for i in inputs]
        if folded := self.folded(eqn, inputs):
            return folded
        if eqn.primitive is operator_p:
            kind = KINDS.get(type(params["op"]))
            if kind is None:
                raise UnsupportedError(f"{where}: the operator {params['op'].name} has no lowering; build it with mk.fold")
            return [self.add(kind, v.aval, inputs, params["op"], where) for v in eqn.outvars]
        if closed := composed(name, params, [v.aval for v in eqn.invars]):
            return self.call(closed.jaxpr, closed.consts, inputs)
        simple = self.simple(eqn, inputs, where)
        if simple is not None:
            return [simple]
        if self.is_given(eqn, inputs):
            which = [(i,) for i in range(len(eqn.outvars))] if eqn.primitive.multiple_results else [()]
            return [self.add("given", v.aval, inputs, (eqn.primitive, params, *w), where) for v, w in zip(eqn.outvars, which, strict=True)]
        if found := slices(self, eqn, inputs):
            return found
        if name == "scan":
            return self.scan(eqn, inputs, where)
        raise UnsupportedError(self.refusal(eqn, where))

    def refusal(self, eqn: Any, where: str) -> str:
        """What is wrong with an equation that no tile has a form of, and what to write instead."""
        name = eqn.primitive.name
        shapes = ", ".join(f"{v.aval.dtype}{list(v.aval.shape)}" for v in eqn.invars)
        makes = ", ".join(str(list(v.aval.shape)) for v in eqn.outvars)
        return f"{where}: {name}({shapes}) -> {makes} has no tile lowering; {_remedy(name)}"

    def is_given(self, eqn: Any, inputs: list[int]) -> bool:
        """Whether an equation is of what is known before the kernel starts, so that XLA may compute it whatever it is. Numbers may come out of
        leaves of params too, as in params["scale"][pos]."""
        known = self.are_known([i for i in inputs if not self._is_leaf(i)] if all(v.aval.size == 1 for v in eqn.outvars) else inputs)
        return bool(eqn.outvars) and all(_is_numeric(v.aval) for v in eqn.outvars) and not eqn.effects and known

    def _is_leaf(self, id: int) -> bool:
        return self.node(id).kind == "param" and not self.node(id).op.stacked

    def folded(self, eqn: Any, inputs: list[int]) -> list[int]:
        """The constants that an equation computes from constants alone; nothing of any other."""
        nodes = [self.node(i) for i in inputs]
        several = eqn.primitive.multiple_results
        computable = (not several or eqn.primitive is lax.split_p) and all(_is_numeric(v.aval) for v in (*eqn.invars, *eqn.outvars))
        if not computable or any(n.kind != "literal" for n in nodes):
            return []
        with jax.ensure_compile_time_eval():
            constants = (jnp.broadcast_to(jnp.asarray(n.op, n.dtype), n.shape) for n in nodes)
            found = eqn.primitive.bind(*constants, **eqn.params)
        values = list(map(np.asarray, found if several else [found]))
        same = [value.size == 1 or (value.size and _are_all_the_same(value)) for value in values]
        return [self.constant(v.aval, value.flat[0] if s else value) for v, value, s in zip(eqn.outvars, values, same, strict=True)]

    def call(self, jaxpr: Any, consts: Sequence[Any], inputs: list[int]) -> list[int]:
        env = dict(zip(jaxpr.invars, inputs, strict=True))
        env |= {v: self.constant(v.aval, c) for v, c in zip(jaxpr.constvars, consts, strict=True)}
        return self.walk(jaxpr, env)

    def simple(self, eqn: Any, inputs: list[int], where: str) -> int | None:
        """The node of an equation that a tile has a form of; None if it has none."""
        name, params, outs = eqn.primitive.name, eqn.params, [v.aval for v in eqn.outvars]
        if not inputs or len(outs) != 1:
            return None
        (out,), first = outs, self.node(inputs[0])
        if name == "convert_element_type" and first.dtype == str(out.dtype) and first.shape == tuple(out.shape):
            return inputs[0]
        spreads = name == "broadcast_in_dim" and _is_feature_broadcast(first.shape, out.shape, params["broadcast_dimensions"])
        if name in KNOWN or spreads or not out.shape:
            inputs = [as_number(self, self.node(i), out, where) for i in inputs]
        if name in KNOWN:
            return self.add("map", out, inputs, (eqn.primitive, params), where)
        if name in REDUCTIONS and tuple(params["axes"]) == (len(first.shape) - 1,):
            return self.add("reduce", out, inputs, name, where)
        if name in ("reshape", "squeeze", "expand_dims", "broadcast_in_dim"):
            if first.kind == "reshape" and self.node(first.inputs[0]).shape == tuple(out.shape):  # there and back
                self.spare.add(first.id)
                return first.inputs[0]
            if first.width == out.size:
                return self.add("reshape", out, inputs, None, where)
            if spreads:
                return self.add("broadcast", out, inputs, None, where)
        return None

    def scan(self, eqn: Any, inputs: list[int], where: str) -> list[int]:
        """Layers: consts and one iteration's slices in, carries become a segment of their own."""
        params = eqn.params
        n_consts, n_carry = (len(part) for part in params["ft_in"].unpack()[:2])
        if self.segment % 2 or params["reverse"]:  # segments are straight code and loops by turns
            raise UnsupportedError(f"{where}: a scan inside a scan (or a reversed one); {REMEDIES['scan']}")
        if not params["length"]:
            raise UnsupportedError(f"{where}: a scan of no steps; leave it out")
        inner = params["jaxpr"]
        jaxpr = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
        consts, init, xs = inputs[:n_consts], inputs[n_consts : n_consts + n_carry], inputs[n_consts + n_carry :]
        self.repeats.append(params["length"])
        body = list(consts)
        body += [self.carry(v.aval, where) for v in jaxpr.invars[n_consts : n_consts + n_carry]]
        body += [self.slice_of(x, v.aval, where) for x, v in zip(xs, jaxpr.invars[n_consts + n_carry :], strict=True)]
        outs = list(map(self.pieces.settled, self.walk(jaxpr, dict(zip(jaxpr.invars, body, strict=True)))))
        carries = body[n_consts : n_consts + n_carry]
        self.carries += list(zip(carries, init, outs[:n_carry], strict=True))
        for i, out in enumerate(outs[n_carry:]):
            if self.node(out).kind != "append":
                raise UnsupportedError(f"{where}: output {i} of the layers is no cache; layers return (x, kv) with kv from mk.append")
        self.repeats.append(1)
        return [self.add("carried", self.node(c), (c,), where=where) for c in carries] + outs[n_carry:]

    def carry(self, aval: Any, where: str) -> int:
        if aval.ndim != 1 or str(aval.dtype) != "float32":
            raise UnsupportedError(f"{where}: the layers carry {aval.dtype}{list(aval.shape)}; they carry float32 [features] activations")
        return self.add("carry", aval, where=where)

    def slice_of(self, stacked: int, aval: Any, where: str) -> int:
        node = self.node(stacked)
        if node.kind not in ("param", "cache") or node.op.rows is not None:
            raise UnsupportedError(f"{where}: the layers scan over a computed {node.kind}; scan over params and kv as they came in")
        leaf: Leaf = node.op
        return self.add(node.kind, aval, op=Leaf(leaf.path, leaf.index, True), where=where)


def _are_all_the_same(value: np.ndarray) -> bool:
    """Whether an array repeats one number, which may be NaN."""
    first = value.flat[0]
    return bool(((value == first) | ((value != value) & (first != first))).all())


def _is_number(node: Node) -> bool:
    """A parameter that is one number, the same for all layers."""
    return node.kind == "param" and not node.op.stacked and node.is_scalar


def _is_numeric(aval: Any) -> bool:
    """Whether an array holds numbers: random keys are none."""
    return not jnp.issubdtype(aval.dtype, jax.dtypes.extended)


def _remedy(name: str) -> str:
    """What to write instead of a primitive; families of them (random_bits, cummax, debug_callback) share a remedy."""
    family = next((known for known in REMEDIES if name.startswith(known) or name.endswith(known)), None)
    return REMEDIES.get(name) or REMEDIES.get(family or "", "use elementwise jnp, sums over the last axis, or an mk operator")


def _is_feature_broadcast(shape: Sequence[int], out: Sequence[int], dims: Sequence[int]) -> bool:
    """One number per token (or per head) spread over features, or a [head_dim] weight over heads."""
    ones = all(d == 1 for d in shape)
    return ones or (len(out) == 2 and tuple(dims)[-1] == 1 and len(dims) == 1) or (len(out) == 2 and len(shape) == 2 and 1 in shape)


def trace(f: Callable[..., Any], params: Any, kv: Any, token: Any, pos: Any) -> tuple[Tracer, list[int], Any]:
    """Traces one token's decode step from ShapeDtypeStructs. Returns the values, the output nodes, and the outputs' tree."""
    closed, out_shape = jax.make_jaxpr(f, return_shape=True)(params, kv, token, pos)
    jaxpr, _ = dce_jaxpr(closed.jaxpr, True, instantiate=True)  # what nobody uses is not computed
    tracer = Tracer()
    tracer.where = _place(f)
    ids = []
    for kind, tree in (("param", params), ("cache", kv)):
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        ids += [tracer.add(kind, leaf, op=Leaf(_name(path), i, False)) for i, (path, leaf) in enumerate(leaves)]
    ids += [tracer.add("token", token), tracer.add("pos", pos)]
    env = dict(zip(jaxpr.invars, ids, strict=True))
    env |= {v: tracer.constant(v.aval, c) for v, c in zip(jaxpr.constvars, closed.consts, strict=True)}
    outputs = list(map(tracer.pieces.settled, tracer.walk(jaxpr, env)))
    drop_spare(tracer, outputs)
    return tracer, outputs, jax.tree.structure(out_shape)


def _place(f: Callable[..., Any]) -> str:
    """Where a function is written, as JAX says of an equation's line; nothing of what has no code of its own."""
    f = inspect.unwrap(f)
    while isinstance(f, functools.partial):
        f = inspect.unwrap(f.func)
    code = getattr(f, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}:1 ({f.__qualname__})" if code else ""


def _name(path: Any) -> str:
    return ".".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)
