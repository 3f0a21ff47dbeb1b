"""`mk.jit`: a decode step compiled to one persistent kernel, in JAX's stages."""

import dataclasses
import functools
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mkdsl.gpu._assemble import lowering_for
from mkdsl.gpu._device import detect, has_gpu, require_gpu
from mkdsl.gpu._hang import check_deadline, run_in_time
from mkdsl.gpu._interpret import require_room
from mkdsl.gpu._kept import kept
from mkdsl.gpu._races import run_watched
from mkdsl.graph import OpGraph, build_graph
from mkdsl.lower import Program, lower
from mkdsl.ops import shared_leaves
from mkdsl.schedule import Profile, Schedule, profile
from mkdsl.search import search

ARGUMENTS = ("params", "kv", "token", "pos")


class ContextError(ValueError):
    """A position lies past the KV cache."""


class TokenError(ValueError):
    """A token lies outside the vocabulary."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """An executable decode step. `step(params, kv, token, pos)` returns what the decode step returns; kv is donated.

    Raises, when called:
      TypeError: an argument is not of the shape and dtype that was compiled.
      ContextError: a position lies past the cache. Positions are looked at on the host: pass numpy or Python integers to spare a copy.
      TokenError: a token that lies on the host is outside the vocabulary. One on a GPU, such as the last step's, is not copied to be looked at.
      RaceError: two workers of an interpreted kernel raced.
      HangError: the kernel has a deadline, and its workers waited for each other past it. Such a call returns when its step is done.
    """

    executable: Callable[..., Any]
    signature: tuple[Any, ...]
    context: int
    vocabulary: int

    def __repr__(self) -> str:
        return f"<Compiled decode step: {len(jax.tree.leaves(self.signature[0]))} arrays of params, context {self.context}, {self.vocabulary} tokens>"

    def __call__(self, params: Any, kv: Any, token: Any, pos: Any) -> Any:
        args = (*jax.tree.map(_array, (params, kv)), *(jnp.asarray(x, jnp.int32) for x in (token, pos)))
        check_signature(self.signature, args)
        check_positions(pos, self.context)
        check_tokens(token, self.vocabulary)
        return self.executable(*args)


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A decode step as kernels. `program` is JAX-traceable; `signature` holds the arguments' shapes; `emitted` is the program as JAX has lowered it,
    its kernels in Mosaic's form."""

    program: Program
    signature: tuple[Any, ...]
    emitted: jax.stages.Lowered

    def __repr__(self) -> str:
        return f"<Lowered {self.program.form} kernel of {self.program.schedule!r}>"

    def compile(self) -> Compiled:
        """Compiles for the GPU at hand, or for interpret mode.

        Raises:
          RuntimeError: there is no GPU, and the step was not made with interpret=True.
        """
        if not self.program.interpret:
            require_gpu()
        executable, graph = self.emitted.compile(), self.program.graph
        if self.program.interpret:
            executable = functools.partial(run_watched, executable, self.program)
        elif self.program.deadline is not None:
            executable = functools.partial(run_in_time, executable, self.program)
        return Compiled(executable, self.signature, graph.position_limit, graph.vocabulary)


@dataclasses.dataclass(frozen=True)
class Traced:
    """A traced decode step: `graph` is its operator DAG."""

    graph: OpGraph
    signature: tuple[Any, ...]
    tree: Any
    batch: int
    batched: bool
    target: Profile
    interpret: bool
    deadline: float | None = None

    def __repr__(self) -> str:
        where = f"{self.target.name}, {self.target.workers} workers{', interpreted' if self.interpret else ''}"
        return f"<Traced decode step for {where}: {len(self.graph.phases)} phases, batch {self.batch}, context {self.graph.context}>"

    @functools.cached_property
    def _schedule(self) -> Schedule:
        return search(self.graph, batch=self.batch, target=self.target)

    def schedule(self) -> Schedule:
        """The best schedule found for the target, proven safe; from the disk cache where it is known."""
        return self._schedule

    def lower(self, *, form: str | None = None, schedule: Schedule | None = None, of: Any = None) -> Lowered:
        """The kernel, from the searched schedule or another (which is proven first).

        Args:
          form: "mega", one launch, or "phased", one launch per phase; mega unless interpreting.
          schedule: instead of the searched one.
          of: what says the same as the decode step in another process, such as its name and version, or mkdsl's own description of a model. With it, what is
            emitted is kept on disk (docs/startup.md); it must change when the decode step does.
        """
        chosen = schedule or self.schedule()
        program: Any = lower(self.graph, chosen, self.target, self.tree, interpret=self.interpret, form=form, deadline=self.deadline)
        program = program if self.batched else _Unbatched(program)
        called: Any = program if self.deadline is None else program.watched
        if of is not None and not self.interpret:
            about = "mk.jit", of, chosen, self.target, program.form, self.batched, self.deadline
            called = kept(called, of=about, capability=self.target.capability)
        return Lowered(program, self.signature, self._emitted(called))

    def _emitted(self, program: Callable[..., Any]) -> jax.stages.Lowered:
        """The kernels, emitted for the GPU at hand, or where there is none for the target."""
        jitted = jax.jit(program, donate_argnums=() if self.interpret else (1,))
        if self.interpret or has_gpu():
            return jitted.trace(*self.signature).lower()
        with lowering_for(self.target.capability):
            return jitted.trace(*self.signature).lower(lowering_platforms=("cuda",))


@dataclasses.dataclass(frozen=True, eq=False)
class _Unbatched:
    """A program of batch 1 without the batch axis."""

    program: Program

    def __getattr__(self, name: str) -> Any:
        return getattr(self.program, name)

    def __call__(self, params: Any, kv: Any, token: jax.Array, pos: jax.Array) -> Any:
        return _each_unshared(lambda a: a[0], self.program(params, *_batched(kv, token, pos)))

    def timed(self, params: Any, kv: Any, token: jax.Array, pos: jax.Array) -> tuple[Any, jax.Array]:
        out, stamps = self.program.timed(params, *_batched(kv, token, pos))
        return _each_unshared(lambda a: a[0], out), stamps

    def watched(self, params: Any, kv: Any, token: jax.Array, pos: jax.Array) -> tuple[Any, jax.Array]:
        out, counters = self.program.watched(params, *_batched(kv, token, pos))
        return jax.tree.map(lambda a: a[0], out), counters


def _batched(kv: Any, token: jax.Array, pos: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
    return _each_unshared(lambda a: a[None], kv), token[None], pos[None]


def _of_one(kv: Any, token: Any, pos: Any) -> tuple[Any, Any, Any]:
    """The shapes of one sequence's arguments, of a batch's."""

    def single(a: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(a.shape[1:], a.dtype)

    return _each_unshared(single, kv), single(token), single(pos)


def _each_unshared(f: Callable[[Any], Any], of: Any) -> Any:
    """The same with `f` applied to each leaf that sequences do not share."""
    leaves, tree = jax.tree.flatten(of)
    return jax.tree.unflatten(tree, [a if shared else f(a) for a, shared in zip(leaves, shared_leaves(of), strict=True)])


class Jitted:
    """What `mk.jit` returns: call it, or walk its stages with `trace`."""

    def __init__(
        self, f: Callable[..., Any], batch: int | None, target: str | Profile | None, interpret: bool, deadline: float | None
    ) -> None:
        functools.update_wrapper(self, f)
        self._f, self._batch, self._target, self._interpret, self._deadline = f, batch, target, interpret, deadline
        self._compiled: dict[Any, Compiled] = {}

    def trace(self, params: Any, kv: Any, token: Any, pos: Any) -> Traced:
        """Traces the decode step on arrays or jax.ShapeDtypeStruct.

        Raises:
          TypeError: token and pos are no integers of the batch's shape, or the cache lacks its batch axis.
          UnsupportedError: something in the decode step has no tile lowering; names it, the user's line and the remedy.
        """
        signature = _signature(params, kv, token, pos)
        batched = self._check_batch(signature)
        single = _of_one(*signature[1:]) if batched else signature[1:]
        graph, tree = build_graph(self._f, signature[0], *single)
        target = self._target if self._target is not None else detect()
        chosen = profile(target) if isinstance(target, str) else target
        return Traced(graph, signature, tree, self._batch or 1, batched, chosen, self._interpret, self._deadline)

    def lower(self, params: Any, kv: Any, token: Any, pos: Any) -> Lowered:
        """`trace(...).lower()`, as with jax.jit."""
        return self.trace(params, kv, token, pos).lower()

    def __call__(self, params: Any, kv: Any, token: Any, pos: Any) -> Any:
        signature = _signature(params, kv, token, pos)
        key = jax.tree.structure(signature), tuple((a.shape, str(a.dtype)) for a in jax.tree.leaves(signature))
        if key not in self._compiled:
            self._compiled[key] = self.lower(*signature).compile()
        return self._compiled[key](params, kv, token, pos)

    def _check_batch(self, signature: tuple[Any, ...]) -> bool:
        """Whether there is a batch axis: with batch=1 the arguments may come with or without."""
        _, kv, token, pos = signature
        batch = self._batch
        shapes = {"token": token.shape, "pos": pos.shape}
        allowed = {None: [()], 1: [(), (1,)]}.get(batch, [(batch,)])
        for name, shape in shapes.items():
            if shape not in allowed or shape != token.shape:
                raise TypeError(f"mk.jit: {name} has shape {shape} with {batch=}; pass int32 of shape {' or '.join(map(str, allowed))}")
        if token.shape:
            for (path, leaf), shared in zip(jax.tree_util.tree_flatten_with_path(kv)[0], shared_leaves(kv), strict=True):
                if not shared and (leaf.ndim == 0 or leaf.shape[0] != batch):
                    raise TypeError(
                        f"mk.jit: kv{jax.tree_util.keystr(path)} has shape {leaf.shape} with {batch=}; it is [batch, layers, kv_heads, context, head_dim]"
                    )
        return bool(token.shape)


def jit(
    f: Callable[..., Any], *, batch: int | None = None, target: str | Profile | None = None, interpret: bool = False, deadline: float | None = None
) -> Jitted:  # fmt: skip
    """Compiles a decode step to one persistent GPU kernel.

    Args:
      f: `f(params, kv, token, pos)` for one token of one sequence, in plain JAX and `mk` operators. params' weights are bfloat16
        [out, in]; kv's leaves are bfloat16 [layers, kv_heads, context, head_dim]; token and pos are int32 scalars.
      batch: how many sequences (1 to 16) a step takes; kv, token, pos and every result then have a leading axis, but for the pages of an `mk.Paged`,
        which all sequences share. None: no such axis.
      target: the GPU to schedule for, by name ("h200"), as a file that `mkdsl probe` wrote, or as a `Profile`; the one at hand by default.
      interpret: run on the CPU under Pallas's interpreter and race detector, one launch per phase.
      deadline: seconds after its start at which a kernel whose workers still wait for each other ends, and the call raises `HangError`; a second
        is ample. Each call then returns when its step is done. None: such a kernel would never end.

    Returns:
      A callable with f's signature; it donates kv. Its stages are `.trace(*args)`, then `.graph`, `.schedule()` and `.lower()`, then
      `.compile()`.

    Raises:
      TypeError: batch is no integer, deadline no number, or f no function.
      ValueError: batch is not within 1 to 16, the target is unknown, or deadline is not positive, past a day, or for an interpreted kernel.

    Warns (RuntimeWarning) if an interpreted kernel could sleep for ever, because JAX was started before mkdsl was imported.
    """
    if not callable(f):
        raise TypeError(f"mk.jit: {f!r} is no function; pass f(params, kv, token, pos)")
    if batch is not None and (isinstance(batch, bool) or not isinstance(batch, numbers.Integral)):
        raise TypeError(f"mk.jit: {batch=}; pass how many sequences a step takes, 1 to 16, or None for one without a batch axis")
    if batch is not None and not 1 <= batch <= 16:
        raise ValueError(f"mk.jit: {batch=}; a kernel decodes 1 to 16 sequences: split larger batches")
    if isinstance(target, str):
        profile(target)
    if deadline is not None:
        check_deadline(deadline, interpret)
    if interpret:
        require_room()
    return Jitted(f, batch, target, interpret, deadline)


def _array(leaf: Any) -> jax.Array:
    """A leaf as JAX takes it: Python's numbers are float32 and int32, as NumPy's own are without x64."""
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


def _signature(params: Any, kv: Any, token: Any, pos: Any) -> tuple[Any, ...]:
    def struct(a: Any) -> jax.ShapeDtypeStruct:
        a = a if hasattr(a, "shape") else np.asarray(a)
        return jax.ShapeDtypeStruct(a.shape, jax.dtypes.canonicalize_dtype(a.dtype))

    tree = jax.tree.map(struct, (params, kv, token, pos))
    for name, a in zip(ARGUMENTS[2:], tree[2:], strict=True):
        if not jnp.issubdtype(a.dtype, jnp.integer):
            raise TypeError(f"mk.jit: {name} is {a.dtype}{list(a.shape)}; pass int32")
    return (*tree[:2], *(jax.ShapeDtypeStruct(a.shape, jnp.int32) for a in tree[2:]))


def check_signature(expected: tuple[Any, ...], args: tuple[Any, ...]) -> None:
    """Raises TypeError naming the first argument that is not what was compiled."""
    for name, want, got in zip(ARGUMENTS, expected, args, strict=True):
        if jax.tree.structure(want) != jax.tree.structure(got):
            raise TypeError(f"mk.jit: {name} is a {jax.tree.structure(got)}; compiled for {jax.tree.structure(want)}")
        leaves = zip(jax.tree_util.tree_flatten_with_path(want)[0], jax.tree.leaves(got), strict=True)
        for (path, w), g in leaves:
            if w.shape != g.shape or w.dtype != g.dtype:
                raise TypeError(
                    f"mk.jit: {name}{jax.tree_util.keystr(path)} is {g.dtype}{list(g.shape)}; compiled for {w.dtype}{list(w.shape)}"
                )


def check_positions(pos: Any, context: int) -> None:
    """Raises ContextError for a position past the cache. Inside another trace positions are unknown; the kernel then returns NaN."""
    if isinstance(pos, Tracer) or not context:
        return
    positions = np.asarray(pos)
    if positions.size and (positions.max() >= context or positions.min() < 0):
        raise ContextError(
            f"mk.jit: pos={positions.tolist()} with {context=}; positions run from 0 to {context - 1}: allocate a longer cache"
        )


def check_tokens(token: Any, vocabulary: int) -> None:
    """Raises TokenError for a token outside the vocabulary, where that can be seen without waiting for a GPU. Elsewhere mk.embed clamps."""
    on_host = not isinstance(token, Tracer) and (not isinstance(token, jax.Array) or all(d.platform == "cpu" for d in token.devices()))
    if not on_host or not vocabulary:
        return
    tokens = np.asarray(token)
    if tokens.size and (tokens.max() >= vocabulary or tokens.min() < 0):
        raise TokenError(
            f"mk.jit: token={tokens.tolist()} with {vocabulary=}; tokens run from 0 to {vocabulary - 1}: is the tokenizer another model's?"
        )
