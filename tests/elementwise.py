"""A function of features for each elementwise primitive, by the primitive's name."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name


def whole(x: jax.Array) -> jax.Array:
    return (8 * x).astype(jnp.int32)


def counted(condition: jax.Array) -> jax.Array:
    return condition.astype(jnp.float32)


def of(name: str, inner: Callable[[jax.Array], jax.Array] = lambda x: x) -> Callable[[jax.Array], jax.Array]:
    return lambda x: getattr(lax, name)(inner(x))


def positive(x: jax.Array) -> jax.Array:
    return jnp.abs(x) + 0.25


def inside(x: jax.Array) -> jax.Array:
    return 0.9 * jnp.tanh(x)


UNARY = (
    "neg", "abs", "sign", "exp", "exp2", "tanh", "logistic", "square", "sin", "cos", "tan", "erf", "erfc", "expm1", "floor", "ceil", "sinh",
    "cosh", "asinh", "atan", "cbrt",
)  # fmt: skip
FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    **{name: of(name) for name in UNARY},
    **{name: of(name, positive) for name in ("log", "sqrt", "rsqrt", "log1p")},
    **{name: of(name, inside) for name in ("asin", "acos", "atanh")},
    "log2": lambda x: jnp.log2(positive(x)),
    "acosh": lambda x: lax.acosh(1 + positive(x)),
    "add": lambda x: x + x,
    "sub": lambda x: 1 - x,
    "mul": lambda x: x * x,
    "div": lambda x: x / (x * x + 1),
    "rem": lambda x: (whole(x) % 3).astype(jnp.float32),
    "max": lambda x: jnp.maximum(x, 0.5),
    "min": lambda x: jnp.minimum(x, 0.5),
    "integer_pow": lambda x: x**3,
    "atan2": lambda x: jnp.arctan2(x, x - 1),
    "round": lambda x: counted(lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN) > 0) + counted(lax.round(x) > 0),
    "gt": lambda x: counted(x > 0),
    "ge": lambda x: counted(x >= 0),
    "lt": lambda x: counted(x < 0),
    "le": lambda x: counted(x <= 0),
    "eq": lambda x: counted(whole(x) == 0),
    "ne": lambda x: counted(whole(x) != 0),
    "and": lambda x: counted((x > 0) & (x < 1)),
    "or": lambda x: counted((x < 0) | (x > 1)),
    "xor": lambda x: counted((x < 0) ^ (x < 1)),
    "not": lambda x: counted(~(x < 0)),
    "select_n": lambda x: jnp.where(x > 0, x, 0.1 * x),
    "clamp": lambda x: lax.clamp(-0.5, x, 0.5),
    "convert_element_type": lambda x: x.astype(jnp.bfloat16).astype(jnp.float32),
    "bitcast_convert_type": lambda x: jnp.ldexp(x, 2),
    "shift_left": lambda x: counted(whole(x) << 2 > 3),
    "shift_right_logical": lambda x: counted(lax.bitcast_convert_type(x, jnp.uint32) >> jnp.uint32(31) == 0),
    "shift_right_arithmetic": lambda x: counted(whole(x) >> 2 > 0),
    "stop_gradient": lax.stop_gradient,
    "name": lambda x: checkpoint_name(x, "saved"),
    "optimization_barrier": lax.optimization_barrier,
    "copy": jnp.copy,
    "copy_p": jnp.positive,
    "pow": lambda x: jnp.power(positive(x), x),
    "is_finite": lambda x: counted(jnp.isfinite(x)),
}
