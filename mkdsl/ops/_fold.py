"""`fold`: stream something big past something small. Every expensive operator of a decode step is one."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mkdsl.ops._operator import Operator, require

Carry = Any  # a pytree of [rows] arrays


@dataclasses.dataclass(frozen=True)
class Fold(Operator):
    """Rows of `streamed` [rows, k] folded along k past `resident` [k]: carries are pytrees of [rows] float32 arrays.

    `merge` must be associative with `init` as its identity, and folding two pieces and merging must equal folding both in a row:
    that is what lets the schedule cut the streamed axis anywhere.
    """

    step: Callable[[Carry, jax.Array, jax.Array], Carry]
    init: tuple[float, ...]
    merge: Callable[[Carry, Carry], Carry]
    finish: Callable[[Carry], jax.Array]
    label: str

    @property
    def name(self) -> str:
        return self.label

    def carry(self, rows: int) -> Carry:
        """The carry before anything was streamed."""
        full = tuple(jnp.full((rows,), v, jnp.float32) for v in self.init)
        return full[0] if len(full) == 1 else full

    def reference(self, streamed: jax.Array, resident: jax.Array) -> tuple[jax.Array, ...]:
        return (self.finish(self.step(self.carry(streamed.shape[0]), streamed, resident)),)

    def batched(self, args: Any, axes: Any) -> Any:
        if self is not LINEAR or axes[0] is not None:
            return super().batched(args, axes)
        weight, x = args  # many activations past one weight are a matrix product, written so that nothing is transposed
        x = jnp.moveaxis(x, axes[1], 0).astype(weight.dtype)
        y = lax.dot_general(x, weight, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
        return (y,), (0,)


def dot(tile: jax.Array, x: jax.Array) -> jax.Array:
    """tile [rows, k] times x [k] in float32, with x rounded to the tile's dtype as tensor cores want it. Returns [rows] float32."""
    return lax.dot_general(
        tile, x.astype(tile.dtype), (((1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def identity(carry: Carry) -> jax.Array:
    return carry


def add(a: Carry, b: Carry) -> Carry:
    return jax.tree.map(jnp.add, a, b)


def fold(
    step: Callable[[Carry, jax.Array, jax.Array], Carry],
    streamed: jax.Array,
    resident: jax.Array,
    *,
    init: float | tuple[float, ...] = 0.0,
    merge: Callable[[Carry, Carry], Carry] = add,
    finish: Callable[[Carry], jax.Array] = identity,
    name: str = "fold",
) -> jax.Array:
    """Streams `streamed` past `resident`, tile by tile.

    Args:
      step: (carry, tile [r, k], piece [k]) -> carry. Pure, made of elementwise jnp, `mk.dot`, and sum, max or min over the last axis.
      streamed: [rows, K], read from device memory once.
      resident: [K], held on chip.
      init: the carry's starting value(s), one float for each array of the carry; `merge`'s identity.
      merge: (carry, carry) -> carry, associative.
      finish: carry -> [rows] float32, elementwise.
      name: shown in schedules and errors.

    Returns:
      [rows] float32.

    Raises:
      ValueError: the shapes do not meet, or step or finish returns something else than it should.
    """
    require(streamed.ndim == 2 and resident.ndim == 1, name, f"{streamed.shape=} and {resident.shape=}", "pass [rows, k] and [k]")
    require(streamed.shape[1] == resident.shape[0], name, f"{streamed.shape=} does not meet {resident.shape=}", "their k must agree")
    init = (float(init),) if isinstance(init, int | float) else tuple(map(float, init))
    op = Fold(step, init, merge, finish, name)
    carry = jax.eval_shape(lambda: op.carry(streamed.shape[0]))
    stepped = jax.eval_shape(step, carry, streamed, resident)
    require(_shapes(stepped) == _shapes(carry), name, f"step makes {_shapes(stepped)} of carries {_shapes(carry)}", "return what comes in")
    finished = jax.eval_shape(finish, carry)
    rows = streamed.shape[:1]
    require(_shapes(finished) == rows, name, f"finish returns {_shapes(finished)} of carries {_shapes(carry)}", "return one array [rows]")
    return op.bind(streamed, resident)[0]


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda a: a.shape, tree)


def _accumulate(acc: jax.Array, tile: jax.Array, x: jax.Array) -> jax.Array:
    return acc + dot(tile, x)


LINEAR = Fold(_accumulate, (0.0,), add, identity, "linear")


def linear(weight: jax.Array, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """weight [out, in] times x [in], plus bias [out]. Returns [out] float32; x is rounded to the weight's dtype, sums are float32.

    Raises:
      ValueError: the shapes do not meet, or the weight is not floating point.
    """
    require(
        weight.ndim == 2 and x.ndim == 1,
        "linear",
        f"{weight.shape=} and {x.shape=}",
        "pass [out, in] and [in]; flatten heads with reshape(-1)",
    )
    require(
        weight.shape[1] == x.shape[0],
        "linear",
        f"{weight.shape=} does not meet {x.shape=}",
        "weights are [out, in], as Hugging Face stores them",
    )
    require(
        jnp.issubdtype(weight.dtype, jnp.floating),
        "linear",
        f"{weight.dtype=}",
        "use a floating point weight, or mk.fold with a step that dequantises",
    )
    y = LINEAR.bind(weight, x)[0]
    if bias is None:
        return y
    require(bias.shape == (weight.shape[0],), "linear", f"{bias.shape=} with {weight.shape=}", "a bias is [out]")
    return y + bias.astype(jnp.float32)
