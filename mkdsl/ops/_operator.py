"""One JAX primitive for every operator of the DSL.

An operator is a frozen description with a plain `jnp` meaning, `reference`. Under `jit`, `vmap` and `eval_shape` it *is* that
meaning; in a jaxpr it stays whole, so that `mkdsl.graph` can read what the user wrote.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import dispatch, source_info_util
from jax.core import ShapedArray, Tracer
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

source_info_util.register_exclusion(__file__.rsplit("/", 1)[0] + "/")  # errors name the user's line, not ours


@dataclasses.dataclass(frozen=True)
class Operator:
    """What one operator does: subclasses hold static parameters and define `reference(*arrays) -> tuple of arrays`."""

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    def reference(self, *args: jax.Array) -> tuple[jax.Array, ...]:
        raise NotImplementedError

    def on_cuda(self, *args: jax.Array) -> tuple[jax.Array, ...]:
        """The same for an NVIDIA GPU, where a library has something better."""
        return self.reference(*args)

    def batched(self, args: Sequence[jax.Array], axes: Sequence[int | None]) -> tuple[Sequence[jax.Array], Sequence[int | None]]:
        """The operator under `vmap`: by default the `vmap` of its reference."""
        outs = jax.vmap(self.reference, axes, 0)(*args)
        return outs, (0,) * len(outs)

    def bind(self, *args: Any) -> tuple[jax.Array, ...]:
        """Applies the operator to arrays."""
        return tuple(operator_p.bind(*args, op=self))


operator_p = Primitive("mkdsl")
operator_p.multiple_results = True
dispatch.prim_requires_devices_during_lowering.add(
    operator_p
)  # as cuDNN's attention, which `on_cuda` may call; JAX has no public word for it


@operator_p.def_impl
def _impl(*args: jax.Array, op: Operator) -> tuple[jax.Array, ...]:
    return _compiled(op)(*args)


@functools.cache
def _compiled(op: Operator) -> Callable[..., tuple[jax.Array, ...]]:
    return jax.jit(op.bind)


@operator_p.def_abstract_eval
def _abstract(*args: Any, op: Operator) -> list[Any]:
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in args]
    return [ShapedArray(o.shape, o.dtype) for o in jax.eval_shape(op.reference, *shapes)]


def _batch(args: Sequence[jax.Array], axes: Sequence[Any], *, op: Operator) -> tuple[Any, Any]:
    return op.batched(args, list(axes))


batching.primitive_batchers[operator_p] = _batch
mlir.register_lowering(operator_p, mlir.lower_fun(lambda *args, op: op.reference(*args), multiple_results=True))
mlir.register_lowering(operator_p, mlir.lower_fun(lambda *args, op: op.on_cuda(*args), multiple_results=True), platform="cuda")


@dataclasses.dataclass(frozen=True)
class Sharing:
    """Tokens that share a cache are those of one sequence. ascending: they stand side by side there, pads last."""

    ascending: bool


_sharing: Sharing | None = None


@contextlib.contextmanager
def shared_cache(how: Sharing) -> Iterator[None]:
    """While this is active, `vmap` over tokens with one unbatched KV cache means the tokens of one sequence (see `mk.prefill`)."""
    global _sharing
    before, _sharing = _sharing, how
    try:
        yield
    finally:
        _sharing = before


def sharing() -> Sharing | None:
    return _sharing


def in_front(args: Sequence[jax.Array], axes: Sequence[int | None]) -> list[jax.Array]:
    """Arrays with the axis that a batch brings as their first, also those that have none."""
    size = next(a.shape[axis] for a, axis in zip(args, axes, strict=True) if axis is not None)
    return [jnp.broadcast_to(a, (size, *a.shape)) if axis is None else jnp.moveaxis(a, axis, 0) for a, axis in zip(args, axes, strict=True)]


def require(condition: bool, where: str, problem: str, remedy: str) -> None:
    """Raises ValueError `where: problem; remedy` unless the condition holds."""
    if not condition:
        raise ValueError(f"mk.{where}: {problem}; {remedy}")


def static[N: (int, float)](where: str, name: str, value: Any, kind: type[N]) -> N:
    """The value as a Python number. Raises TypeError for what is none, such as a traced value: a kernel is made for one."""
    if not isinstance(value, Tracer):
        array = np.asarray(value)
        if array.ndim == 0 and jnp.issubdtype(array.dtype, jnp.integer if kind is int else jnp.number):
            return kind(array.item())
    raise TypeError(f"mk.{where}: {name} is {value!r}; pass {'an int' if kind is int else 'a float'} of Python's: a kernel is made for one")
