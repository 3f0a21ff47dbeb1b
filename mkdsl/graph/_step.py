"""The step of a user's fold, equation by equation.

A step sees a tile [rows, width], a piece of the resident [width] and carries [rows]. Its values vary along rows, columns, both or neither: `axes`
says along which. What no tile has a form of is refused here, when the decode step is traced; the kernel's walker emits the same equations.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.extend.core import Literal

from mkdsl.graph._elementwise import DTYPES, IDENTITIES, KNOWN, composed
from mkdsl.graph._trace import REDUCTIONS, callee
from mkdsl.graph._types import Node, UnsupportedError

VIEWS = frozenset(("broadcast_in_dim", "reshape", "squeeze", "expand_dims"))
TRIED = 64, 128  # rows and columns of the tile that a step is tried on: unequal, so that they are not taken for each other
ALLOWED = "a step is elementwise jnp, mk.dot(tile, x), and sum, max or min over the tile's last axis"

type Axes = tuple[int, ...]  # of (rows, columns), those along which a value varies


class StepWalker[V]:
    """Walks a step's jaxpr. Subclasses say what a value is, and what becomes of each kind of equation."""

    def axes(self, value: V) -> Axes:
        raise NotImplementedError

    def constant(self, array: Any) -> V:
        raise NotImplementedError

    def view(self, eqn: Any, value: V) -> V:
        """The value in another shape: it spreads where an operation needs it."""
        raise NotImplementedError

    def reduced(self, name: str, tile: V) -> V:
        """A tile's sum, maximum or minimum over columns."""
        raise NotImplementedError

    def dot(self, tile: V, piece: V) -> V:
        raise NotImplementedError

    def mapped(self, eqn: Any, values: list[V]) -> V:
        """An elementwise primitive."""
        raise NotImplementedError

    def refuse(self, eqn: Any) -> V:
        """What becomes of any other equation."""
        raise NotImplementedError

    def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[V]) -> list[V]:
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*map(self.constant, consts), *args], strict=True))

        def read(atom: Any) -> V:
            return self.constant(atom.val) if isinstance(atom, Literal) else env[atom]

        for eqn in jaxpr.eqns:
            env.update(zip(eqn.outvars, self._equation(eqn, [read(a) for a in eqn.invars]), strict=True))
        return [read(a) for a in jaxpr.outvars]

    def _equation(self, eqn: Any, args: list[V]) -> list[V]:
        name, params = eqn.primitive.name, eqn.params
        if inner := callee(eqn):
            return self.run(*inner, args)
        if name in IDENTITIES:
            return args
        if closed := composed(name, params, [v.aval for v in eqn.invars]):
            return self.run(closed.jaxpr, closed.consts, args)
        if name in VIEWS:
            return [self.view(eqn, args[0])]
        axes = [self.axes(a) for a in args]
        if name in REDUCTIONS and axes == [(0, 1)] and tuple(params["axes"]) == (1,):
            return [self.reduced(name, args[0])]
        if name == "dot_general" and sorted(axes) == [(0, 1), (1,)]:
            return [self.dot(*(args if axes[0] == (0, 1) else args[::-1]))]
        return [self.mapped(eqn, args) if name in KNOWN else self.refuse(eqn)]


@dataclasses.dataclass(frozen=True)
class _Tried(StepWalker[Axes]):
    """Knows of each value its axes only."""

    node: Node

    def axes(self, value: Axes) -> Axes:
        return value

    def constant(self, array: Any) -> Axes:
        if isinstance(array, Tracer):
            raise self.error("a value of the decode step around it; pass it through the resident, or use it before or after the fold")
        if np.size(array) > 1:
            raise self.error(f"a constant of shape {np.shape(array)}; a step's constants are numbers")
        return ()

    def view(self, eqn: Any, value: Axes) -> Axes:
        shape = tuple(d for d in eqn.outvars[0].aval.shape if d != 1)
        own = tuple(TRIED[a] for a in value)
        return value if value == () or shape in (own, TRIED) else self.refuse(eqn)

    def reduced(self, name: str, tile: Axes) -> Axes:
        return (0,)

    def dot(self, tile: Axes, piece: Axes) -> Axes:
        return (0,)

    def mapped(self, eqn: Any, values: list[Axes]) -> Axes:
        if str(eqn.outvars[0].aval.dtype) not in DTYPES:
            raise self.error(f"{eqn.outvars[0].aval.str_short()}; a kernel computes in {', '.join(DTYPES)}")
        return tuple(sorted({a for axes in values for a in axes}))

    def refuse(self, eqn: Any) -> Axes:
        raise self.error(f"{eqn.primitive.name} on {[v.aval.shape for v in eqn.invars]}; {ALLOWED}")

    def error(self, what: str) -> UnsupportedError:
        return UnsupportedError(f"{self.node.where}: {self.node.op.name}'s step uses {what}")


def check_step(node: Node, dtype: str) -> None:
    """Refuses a user fold whose step or finish has no form on tiles. `dtype` is that of what is streamed.

    Raises:
      UnsupportedError: names the primitive.
    """
    rows, width = TRIED
    carry = tuple(jax.ShapeDtypeStruct((rows,), np.float32) for _ in node.op.init)
    tile, piece = jax.ShapeDtypeStruct((rows, width), dtype), jax.ShapeDtypeStruct((width,), np.float32)
    packed = carry[0] if len(carry) == 1 else carry
    walker, given = _Tried(node), [(0,)] * len(carry)
    for f, shapes, axes in ((node.op.step, (packed, tile, piece), [*given, (0, 1), (1,)]), (node.op.finish, (packed,), given)):
        closed = jax.make_jaxpr(f)(*shapes)
        outs = walker.run(closed.jaxpr, closed.consts, axes)
        if any(1 in a for a in outs):
            raise walker.error("what varies along the tile's columns as a carry; sum, max or min it over the last axis")
