"""What Pallas has no word for, as PTX: relaxed loads and counters, fences. Each has a plain meaning, used where nothing
runs concurrently."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from mkdsl.lower._types import Context, Index, Layout, Ref
from mkdsl.lower.mosaic._deadline import Poll, Watch
from mkdsl.lower.mosaic._layouts import THREADS

SCALAR = plgpu.Layout.WG_SPLAT(())
COUNTER_STRIDE = 32  # words: one counter per cache line


def constant(value: int) -> ir.Value:
    """A constant of 32 bits."""
    return mu.c(value, ir.IntegerType.get_signless(32))


class Item(NamedTuple):
    """One array to be loaded: a reference in global memory, what it holds, and in which layout it is wanted."""

    ref: Ref
    shape: tuple[int, ...]
    dtype: Any
    layout: Layout  # does not matter for a scalar


def load_relaxed(items: Sequence[Item]) -> list[jax.Array]:
    """Loads past the SM's own cache (`ld.relaxed.gpu`)."""

    @plgpu.inline_mgpu(arg_types=tuple(plgpu.RefType() for _ in items), return_type=_loaded(items))
    def go(ctx: Context, *refs: Any) -> Any:
        return _load_all(items, refs)[0]

    return list(go(*[i.ref for i in items]))


def load_validated(items: Sequence[Item], watch: Watch | None = None) -> list[jax.Array]:
    """The same, but looks again until every value is there: a 32-bit value is missing while all its bits are ones, a 16-bit value likewise."""
    poll = Poll(watch)

    @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType() for _ in items), *poll.types), return_type=_loaded(items))
    def go(ctx: Context, *args: Any) -> Any:
        refs, watch = args[: len(items)], args[len(items) :]
        arrays: list[fa.FragmentedArray] = []

        def look() -> tuple[ir.Value, list[ir.Value]]:
            arrays[:], missing = _load_all(items, refs)
            return missing, _registers(arrays)

        types = [t for i in items for t in _register_types(i)]
        return _rebuild(arrays, poll.until_there(types, look, *watch))

    return list(go(*[i.ref for i in items], *poll.values))


def _loaded(items: Sequence[Item]) -> list[plgpu.ShapeDtypeStruct]:
    return [plgpu.ShapeDtypeStruct(i.shape, i.dtype, layout=i.layout if i.shape else SCALAR) for i in items]


def _register_types(item: Item) -> list[ir.Type]:
    element, layout = mu.dtype_to_ir_type(item.dtype), item.layout.to_mgpu()
    if not item.shape:
        return [element]
    return [ir.VectorType.get((layout.vector_length,), element)] * math.prod(layout.registers_shape(item.shape))


def _registers(arrays: Sequence[fa.FragmentedArray]) -> list[ir.Value]:
    return [r for a in arrays for r in a.registers.flatten()]


def _rebuild(like: Sequence[fa.FragmentedArray], values: Sequence[ir.Value]) -> list[fa.FragmentedArray]:
    out, at = [], 0
    for a in like:
        registers = np.empty(a.registers.shape, dtype=object)
        registers.reshape(-1)[:] = list(values[at : at + registers.size])
        at += registers.size
        out.append(fa.FragmentedArray(_registers=registers, _layout=a.layout, _is_signed=a.is_signed))
    return out


def _load_all(items: Sequence[Item], refs: Sequence[ir.Value]) -> tuple[list[fa.FragmentedArray], ir.Value]:
    word = ir.IntegerType.get_signless(32)
    missing: list[ir.Value] = []

    def load(vector_type: ir.VectorType, pointer: ir.Value) -> ir.Value:
        bits = mu.bitwidth(vector_type.element_type)
        if bits * vector_type.shape[0] == 16:
            half = ir.IntegerType.get_signless(16)
            got = mu.inline_ptx("ld.relaxed.gpu.b16 $0, [$1];", pointer, result_types=half, has_side_effects=True)
            missing.append(arith.cmpi(arith.CmpIPredicate.eq, got, arith.constant(half, ir.IntegerAttr.get(half, -1))))
            return vector.bitcast(vector_type, vector.from_elements(ir.VectorType.get((1,), half), [got]))
        words = _load_words(pointer, bits * vector_type.shape[0] // 32, word)
        for w in words:
            missing.extend(is_missing(w, bits))
        return vector.bitcast(vector_type, vector.from_elements(ir.VectorType.get((len(words),), word), words))

    arrays = [_load_tiled(i, r, load) for i, r in zip(items, refs, strict=True)]
    return arrays, functools.reduce(arith.ori, missing)


def _load_tiled(item: Item, ref: ir.Value, load: Callable[..., ir.Value]) -> fa.FragmentedArray:
    if not item.shape:
        one = load(ir.VectorType.get((1,), mu.dtype_to_ir_type(item.dtype)), mu.memref_ptr(ref))
        return fa.FragmentedArray.splat(vector.extract(one, dynamic_position=[], static_position=[0]), ())
    untiled = mu.memref_reshape(ref, (*(1 for _ in item.shape), *item.shape))
    return fa.FragmentedArray.load_tiled(untiled, swizzle=16, layout=item.layout.to_mgpu(), optimized=False, is_signed=None, _load_fun=load)


def _load_words(pointer: ir.Value, n: int, word: ir.Type) -> list[ir.Value]:
    words: list[ir.Value] = []
    for offset in range(0, n, 4):
        k = min(4, n - offset)
        names = "{" + ", ".join(f"${i}" for i in range(k)) + "}" if k > 1 else "$0"
        ptx = f"ld.relaxed.gpu{ {1: '', 2: '.v2', 4: '.v4'}[k] }.b32 {names}, [${k}+{4 * offset}];"
        got = mu.inline_ptx(ptx, pointer, result_types=[word] * k, has_side_effects=True)
        words += list(got) if isinstance(got, tuple | list) else [got]
    return words


def is_missing(w: ir.Value, bits: int) -> list[ir.Value]:
    """Whether the word, or either of the two values in it, has all its bits set: conditions of which any will do."""
    if bits == 32:
        return [arith.cmpi(arith.CmpIPredicate.eq, w, constant(-1))]
    return [
        arith.cmpi(arith.CmpIPredicate.uge, w, constant(-65536)),
        arith.cmpi(arith.CmpIPredicate.eq, arith.andi(w, constant(65535)), constant(65535)),
    ]


def blank(shape: tuple[int, ...], dtype: Any, layout: Layout) -> jax.Array:
    """An array of the sentinel: every bit set."""
    word = {2: jnp.int16, 4: jnp.int32}[jnp.dtype(dtype).itemsize]
    ones = plgpu.layout_cast(jnp.full(shape, -1, word), layout)
    return plgpu.layout_cast(jax.lax.bitcast_convert_type(ones, dtype), layout)


def count_up(counter: Any, *, release: bool) -> None:
    """Adds one to a counter once all threads of the warpgroup are here. `release` publishes everything written before."""
    order = "release" if release else "relaxed"

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def go(ctx: Context, ref: Ref) -> None:
        mu.warpgroup_barrier()
        one = mu.single_thread_predicate(mu.ThreadSubset.WARPGROUP)
        mu.inline_ptx(f"red.{order}.gpu.global.add.u32 [$0], 1;", mu.memref_ptr(ref), predicate=one, has_side_effects=True)

    go(counter)  # pyright: ignore[reportCallIssue]


def stamp(where: Any) -> None:
    """Writes the GPU's time, the low 32 bits of nanoseconds, once all threads of the warpgroup are here."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def go(ctx: Context, ref: Ref) -> None:
        mu.warpgroup_barrier()
        one = mu.single_thread_predicate(mu.ThreadSubset.WARPGROUP)
        mu.inline_ptx("st.global.u32 [$0], $1;", mu.memref_ptr(ref), mu.globaltimer("low"), predicate=one, has_side_effects=True)

    go(where)  # pyright: ignore[reportCallIssue]


def wait_for(counter: Any, target: Any, *, acquire: bool, watch: Watch | None = None) -> None:
    """One thread polls until the counter, which starts at -1, has been counted up `target` times; then the warpgroup goes on."""
    poll, order = Poll(watch), "acquire" if acquire else "relaxed"

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR, *poll.types))
    def go(ctx: Context, ref: Ref, n: Index, *watch: Any) -> None:
        word, last = ir.IntegerType.get_signless(32), arith.subi(n.registers.item(), constant(1))

        def look() -> tuple[ir.Value, list[ir.Value]]:
            seen = mu.inline_ptx(f"ld.{order}.gpu.global.b32 $0, [$1];", mu.memref_ptr(ref), result_types=word, has_side_effects=True)
            return arith.cmpi(arith.CmpIPredicate.slt, seen, last), [seen]

        with mu.single_thread(scope=mu.ThreadSubset.WARPGROUP):
            poll.until_there([word], look, *watch)
        mu.warpgroup_barrier()

    go(counter, target, *poll.values)  # pyright: ignore[reportCallIssue]


def thread_idx() -> ir.Value:
    """This thread's number in its warpgroup."""
    return arith.remui(mu.thread_idx(), constant(THREADS))


def fence() -> None:
    """Orders this thread's earlier stores before its later ones for every observer on the GPU."""

    @plgpu.inline_mgpu()
    def go(ctx: Context) -> None:
        mu.inline_ptx("fence.acq_rel.gpu;", has_side_effects=True)

    go()  # pyright: ignore[reportCallIssue]


def opaque(x: jax.Array) -> jax.Array:
    """The same int32, hidden from the compiler, which would else keep every address derived from it in registers across layers."""

    @plgpu.inline_mgpu(arg_types=(SCALAR,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR))
    def go(ctx: Context, value: Any) -> Any:
        word = ir.IntegerType.get_signless(32)
        moved = mu.inline_ptx("mov.b32 $0, $1;", value.registers.item(), result_types=word, has_side_effects=True)
        return fa.FragmentedArray.splat(moved, (), is_signed=True)

    return go(x)  # pyright: ignore[reportCallIssue]
