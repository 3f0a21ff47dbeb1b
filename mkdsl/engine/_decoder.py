"""What runs a decode step: one persistent kernel where there is a GPU, the step's plain JAX meaning elsewhere."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mkdsl.engine._paged import PlainStep, Step, empty_pages
from mkdsl.gpu import ContextError, Kept, content, detect, identity, jit, kept, raise_if_hung
from mkdsl.lower import Program, lower
from mkdsl.models import DecoderConfig, abstract_params, decode_step, init_cache
from mkdsl.ops import Paged
from mkdsl.schedule import Profile, profile
from mkdsl.search import directory, read, write

LONGEST = 1 << 20  # positions: more than a family's models are made for; the rotary table in a kernel takes 4 * head_dim bytes for each


Path = Literal["kernel", "reference"]


def decode_path() -> Path:
    """Which of the two ways decode steps run on JAX's default backend."""
    return "kernel" if jax.default_backend() == "gpu" else "reference"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pool:
    """What a kernel has to know of pages: how many there are, positions in each, and how many a sequence has."""

    count: int
    size: int
    width: int


@dataclasses.dataclass(frozen=True, eq=False)
class WatchedStep:
    """A `Step` that is a kernel with a deadline. `watched` has counters as a third result, for which `check` waits, and raises HangError if workers
    gave up."""

    kernel: Kept
    program: Callable[[], Program] = dataclasses.field(compare=False)  # what the kernel was made from; searched anew where that is kept

    def __call__(self, params: Any, kv: Paged, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, Paged]:
        return self.watched(params, kv, tokens, positions)[:2]

    def watched(self, params: Any, kv: Paged, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, Paged, jax.Array]:
        return self.kernel(params, kv, tokens, positions)

    def check(self, counters: Any) -> None:
        raise_if_hung(self.program(), counters)


def decode_steps(config: DecoderConfig, pool: Pool, deadline: float | None = None) -> Callable[[int], Step]:
    """The decode step of a batch, for an executable that runs many: one kernel where there is a GPU, plain JAX elsewhere.

    On a CPU that runs on the bf16 weights as they are. Measured on SmolLM2-135M at context 512: 18.0 tokens/s against 16.7 with a float32 copy
    where the CPU knows bf16, 9.1 against 12.5 where it does not; the copy takes twice the memory and prefills slower.

    Args:
      config: the model's shape.
      pool: its pages.
      deadline: of kernels, in seconds; see `mk.jit`.

    Returns:
      batch -> step(params, kv, tokens [b], positions [b]) -> (logits [b, vocab] float32, kv), JAX-traceable, the same for the same batch. kv is
      an `mk.Paged` with tables [b, width]. At position -1 it appends nothing, reads nothing of the cache, and its logits are NaN.

    Raises:
      UnsupportedError: a kernel does not take the model's sizes.
      ScheduleError: no schedule fits the GPU.
    """
    if decode_path() == "reference":
        plain = PlainStep(config)
        return lambda batch: plain
    gpu = detect()
    require_kernel(config, pool, gpu, deadline)
    return functools.cache(functools.partial(kernel_step, config, pool, target=gpu, deadline=deadline))


def require_kernel(config: DecoderConfig, pool: Pool, target: str | Profile, deadline: float | None = None) -> None:
    """Refuses what no kernel takes, before there are weights. That one does is kept on disk: the next process need not trace the model for it."""
    gpu = profile(target) if isinstance(target, str) else target
    path = directory("accepted") / identity(content((config, pool.size, pool.width, gpu, deadline)))
    if read(path) is None:
        _program(config, pool, 1, gpu, deadline)
        write(path, b"")


def kernel_step(config: DecoderConfig, pool: Pool, batch: int, *, target: str | Profile, deadline: float | None = None) -> Any:
    """The kernel of a batch: searched, proven and emitted when JAX first traces it, unless it is kept; compiled with what calls it."""
    gpu = profile(target) if isinstance(target, str) else target
    program = functools.partial(_program, config, pool, batch, gpu, deadline)

    def watched(params: Any, kv: Paged, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, Paged, jax.Array]:
        (_, logits, kv), counters = program().watched(params, kv, tokens, positions)
        return logits, kv, counters

    def step(params: Any, kv: Paged, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, Paged]:
        return program()(params, kv, tokens, positions)[1:]

    about = "decode", config, pool, batch, gpu, deadline
    kernel = kept(step if deadline is None else watched, of=about, capability=gpu.capability)
    return kernel if deadline is None else WatchedStep(kernel, program)


@functools.cache
def _program(config: DecoderConfig, pool: Pool, batch: int, gpu: Profile, deadline: float | None) -> Program:
    traced = jit(decode_step(config), batch=batch, target=gpu, deadline=deadline).trace(*paged_shapes(config, pool, batch))
    return lower(traced.graph, traced.schedule(), traced.target, traced.tree, deadline=deadline)


def paged_shapes(config: DecoderConfig, pool: Pool, batch: int) -> tuple[Any, Paged, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """The arguments of the decode step of a batch on pages."""
    integers = jax.ShapeDtypeStruct((batch,), jnp.int32)
    pages = jax.eval_shape(lambda: empty_pages(config, count=pool.count, size=pool.size))
    return abstract_params(config), Paged(pages, jax.ShapeDtypeStruct((batch, pool.width), jnp.int32)), integers, integers


def shapes(config: DecoderConfig, context: int) -> tuple[Any, Any, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """The arguments of a model's decode step as `jax.ShapeDtypeStruct`s: enough to compile it."""
    integer = jax.ShapeDtypeStruct((), jnp.int32)
    return abstract_params(config), jax.eval_shape(lambda: init_cache(config, context)), integer, integer


def check_context(context: int, most: int = LONGEST) -> None:
    """Raises ContextError for a cache of no positions, or of more than `most` or LONGEST."""
    most = min(most, LONGEST)
    if not 0 < context <= most:
        raise ContextError(f"a context of {context} positions; it may have 1 to {most}")
