"""Elementwise primitives: those that a kernel has, and those that are composed of them when the decode step is traced."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

KNOWN = frozenset(
    (
        "add", "sub", "mul", "div", "rem", "max", "min", "neg", "abs", "sign", "exp", "exp2", "log", "log2", "tanh", "logistic", "sqrt", "rsqrt",
        "square", "integer_pow", "sin", "cos", "atan2", "erf", "round", "gt", "ge", "lt", "le", "eq", "ne", "and", "or", "xor", "not",
        "select_n", "clamp", "convert_element_type", "bitcast_convert_type", "shift_left", "shift_right_logical", "shift_right_arithmetic",
    )
)  # fmt: skip
FLOAT32_ONLY = frozenset(
    ("exp", "exp2", "log", "log2", "tanh", "logistic", "sqrt", "rsqrt", "sin", "cos", "atan2", "erf", "round", "integer_pow")
)
DTYPES = ("float32", "bfloat16", "float16", "int32", "uint32", "bool")  # of what a kernel computes
TABLE_DTYPES = ("float32", "bfloat16", "float16")  # of mk.embed's tables
LEAF_DTYPES = (*DTYPES, "int8", "uint8", "int16", "uint16")  # of params that are no weights, which it converts first
IDENTITIES = frozenset(("copy", "copy_p", "stop_gradient", "optimization_barrier", "name"))  # name is checkpoint_name


def _log1p(x: jax.Array) -> jax.Array:
    """log(1 + x), with the rounding of 1 + x made good (Kahan)."""
    u = 1.0 + x
    return jnp.where(u == 1.0, x, jnp.where(u - 1.0 == jnp.inf, u, jnp.log(u) * (x / (u - 1.0))))


def _expm1(x: jax.Array) -> jax.Array:
    """exp(x) - 1: near 0 by its series, whose next term is below float32's last bit."""
    series = x * (1.0 + x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120)))))
    return jnp.where(jnp.abs(x) < 0.1, series, jnp.exp(x) - 1.0)


def _floor(x: jax.Array) -> jax.Array:
    nearest = lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)
    return nearest - (nearest > x).astype(x.dtype)


def _ceil(x: jax.Array) -> jax.Array:
    return -_floor(-x)


def _pow(x: jax.Array, y: jax.Array) -> jax.Array:
    """x ** y, for negative x where y is whole."""
    size = jnp.exp(y * jnp.log(jnp.abs(x)))
    whole, odd = _floor(y) == y, _floor(y * 0.5) * 2.0 != y
    signed = jnp.where(whole, jnp.where(odd, -size, size), jnp.nan)
    return jnp.where(y == 0.0, 1.0, jnp.where(x < 0.0, signed, size))


def _sinh(x: jax.Array) -> jax.Array:
    e = _expm1(x)
    return jnp.where(jnp.abs(x) < 1.0, 0.5 * (e + e / (e + 1.0)), 0.5 * (jnp.exp(x) - jnp.exp(-x)))


def _asinh(x: jax.Array) -> jax.Array:
    a = jnp.abs(x)
    inverse = 1.0 / a  # a * a would overflow
    return jnp.sign(x) * _log1p(a + a / (inverse + jnp.sqrt(1.0 + inverse * inverse)))


COMPOSED: dict[str, Callable[..., jax.Array]] = {
    "log1p": _log1p,
    "expm1": _expm1,
    "floor": _floor,
    "ceil": _ceil,
    "pow": _pow,
    "erfc": lambda x: 1.0 - lax.erf(x),  # to a rounding of 1: as gelu needs it
    "is_finite": lambda x: jnp.abs(x) < jnp.inf,
    "tan": lambda x: jnp.sin(x) / jnp.cos(x),
    "sinh": _sinh,
    "cosh": lambda x: 0.5 * (jnp.exp(x) + jnp.exp(-x)),
    "asinh": _asinh,
    "acosh": lambda x: jnp.log(x + jnp.sqrt(x - 1.0) * jnp.sqrt(x + 1.0)),
    "atanh": lambda x: 0.5 * _log1p(2.0 * x / (1.0 - x)),
    "atan": lambda x: lax.atan2(x, jnp.ones_like(x)),
    "asin": lambda x: lax.atan2(x, jnp.sqrt((1.0 - x) * (1.0 + x))),
    "acos": lambda x: lax.atan2(jnp.sqrt((1.0 - x) * (1.0 + x)), x),
    "cbrt": lambda x: jnp.sign(x) * jnp.exp(jnp.log(jnp.abs(x)) * (1 / 3)),
}


def composed(name: str, params: dict[str, Any], avals: Sequence[Any]) -> Any:
    """The closed jaxpr that a primitive is composed of, in float32; None if there is none."""
    f = COMPOSED.get(name) or _by_params(name, params, avals)
    if f is None:
        return None

    def in_float32(*args: jax.Array) -> jax.Array:
        out = f(*(a.astype(jnp.float32) for a in args))
        return out if out.dtype == bool else out.astype(args[0].dtype)

    return jax.make_jaxpr(in_float32)(*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals))


def _by_params(name: str, params: dict[str, Any], avals: Sequence[Any]) -> Callable[..., jax.Array] | None:
    """What some uses of a primitive are composed of."""
    if name in FLOAT32_ONLY and avals[0].dtype in (jnp.bfloat16, jnp.float16):
        return lambda *args: getattr(lax, f"{name}_p").bind(*args, **params)
    if name == "round" and params["rounding_method"] is not lax.RoundingMethod.TO_NEAREST_EVEN:
        return lambda x: jnp.sign(x) * _floor(jnp.abs(x) + 0.5)
    if name == "convert_element_type" and params["new_dtype"] == jnp.bool_ and avals[0].dtype != bool:
        return lambda x: x != 0.0
    if name in ("reduce_or", "reduce_and") and tuple(params["axes"]) == (avals[0].ndim - 1,):
        return lambda x: (jnp.max if name == "reduce_or" else jnp.min)(x, -1) > 0.5
    if name == "reduce_precision" and (params["exponent_bits"], params["mantissa_bits"]) == (8, 7):
        return lambda x: x.astype(jnp.bfloat16)
    return None
