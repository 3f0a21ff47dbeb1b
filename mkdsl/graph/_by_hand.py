"""Rotations of heads that are written by hand, such as `x * cos + rotate_half(x) * sin`, found for what they are: `rope` nodes with a table.

Whatever slices, reorders and joins features of heads [heads, head_dim], multiplies them with what is known before the kernel starts and adds
them up is followed as a `Piece`: a linear function of one value, the same for each head. Where something else uses it, it becomes a rotation if
each feature is made of itself and of its partner in pairs that a kernel has; if not, it is refused as its first equation would be. The table comes
of the same equations, applied to ones and zeros in place of the heads.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mkdsl.graph._types import UnsupportedError
from mkdsl.ops import Rope

if TYPE_CHECKING:
    from mkdsl.graph._trace import Tracer

STARTS = frozenset(("slice", "split", "concatenate", "stack", "rev"))
MOVES = STARTS | {"reshape", "squeeze", "broadcast_in_dim"}
SUMS = frozenset(("add", "sub", "add_any", "neg"))


class ByHand(Rope):
    """A rotation whose table is an input, [2, head_dim]: by what each feature and its partner are multiplied."""

    def by_halves(self, head_dim: int) -> bool:
        return False

    def rotation(self, pos: jax.Array, head_dim: int) -> jax.Array:
        return pos


@dataclasses.dataclass(frozen=True)
class Piece:
    """Features [heads, ..] of the node `of`, moved and scaled. eqn: what makes it, its output `which` of the inputs, where pieces are negative
    numbers; None of the node itself. refusal: what is wrong with its first equation that moves features, if this is no rotation."""

    of: int
    shape: tuple[int, ...]
    eqn: Any = None
    inputs: tuple[int, ...] = ()
    which: int = 0
    where: str = ""
    refusal: str = ""


@dataclasses.dataclass
class Pieces:
    """Pieces of a trace, as numbers -1, -2 and so on, beside its nodes."""

    tracer: "Tracer"
    found: list[Piece] = dataclasses.field(default_factory=list)
    rotations: dict[int, int] = dataclasses.field(default_factory=dict)

    def follow(self, eqn: Any, inputs: list[int], where: str) -> list[int] | None:
        """The pieces that an equation makes; None if it makes none."""
        moving = [self._piece(eqn.primitive.name, i, inputs) for i in inputs]
        pieces = [self.found[-p - 1] for p in moving if p is not None]
        if len({p.of for p in pieces}) != 1 or not self._is_linear(eqn, inputs, moving):
            return None
        heads = pieces[0].shape[:1]
        if any(v.aval.shape[:1] != heads or v.aval.dtype != jnp.float32 for v in eqn.outvars):
            return None
        refusal = next((p.refusal for p in pieces if p.refusal), "")
        if not refusal and eqn.primitive.name in STARTS:
            refusal = self.tracer.refusal(eqn, where)
        ids = tuple(i if p is None else p for i, p in zip(inputs, moving, strict=True))
        return [self._add(Piece(pieces[0].of, v.aval.shape, eqn, ids, n, where, refusal)) for n, v in enumerate(eqn.outvars)]

    def settled(self, id: int) -> int:
        """A node; the rotation that a piece is.

        Raises:
          UnsupportedError: it is none.
        """
        if id >= 0:
            return id
        if id not in self.rotations:
            self.rotations[id] = self._rotation(id)
        return self.rotations[id]

    def _add(self, piece: Piece) -> int:
        self.found.append(piece)
        return -len(self.found)

    def _piece(self, name: str, id: int, inputs: list[int]) -> int | None:
        """An input as a piece, also if it is heads of which the equation would make the first one; None if it is something else."""
        if id < 0:
            return id
        node = self.tracer.node(id)
        of = self.tracer.node(node.inputs[0]) if node.kind == "reshape" and len(node.shape) == 3 else node
        if node.kind in ("literal", "param", "cache") or id in self.tracer.known:
            return None
        if len(of.shape) != 2 or of.shape[0] != node.shape[0] or of.shape[1] % 2:
            return None
        begun = any(i < 0 for i in inputs) or name in STARTS or (name == "mul" and any(self._is_known_vector(i) for i in inputs))
        return self._add(Piece(of.id, node.shape)) if begun else None

    def _is_known_vector(self, id: int) -> bool:
        node = self.tracer.node(id)
        while node.kind in ("broadcast", "reshape"):
            node = self.tracer.node(node.inputs[0])
        return node.id in self.tracer.known and not node.is_scalar

    def _is_linear(self, eqn: Any, inputs: list[int], moving: list[int | None]) -> bool:
        """Whether an equation is linear in its pieces and does to each head the same."""
        name, params = eqn.primitive.name, eqn.params
        if name in MOVES:
            axes = params.get("dimensions", ()) if name in ("rev", "squeeze") else (params.get("axis", params.get("dimension", 1)),)
            same = name != "broadcast_in_dim" or eqn.invars[0].aval.size == eqn.outvars[0].aval.size
            return None not in moving and 0 not in axes and same
        if name in SUMS:
            return None not in moving
        factors = [i for i, p in zip(inputs, moving, strict=True) if p is None]
        return name == "mul" and len(factors) == 1 and self._is_the_same_for_heads(factors[0])

    def _is_the_same_for_heads(self, id: int) -> bool:
        node = self.tracer.node(id)
        if node.kind == "literal":
            return np.ndim(node.op) == 0 or bool((node.op == node.op[:1]).all())
        if id not in self.tracer.known or node.is_scalar or node.shape[0] == 1:
            return id in self.tracer.known
        if node.kind == "map":
            return all(map(self._is_the_same_for_heads, node.inputs))
        before = self.tracer.node(node.inputs[0])
        if node.kind == "broadcast":
            return before.is_scalar or (before.shape[-1] == node.shape[-1] and before.width == node.shape[-1])
        repeats = node.kind == "given" and node.op[0].name == "broadcast_in_dim"
        return repeats and (before.is_scalar or before.shape[0] == 1 or 0 not in node.op[1]["broadcast_dimensions"])

    def _rotation(self, id: int) -> int:
        piece, tracer = self.found[-id - 1], self.tracer
        x = tracer.node(piece.of)
        op = self._pairs(id) if piece.shape == x.shape else None
        if op is None:
            raise UnsupportedError(piece.refusal)
        second = partners(x.shape[1], op.dims, op.interleaved) < np.arange(x.shape[1])
        of_first, of_second = (self._applied(id, np.broadcast_to(np.float32(ones), x.shape)) for ones in (~second, second))

        def table(of_first: jax.Array, of_second: jax.Array) -> jax.Array:
            own, other = jnp.where(second, of_second[0], of_first[0]), jnp.where(second, of_first[0], of_second[0])
            return jnp.stack([own, other])

        heads = jax.ShapeDtypeStruct(x.shape, jnp.float32)
        closed = jax.make_jaxpr(table)(heads, heads)
        (made,) = tracer.call(closed.jaxpr, closed.consts, [of_first, of_second])
        known = tracer.add("given", jax.ShapeDtypeStruct((2, x.shape[1]), jnp.float32), (made,), (lax.copy_p, {}))  # also if it is constant
        return tracer.add("rope", heads, (x.id, known), op, piece.where)

    def _pairs(self, id: int) -> ByHand | None:
        """The pairs of features in which a piece is a rotation, as few as may be."""
        x = self.tracer.node(self.found[-id - 1].of)
        made_of = self._made_of(id, x.shape)
        at = np.arange(x.shape[1])
        for dims in range(2, x.shape[1] + 1, 2):
            for interleaved in (False, True):
                allowed = (at[:, None] == at) | (at[:, None] == partners(len(at), dims, interleaved))
                if not (made_of & ~allowed).any():
                    return ByHand(0.0, None, dims, interleaved)
        return None

    def _made_of(self, id: int, shape: tuple[int, ...]) -> np.ndarray:
        """[head_dim, head_dim]: whether the second is made of the first, which a NaN shows whatever it is multiplied with."""

        def equation(piece: Piece, inputs: list[Any]) -> Any:
            avals = [v.aval for v in piece.eqn.invars]
            arrays = [jnp.ones(v.shape, v.dtype) if isinstance(i, int) else i for i, v in zip(inputs, avals, strict=True)]
            out = piece.eqn.primitive.bind(*arrays, **piece.eqn.params)
            return out[piece.which] if piece.eqn.primitive.multiple_results else out

        def made(x: jax.Array) -> jax.Array:
            return self._replayed(id, x.reshape, equation)

        with jax.ensure_compile_time_eval():
            probes = jnp.where(jnp.eye(shape[1], dtype=bool)[:, None], jnp.nan, jnp.zeros(shape, jnp.float32))
            return np.isnan(jax.jit(jax.vmap(made))(probes))[:, 0]

    def _applied(self, id: int, heads: np.ndarray) -> int:
        """The node of what a piece is where its heads are these."""

        def source(shape: tuple[int, ...]) -> int:
            return self.tracer.constant(jax.ShapeDtypeStruct(shape, jnp.float32), heads.reshape(shape))

        return self._replayed(id, source, lambda piece, inputs: self.tracer.equation(piece.eqn, inputs, piece.where)[piece.which])

    def _replayed(self, id: int, source: Callable[[tuple[int, ...]], Any], equation: Callable[[Piece, list[Any]], Any]) -> Any:
        """A piece by its equations, of what stands for its heads; nodes are handed to `equation` as the numbers that they are."""

        @functools.cache
        def value(id: int) -> Any:
            piece = self.found[-id - 1]
            return source(piece.shape) if piece.eqn is None else equation(piece, [value(i) if i < 0 else i for i in piece.inputs])

        return value(id)


def partners(head_dim: int, dims: int, interleaved: bool) -> np.ndarray:
    """[head_dim]: the feature with which each is paired, itself if it passes (`Rope`)."""
    at, half = np.arange(head_dim), dims // 2
    return np.where(at < dims, at ^ 1 if interleaved else np.where(at < half, at + half, at - half), at)
