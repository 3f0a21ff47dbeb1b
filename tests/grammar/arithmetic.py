"""Elementwise primitives and reductions in numpy: in real numbers, or rounded as JAX and a kernel round."""

import dataclasses
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from scipy import special

Array = Any  # of numpy


def _divided(a: Array, b: Array) -> Array:
    """Integers are cut off towards zero."""
    if np.result_type(a, b).kind == "f":
        return a / b
    return np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))


def _rounded(x: Array, *, rounding_method: Any) -> Array:
    to_even = int(rounding_method) == 1
    return np.rint(x) if to_even else np.sign(x) * np.floor(np.abs(x) + 0.5)


def _same_bits(x: Array, *, new_dtype: Any) -> Array:
    return (x.astype(np.float32) if x.dtype.kind == "f" else x).view(new_dtype)


PRIMITIVES: dict[str, Callable[..., Array]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": _divided, "rem": np.fmod, "max": np.maximum, "min": np.minimum,
    "neg": np.negative, "abs": np.abs, "sign": np.sign, "square": np.square, "integer_pow": lambda x, *, y: x**y, "pow": np.power,
    "exp": np.exp, "exp2": np.exp2, "expm1": np.expm1, "log": np.log, "log2": np.log2, "log1p": np.log1p, "sqrt": np.sqrt, "cbrt": np.cbrt,
    "rsqrt": lambda x: 1 / np.sqrt(x), "logistic": special.expit, "erf": special.erf, "erfc": special.erfc,
    "sin": np.sin, "cos": np.cos, "tan": np.tan, "asin": np.arcsin, "acos": np.arccos, "atan": np.arctan, "atan2": np.arctan2,
    "sinh": np.sinh, "cosh": np.cosh, "tanh": np.tanh, "asinh": np.arcsinh, "acosh": np.arccosh, "atanh": np.arctanh,
    "floor": np.floor, "ceil": np.ceil, "round": _rounded, "is_finite": np.isfinite,
    "gt": np.greater, "ge": np.greater_equal, "lt": np.less, "le": np.less_equal, "eq": np.equal, "ne": np.not_equal,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "select_n": lambda which, no, yes: np.where(which, yes, no), "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
    "shift_left": np.left_shift, "shift_right_arithmetic": np.right_shift, "shift_right_logical": np.right_shift,  # the last of unsigned numbers
    "bitcast_convert_type": _same_bits, "stop_gradient": lambda x: x, "copy": lambda x: x, "copy_p": lambda x: x, "name": lambda x: x,
    "convert_element_type": lambda x: x,
}  # fmt: skip
PARAMETERS = {"integer_pow": "y", "round": "rounding_method", "bitcast_convert_type": "new_dtype"}  # those that matter
REDUCTIONS: dict[str, Callable[..., Array]] = {"reduce_sum": np.sum, "reduce_max": np.max, "reduce_min": np.min}
COMBINE: dict[str, Callable[..., Array]] = {"reduce_sum": np.add, "reduce_max": np.maximum, "reduce_min": np.minimum}


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """How floating-point numbers are held. real: as float64 that nothing rounds; else as float32, rounded to bfloat16 where that is the dtype.
    chops: rounds towards zero, as nothing does: another sample of what rounding may do."""

    real: bool
    chops: bool = False

    @property
    def floating(self) -> Any:
        return np.float64 if self.real else np.float32

    def hold(self, x: Array, dtype: str) -> Array:
        """A value of one of JAX's dtypes."""
        if dtype not in ("float32", "bfloat16"):
            return np.asarray(x).astype(dtype)
        x = np.asarray(x).astype(self.floating)
        return self.narrow(x) if dtype == "bfloat16" else x

    def narrow(self, x: Array) -> Array:
        """Rounded to bfloat16, unless numbers are real."""
        if self.chops:
            return (x.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        return x if self.real else x.astype(ml_dtypes.bfloat16).astype(np.float32)

    def apply(self, name: str, params: dict[str, Any], args: list[Array], dtype: str) -> Array:
        """An elementwise primitive of JAX's whose result has this dtype."""
        wanted = PARAMETERS.get(name)
        return self.hold(PRIMITIVES[name](*args, **({wanted: params[wanted]} if wanted else {})), dtype)
