"""What a decode step means: its jaxpr, evaluated in numpy. It takes no compiler, and in real numbers no rounding decides a comparison."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from grammar.arithmetic import PRIMITIVES, REDUCTIONS, Arithmetic, Array
from mkdsl.ops import LINEAR, Append, Argmax, Attention, Embed, Fold, Rope


class Plain:
    """Evaluates jaxprs."""

    def __init__(self, arithmetic: Arithmetic) -> None:
        self.arithmetic = arithmetic

    def closed(self, closed: Any, args: Sequence[Array]) -> list[Array]:
        """The outputs of a closed jaxpr."""
        return self.run(closed.jaxpr, closed.consts, args)

    def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Array]) -> list[Array]:
        env = {v: self._held(c, v.aval) for v, c in zip(jaxpr.constvars, consts, strict=True)}
        env |= zip(jaxpr.invars, args, strict=True)

        def read(atom: Any) -> Array:
            return self._held(atom.val, atom.aval) if isinstance(atom, Literal) else env[atom]

        for eqn in jaxpr.eqns:
            env.update(zip(eqn.outvars, self._equation(eqn, [read(a) for a in eqn.invars]), strict=True))
        return [read(a) for a in jaxpr.outvars]

    def _held(self, value: Any, aval: Any) -> Array:
        return self.arithmetic.hold(np.asarray(value), str(aval.dtype))

    def _equation(self, eqn: Any, args: list[Array]) -> list[Array]:
        return self.primitive(eqn.primitive.name, eqn.params, args, eqn.outvars[0].aval) if eqn.outvars else []

    def primitive(self, name: str, params: dict[str, Any], args: list[Array], out: Any) -> list[Array]:
        """All results of a primitive; `out` says shape and dtype of the first."""
        if name == "mkdsl":
            return [self._operator(params["op"], args)]
        if name == "scan":
            return self._scan(params, args)
        if name == "cond":
            return self.closed(params["branches"][int(np.clip(args[0], 0, len(params["branches"]) - 1))], args[1:])
        if called := [params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in params]:
            return self.run(getattr(called[0], "jaxpr", called[0]), getattr(called[0], "consts", ()), args)
        if name == "optimization_barrier":
            return args
        if name == "split":
            return np.split(args[0], np.cumsum(params["sizes"])[:-1].tolist(), params["axis"])
        if name in PRIMITIVES:
            return [self.arithmetic.apply(name, params, args, str(out.dtype))]
        return [self.arithmetic.hold(self._shaped(name, params, args, out.shape), str(out.dtype))]

    def _shaped(self, name: str, params: dict[str, Any], args: list[Array], shape: Sequence[int]) -> Array:
        if name in REDUCTIONS:
            return REDUCTIONS[name](args[0], axis=tuple(params["axes"]))
        if name in ("reshape", "squeeze", "expand_dims"):
            return args[0].reshape(shape)
        if name == "broadcast_in_dim":
            ones = [1] * len(shape)
            for axis, size in zip(params["broadcast_dimensions"], args[0].shape, strict=True):
                ones[axis] = size
            return np.broadcast_to(args[0].reshape(ones), shape)
        if name == "iota":
            return np.indices(shape)[params["dimension"]]
        if name == "concatenate":
            return np.concatenate(args, params["dimension"])
        if name == "dynamic_slice":
            starts = [int(np.clip(a, 0, n - m)) for a, n, m in zip(args[1:], args[0].shape, shape, strict=True)]
            return args[0][tuple(slice(a, a + m) for a, m in zip(starts, shape, strict=True))]
        if name == "slice":
            bounds = zip(params["start_indices"], params["limit_indices"], params["strides"] or [1] * len(shape), strict=True)
            return args[0][tuple(slice(*b) for b in bounds)]
        if name == "dot_general":
            return args[0] @ args[1]  # of a tile and a vector, as mk.dot has it
        raise NotImplementedError(f"{name} of {[np.shape(a) for a in args]}")

    def _scan(self, params: dict[str, Any], args: list[Array]) -> list[Array]:
        n_consts, n_carry = (len(part) for part in params["ft_in"].unpack()[:2])
        consts, carry, stacked = args[:n_consts], args[n_consts : n_consts + n_carry], args[n_consts + n_carry :]
        inner = params["jaxpr"]
        jaxpr, held = (inner.jaxpr, inner.consts) if isinstance(inner, ClosedJaxpr) else (inner, ())
        ys = []
        for i in range(params["length"]):
            outs = self.run(jaxpr, held, [*consts, *carry, *(x[i] for x in stacked)])
            carry, y = outs[:n_carry], outs[n_carry:]
            ys.append(y)
        return [*carry, *(np.stack(y) for y in zip(*ys, strict=True))]

    # Operators, told again; what they round is what tensor cores and the cache take.

    def _operator(self, op: Any, args: list[Array]) -> Array:
        match op:
            case Fold():
                weight, x = args[0], self.arithmetic.narrow(args[1])
                return weight @ x if op == LINEAR else self.fold(op, [(weight, x)])
            case Attention():
                return self._attention(op, *args)
            case Append():
                return _append(args[0], self.arithmetic.narrow(args[1]), args[2])
            case Rope():
                return rotated(op, *args)
            case Embed():
                return args[0][np.clip(args[1], 0, len(args[0]) - 1)]
            case Argmax():
                return np.asarray(np.argmax(args[0]), np.int32)
        raise NotImplementedError(op.name)

    def _attention(self, op: Attention, q: Array, k: Array, v: Array, pos: Array) -> Array:
        kv_heads, context, head_dim = k.shape
        if not 0 <= pos < context:
            return np.full(q.size, np.nan)
        keep = attended(op, context, pos)
        out = []
        for queries, keys, values in zip(self.arithmetic.narrow(q).reshape(kv_heads, -1, head_dim), k, v, strict=True):
            scores = scored(op, queries @ keys[keep].T)
            p = np.exp(scores - scores.max(1, keepdims=True))
            out.append(self.arithmetic.narrow(p) @ values[keep] / p.sum(1, keepdims=True))
        return np.concatenate(out).reshape(-1)

    def fold(self, op: Fold, pieces: Sequence[tuple[Array, Array]]) -> Array:
        """A user's fold over pieces (tile, resident's piece) of the streamed axis, from its first to its last."""
        rows = len(pieces[0][0])
        carry: list[Array] = [np.full(rows, v, self.arithmetic.floating) for v in op.init]
        for tile, x in pieces:
            carry = self.closed(_stepped(op, rows, len(x)), [*carry, tile, x])
        return self.closed(_finished(op, rows), carry)[0]


def _pack(carry: Sequence[Any]) -> Any:
    return carry[0] if len(carry) == 1 else tuple(carry)


@functools.cache
def _stepped(op: Fold, rows: int, k: int) -> Any:
    """The step's jaxpr, of a bfloat16 tile."""
    shapes = [*((jax.ShapeDtypeStruct((rows,), "float32"),) * len(op.init)), jax.ShapeDtypeStruct((rows, k), "bfloat16")]
    return jax.make_jaxpr(lambda *a: op.step(_pack(a[:-2]), a[-2], a[-1]))(*shapes, jax.ShapeDtypeStruct((k,), "float32"))


@functools.cache
def _finished(op: Fold, rows: int) -> Any:
    return jax.make_jaxpr(lambda *a: op.finish(_pack(a)))(*((jax.ShapeDtypeStruct((rows,), "float32"),) * len(op.init)))


def rotated(op: Rope, x: Array, pos: Array) -> Array:
    """x [heads, head_dim] rotated by a position."""
    angle = pos.astype(x.dtype) * op.frequencies(pos + 1).astype(x.dtype)
    first, step = np.arange(op.dims // 2), 1 if op.interleaved else op.dims // 2
    first = 2 * first if op.interleaved else first
    lo, hi, out = x[:, first], x[:, first + step], x.copy()
    out[:, first], out[:, first + step] = lo * np.cos(angle) - hi * np.sin(angle), hi * np.cos(angle) + lo * np.sin(angle)
    return out


def attended(op: Attention, context: int, pos: Array) -> Array:
    """[context]: which positions of the cache a query at `pos` attends to."""
    at = np.arange(context)
    return at <= pos if op.window is None else (at <= pos) & (at > pos - op.window)


def scored(op: Attention, s: Array) -> Array:
    """Dot products as scores."""
    s = s * op.scale
    return s if op.softcap is None else op.softcap * np.tanh(s / op.softcap)


def _append(cache: Array, new: Array, pos: Array) -> Array:
    if not 0 <= pos < cache.shape[1]:
        return cache
    out = cache.copy()
    out[:, pos] = new
    return out
