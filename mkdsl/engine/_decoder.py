"""What runs a decode step: one persistent kernel where there is a GPU, the step's plain JAX meaning elsewhere."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mkdsl.engine._paged import BatchedStep, Step
from mkdsl.gpu import ContextError, Kept, detect, jit, kept
from mkdsl.lower import Program, lower
from mkdsl.models import DecoderConfig, abstract_params, decode_step, init_cache
from mkdsl.schedule import Profile, profile

LONGEST = 1 << 20  # positions: more than a family's models are made for; the rotary table in a kernel takes 4 * head_dim bytes for each


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A compiled decode step, and which of the two ways it runs: "kernel" or "reference".

    step(params, kv, token, pos) -> (next token, logits, kv) takes and returns one sequence, without a batch axis; kv is donated. pos
    is best a host integer: the kernel's step checks it against the context.
    """

    step: Callable[..., tuple[jax.Array, jax.Array, Any]]
    path: Literal["kernel", "reference"]


def default_decoder(config: DecoderConfig, context: int) -> Decoder:
    """The decoder for JAX's default backend. A kernel is compiled here, from shapes: what it cannot take is refused before there are weights.

    On a CPU the reference runs on the bf16 weights as they are. Measured on SmolLM2-135M at context 512: 18.0 tokens/s against 16.7 with
    a float32 copy where the CPU knows bf16, 9.1 against 12.5 where it does not; the copy takes twice the memory and prefills slower.

    Args:
      config: the model's shape.
      context: positions in the cache.

    Returns:
      The decoder.

    Raises:
      UnsupportedError: a kernel does not take the model's sizes or the context.
      ScheduleError: no schedule fits the GPU.
    """
    step = decode_step(config)
    if jax.default_backend() != "gpu":
        return Decoder(jax.jit(step, donate_argnums=1), "reference")
    return Decoder(jit(step).trace(*shapes(config, context)).lower(of=config).compile(), "kernel")


def decode_steps(config: DecoderConfig, context: int) -> Callable[[int], Step]:
    """The decode step of a batch, for an executable that runs many: one kernel where there is a GPU, its plain JAX meaning elsewhere.

    Args:
      config: the model's shape.
      context: positions in the cache of each sequence.

    Returns:
      batch -> step(params, kv, tokens [b], positions [b]) -> (logits [b, vocab] float32, kv), JAX-traceable, the same for the same batch. At
      position -1 it appends nothing, reads nothing of the cache, and its logits are NaN.

    Raises:
      UnsupportedError: a kernel does not take the model's sizes or the context.
      ScheduleError: no schedule fits the GPU.
    """
    if jax.default_backend() != "gpu":
        plain = BatchedStep(config)
        return lambda batch: plain
    step_of = functools.cache(functools.partial(kernel_step, config, context, target=detect()))
    step_of(1).exported(*batched_shapes(config, context, 1))  # what a kernel does not take is refused before there are weights
    return step_of


def kernel_step(config: DecoderConfig, context: int, batch: int, *, target: str | Profile) -> Kept:
    """The kernel of a batch: searched, proven and emitted when JAX first traces it, unless it is kept; compiled with what calls it."""
    gpu = profile(target) if isinstance(target, str) else target

    @functools.cache
    def program() -> Program:
        traced = jit(decode_step(config), batch=batch, target=gpu).trace(*batched_shapes(config, context, batch))
        return lower(traced.graph, traced.schedule(), traced.target, traced.tree)

    def step(params: Any, kv: Any, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, Any]:
        return program()(params, kv, tokens, positions)[1:]

    return kept(step, of=("decode", config, context, batch, gpu), capability=gpu.capability)


def shapes(config: DecoderConfig, context: int) -> tuple[Any, Any, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """The arguments of a model's decode step as `jax.ShapeDtypeStruct`s: enough to compile it."""
    integer = jax.ShapeDtypeStruct((), jnp.int32)
    return abstract_params(config), jax.eval_shape(lambda: init_cache(config, context)), integer, integer


def batched_shapes(config: DecoderConfig, context: int, batch: int) -> tuple[Any, ...]:
    """The arguments of the decode step of several sequences."""
    params, *one = shapes(config, context)
    return params, *jax.tree.map(lambda a: jax.ShapeDtypeStruct((batch, *a.shape), a.dtype), one)


def check_context(context: int, most: int = LONGEST) -> None:
    """Raises ContextError for a cache of no positions, or of more than `most` or LONGEST."""
    most = min(most, LONGEST)
    if not 0 < context <= most:
        raise ContextError(f"a context of {context} positions; it may have 1 to {most}")
