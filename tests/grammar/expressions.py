"""Expressions, as nested tuples that print: integers of `pos`, numbers, and elementwise code on vectors. A name is what stands there; ("f", a, b)
applies the function of that name."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from elementwise import FUNCTIONS
from hypothesis import strategies as st
from jax import lax

import mkdsl as mk

Expression = Any  # a name, a number, or (function, expressions..)


@dataclasses.dataclass(frozen=True)
class Scope:
    """What an expression may name: params of the decoder and of the layer it stands in."""

    params: Any
    layer: Any
    token: jax.Array
    pos: jax.Array


# Integers.

INTEGER: dict[str, Callable[..., Any]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "//": lambda a, b: a // b,
    "%": lambda a, b: a % b,
    "&": lambda a, b: a & b,
    "min": lambda a, b: jnp.minimum(a, b),
    "max": lambda a, b: jnp.maximum(a, b),
    "abs": lambda a: jnp.abs(a),
    "where": lambda a, b, c: jnp.where(a > b, a, c),
    "clip": lambda a, b: jnp.clip(a, 0, b),
}


def integer(e: Expression, s: Scope) -> Any:
    """An int32."""
    if isinstance(e, tuple):
        return INTEGER[e[0]](*(integer(a, s) for a in e[1:]))
    return {"pos": s.pos, "token": s.token, "shift": s.params["shift"]}[e] if isinstance(e, str) else e


def _more_integers(inner: st.SearchStrategy[Expression]) -> st.SearchStrategy[Expression]:
    return st.one_of(
        st.tuples(st.sampled_from(["+", "-", "*", "min", "max"]), inner, st.integers(0, 5)),
        st.tuples(st.sampled_from(["//", "%"]), inner, st.integers(1, 80)),
        st.tuples(st.just("&"), inner, st.sampled_from([1, 7, 31, 63])),
        st.tuples(st.sampled_from(["+", "-", "min", "max"]), inner, inner),
        st.tuples(st.just("where"), inner, st.integers(0, 100), inner),
        st.tuples(st.just("abs"), inner),
        st.tuples(st.just("clip"), inner, st.integers(0, 100)),
    )


integers = st.recursive(st.sampled_from(["pos", "pos", "token", "shift", 3]), _more_integers, max_leaves=3)

# Numbers.

BINARY: dict[str, Callable[..., Any]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "max": lambda a, b: jnp.maximum(a, b),
    "min": lambda a, b: jnp.minimum(a, b),
    "/": lambda a, b: a / (1 + jnp.abs(b)),
    "where": lambda a, b: jnp.where(a > b, a, 0.5 * b),
}


def number(e: Expression, s: Scope) -> Any:
    """A float32 or a Python number."""
    if isinstance(e, float):
        return e
    if isinstance(e, str):
        return s.layer[e] if e.startswith("layer") else s.params[e]
    name, *args = e
    if name == "float":
        return integer(args[0], s).astype(jnp.float32) / 64
    if name == "one of":  # of a leaf
        return s.params["top"]["norm_a"][integer(args[0], s) % 64]
    if name == "mean of":
        return jnp.mean(jnp.arange(8) * integer(args[0], s) % 5)
    if name == "past":
        return jnp.where(integer(args[0], s) > args[1], *(number(a, s) for a in args[2:]))
    if name == "cond":
        return lax.cond(integer(args[0], s) > args[1], *(lambda a=a: jnp.float32(number(a, s)) for a in args[2:]))
    if name in FUNCTIONS:
        return FUNCTIONS[name](jnp.asarray(number(args[0], s), jnp.float32))
    return BINARY[name](*(number(a, s) for a in args))


def _more_numbers(inner: st.SearchStrategy[Expression], *choices: str) -> st.SearchStrategy[Expression]:
    return st.one_of(
        st.tuples(st.sampled_from(sorted(BINARY)), inner, inner),
        st.tuples(st.sampled_from(["past", *choices]), st.just("pos"), st.integers(0, 100), inner, inner),
        st.tuples(st.sampled_from(SMOOTH), inner),
    )


SMOOTH = ("tanh", "logistic", "sin", "cos", "log1p", "exp2", "sqrt", "square", "rsqrt", "erf", "atan", "expm1")
OF_THE_STEP = ("temperature", "gain")  # float32, bfloat16
OF_A_LAYER = ("layer_scale", "layer_gain")
number_leaves = st.one_of(
    st.sampled_from(OF_THE_STEP),
    st.tuples(st.just("float"), st.one_of(st.sampled_from(["pos", "token", "shift"]), st.tuples(st.just("%"), st.just("pos"), st.just(7)))),
    st.sampled_from([0.5, 2.0, -0.25]),
    st.tuples(st.sampled_from(["one of", "mean of"]), st.sampled_from(["pos", "token", "shift", ("+", "pos", 3)])),
)
numbers = st.recursive(number_leaves, lambda inner: _more_numbers(inner, "cond"), max_leaves=3)
layer_numbers = st.recursive(st.one_of(st.sampled_from(OF_A_LAYER), number_leaves), _more_numbers, max_leaves=3)

# Vectors.


def _in_bfloat16(x: jax.Array) -> jax.Array:
    return x.astype(jnp.bfloat16) * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 0.1).astype(jnp.bfloat16)


NORMS: dict[str, Callable[..., Any]] = {
    "none": lambda x, w, b: x,
    "rms": lambda x, w, b: mk.rms_norm(x, w),
    "bare": lambda x, w, b: mk.rms_norm(x),
    "plus one": lambda x, w, b: mk.rms_norm(x, 1 + w.astype(jnp.float32)),
    "layer": lambda x, w, b: mk.layer_norm(x, w, b),
    "l2": lambda x, w, b: x / jnp.sqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-3) * w,
    "max": lambda x, w, b: x / (jnp.max(jnp.abs(x), -1, keepdims=True) + 0.1),
    "std": lambda x, w, b: (x - jnp.mean(x, -1, keepdims=True)) / (jnp.std(x, -1, keepdims=True) + 0.1),
    "bfloat16": lambda x, w, b: _in_bfloat16(x).astype(jnp.float32),
    "twice": lambda x, w, b: mk.rms_norm(mk.rms_norm(x, w) * b),
    "minmax": lambda x, w, b: (x - x.min(-1, keepdims=True)) / (x.max(-1, keepdims=True) - x.min(-1, keepdims=True) + 1),
}
WHOLE: dict[str, Callable[..., Any]] = {  # of features
    "softmax": lambda x: jax.nn.softmax(x),
    "logsumexp": lambda x: x - jax.nn.logsumexp(x, -1, keepdims=True),
    "centred": lambda x: x - x.mean(-1, keepdims=True),
    "times its mean": lambda x: x * (0.5 + x.mean(-1, keepdims=True)),
    "over its size": lambda x: x * lax.rsqrt(0.1 + jnp.sum(x * x, -1, keepdims=True)) * x,
}
ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "silu": lambda x: jax.nn.silu(x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "exact gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": lambda x: jax.nn.relu(x),
    "squared relu": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": lambda x: jax.nn.relu6(x),
    "leaky": lambda x: jax.nn.leaky_relu(x),
    "elu": lambda x: jax.nn.elu(x),
    "softplus": lambda x: jax.nn.softplus(x),
    "mish": lambda x: jax.nn.mish(x),
    "soft sign": lambda x: jax.nn.soft_sign(x),
    "hard swish": lambda x: jax.nn.hard_swish(x),
    "hypot": lambda x: jnp.hypot(x, 1.0),
    "nan to num": lambda x: jnp.nan_to_num(x),
    "checkpointed": lambda x: jax.checkpoint(lambda y: jnp.sin(y) * y)(x),
    "itself twice": lambda x: (x * x) * x,
    "narrow": lambda x: (x.astype(jnp.bfloat16) * 0.75).astype(jnp.float32),
    "called": lambda x: jax.jit(jnp.cos)(x),
}
CONSTANTS: dict[str, Callable[[int], Any]] = {
    "alternating": lambda n: jnp.where(jnp.arange(n) % 2 == 0, 1.5, 0.5),
    "ramp": lambda n: jnp.linspace(0.5, 1.5, n),
    "second half": lambda n: jnp.arange(2 * n)[n:] / (2 * n),
    "ones": lambda n: jnp.ones(n),
    "eye": lambda n: jnp.eye(n)[n // 2],
}
STEPS = frozenset(  # whose results jump
    (
        "sign", "floor", "ceil", "round", "rem", "gt", "ge", "lt", "le", "eq", "ne", "and", "or", "xor", "not", "is_finite", "convert_element_type",
        "where", "tan", "acosh", "narrow", "bfloat16", "shift_left",
        "shift_right_logical", "shift_right_arithmetic",
    )
)  # fmt: skip


def vector(e: Expression, x: jax.Array, s: Scope) -> Any:
    """Elementwise code on x [.., features], and reductions over its last axis."""
    if e == "x":
        return x
    name, *args = e
    n = x.shape[-1]
    match name:
        case "number":
            return number(args[0], s)
        case "constant":
            return CONSTANTS[args[0]](n)
        case "vector":
            return s.layer["vectors"][str(n)]
        case "norm":
            return NORMS[args[0]](vector(args[1], x, s), 1 + s.layer["vectors"][str(n)], s.layer["vectors"][str(n)])
        case "row":
            return mk.embed(s.params["rows"][str(n)], integer(args[0], s))
        case "one hot":
            return jax.nn.one_hot(integer(args[0], s), n)
    args = [vector(a, x, s) for a in args]
    if name in FUNCTIONS:
        return FUNCTIONS[name](0.5 * args[0])
    return {**BINARY, **WHOLE, **ACTIVATIONS}[name](*args)


def vectors(*, whole: bool = True, rows: bool = True, of_layer: bool = True, leaves: int = 3) -> st.SearchStrategy[Expression]:
    """whole: with reductions over features. rows: with rows of tables."""
    scalars = layer_numbers if of_layer else numbers
    others = [
        st.tuples(st.just("number"), scalars),
        st.tuples(st.just("constant"), st.sampled_from(sorted(CONSTANTS))),
        st.just(("vector",)),
    ]
    if rows:
        others += [st.tuples(st.just("row"), integers), st.tuples(st.just("one hot"), integers)]
    other = st.one_of(*others)

    def more(inner: st.SearchStrategy[Expression]) -> st.SearchStrategy[Expression]:
        found = [
            st.tuples(st.sampled_from(sorted(FUNCTIONS)), inner),
            st.tuples(st.sampled_from(sorted(ACTIVATIONS)), inner),
            st.tuples(st.sampled_from(sorted(BINARY)), inner, st.one_of(other, inner)),
        ]
        if whole:
            found += [st.tuples(st.just("norm"), st.sampled_from(sorted(NORMS)), inner), st.tuples(st.sampled_from(sorted(WHOLE)), inner)]
        return st.one_of(*found)

    return st.recursive(st.just("x"), more, max_leaves=leaves)


def jumps(e: Expression) -> bool:
    """Whether rounding may decide which way an expression goes."""
    return isinstance(e, tuple) and any(a in STEPS if isinstance(a, str) else jumps(a) for a in e)
