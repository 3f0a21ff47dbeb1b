"""Copies from global to shared memory by threads (`cp.async`), for the ring where there is no TMA, and for residents that need no arithmetic."""

import functools
import math
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm

from mkdsl.lower._types import Context, Index, Ref
from mkdsl.lower.mosaic._deadline import Poll, Watch
from mkdsl.lower.mosaic._ptx import SCALAR, constant, is_missing

BLOCKS = 8  # of a resident that one round of copies takes: 4 per thread


def copy_async(source: Ref, there: Ref, layout: tuple, valid: Index = None) -> None:
    """Rows of global memory to shared memory, in the layout (tiling, swizzle) that TMA would write: `cp.async`, all threads of the warpgroup.
    Of rows from `valid` on, which lie behind the array, nothing is read and zeros are written, as TMA does; None: there are none such.

    Done when `wait_copies` says so, in the order of issue.
    """
    tiling, swizzle = layout
    columns, width = source.shape[-1], tiling.tiling[-1]
    rows = math.prod(source.shape[:-1])
    limits = () if valid is None else (valid * (rows // source.shape[0]),)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(layout), *(SCALAR for _ in limits)))
    def go(ctx: Context, source: Ref, there: Ref, *limits: Any) -> None:
        blocks = mu.memref_reshape(there, (rows // 8, columns // width, 8, width))
        threads = fa.tiled_copy_smem_gmem_layout(rows // 8, columns // width, swizzle.swizzle, 16)
        size = 2 * threads.vector_length
        cached = nvvm.LoadCacheModifierKind.CG if size == 16 else nvvm.LoadCacheModifierKind.CA
        strides, base = _thread_start(source, threads)
        first_row = _thread_offset(threads, (1, 0))
        for _, _, index, to in fa.FragmentedArray.transfer_tiled(blocks, swizzle.swizzle, threads, (rows, columns), optimized=False):
            row, column = index()
            read = None
            for limit in limits:
                inside = arith.cmpi(arith.CmpIPredicate.slt, arith.addi(first_row, constant(row)), limit.registers.item())
                read = arith.select(inside, constant(size), constant(0))
            at = mu.getelementptr(base, [row * strides[0] + column * strides[1]], ir.BF16Type.get())
            nvvm.cp_async_shared_global(to, at, size, cached, cp_size=read)
        nvvm.cp_async_commit_group()

    go(source, there, *limits)  # pyright: ignore[reportCallIssue]


def _thread_start(source: ir.Value, threads: fa.TiledLayout) -> tuple[list[int], ir.Value]:
    """Strides of rows and columns, and where this thread's first vector lies; all pieces of a row are rows of their own."""
    strides = ir.MemRefType(source.type).get_strides_and_offset()[0][-2:]
    pointer = llvm.addrspacecast(llvm.PointerType.get(address_space=1), mu.memref_ptr(source))
    return strides, mu.getelementptr(pointer, [_thread_offset(threads, tuple(strides))], ir.BF16Type.get())


def _thread_offset(threads: fa.TiledLayout, strides: tuple[int, ...]) -> ir.Value:
    """Where this thread's first vector lies, of rows and columns so far apart."""
    tiled = [mu.c(s, ir.IntegerType.get_signless(32)) for s in threads.tiling.tile_strides(strides)[2:]]
    return arith.addi(mu.dyn_dot(threads.warp_indices(), tiled), mu.dyn_dot(threads.lane_indices(), tiled))


def wait_copies(later: int) -> None:
    """Waits until all of this thread's `copy_async` but the last `later` are done."""

    @plgpu.inline_mgpu()
    def go(ctx: Context) -> None:
        nvvm.cp_async_wait_group(later)

    go()  # pyright: ignore[reportCallIssue]


def stageable(rows: int, blocks: int, width: int) -> bool:
    """Whether `stage` copies [rows, blocks * width]: whole groups of 8 rows, in pieces that keep all threads busy with 16 bytes each. Smaller
    copies would go through the SM's own cache, which never learns of what other SMs write."""
    run = math.gcd(blocks, BLOCKS)
    return rows % 8 == 0 and run % 4 == 0 and run * width >= 128


def stage(source: Ref, there: Ref, layout: tuple, *, self_validating: bool, watch: Watch | None = None) -> None:
    """Copies bfloat16 [8 groups, columns] from global memory to a resident [groups, blocks, 8, width], everything in flight at once. With
    `self_validating`, copies again until no value has all its bits set. For the compute warpgroup; all of it may read the result."""

    poll = Poll(watch if self_validating else None)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(layout), *poll.types))
    def go(ctx: Context, source: Ref, there: Ref, *watch: Any) -> None:
        copies = _Copies(source, there, layout)

        def look() -> tuple[ir.Value, list[ir.Value]]:
            copies.issue()
            nvvm.cp_async_commit_group()
            nvvm.cp_async_wait_group(0)
            return copies.missing() if self_validating else arith.constant(ir.IntegerType.get_signless(1), 0), []

        mu.warpgroup_barrier()  # everybody is done with what was there
        poll.until_there([], look, *watch)
        mu.warpgroup_barrier()

    go(source, there, *poll.values)  # pyright: ignore[reportCallIssue]


class _Copies:
    """A thread's part of `stage`: the same few copies for every run of blocks, in a loop."""

    def __init__(self, source: ir.Value, there: ir.Value, layout: tuple) -> None:
        tiling, swizzle = layout
        width = tiling.tiling[-1]
        rows, columns = ir.MemRefType(source.type).shape
        groups, blocks = rows // 8, columns // width
        self.run = math.gcd(blocks, BLOCKS)
        self.runs, self.steps, self.elements = blocks // self.run, groups * blocks // self.run, self.run * 8 * width
        threads = fa.tiled_copy_smem_gmem_layout(1, self.run, swizzle.swizzle, 16)
        if threads.vector_length != 8:
            raise ValueError(f"copies of {2 * threads.vector_length} bytes: {rows=}, {columns=}, {width=}")
        first = mu.memref_slice(mu.memref_reshape(there, (groups, blocks, 8, width)), (slice(0, 1), slice(0, self.run)))
        (self.row, column), self.base = _thread_start(source, threads)
        self.columns = self.run * width
        schedule = fa.FragmentedArray.transfer_tiled(first, swizzle.swizzle, threads, (8, self.columns), optimized=False)
        self.copies = [(sum(i * s for i, s in zip(index(), (self.row, column), strict=True)), to) for _, _, index, to in schedule]

    def issue(self) -> None:
        @mu.fori(self._count(), [])
        def _(step: ir.Value, _: Any) -> list[ir.Value]:
            group, run = arith.divui(step, constant(self.runs)), arith.remui(step, constant(self.runs))
            skipped = arith.addi(arith.muli(group, constant(8 * self.row)), arith.muli(run, constant(self.columns)))
            for offset, to in self.copies:
                source = mu.getelementptr(self.base, [arith.addi(skipped, constant(offset))], ir.BF16Type.get())
                nvvm.cp_async_shared_global(self._at(to, step), source, 16, nvvm.LoadCacheModifierKind.CG)
            return []

    def missing(self) -> ir.Value:
        """Whether any word that this thread copied is not there yet."""
        words = ir.VectorType.get((4,), ir.IntegerType.get_signless(32))

        @mu.fori(self._count(), [arith.constant(ir.IntegerType.get_signless(1), 0)])
        def found(step: ir.Value, found: list[ir.Value]) -> list[ir.Value]:
            absent = list(found)
            for _, to in self.copies:
                loaded = llvm.load(words, self._at(to, step))
                absent += [a for i in range(4) for a in is_missing(llvm.extractelement(loaded, constant(i)), 16)]
            return [functools.reduce(arith.ori, absent)]

        return found.results[0]

    def _count(self) -> ir.Value:
        """Hidden from the compiler, which would unroll."""
        word = ir.IntegerType.get_signless(32)
        return mu.inline_ptx("mov.b32 $0, $1;", constant(self.steps), result_types=word, has_side_effects=True)

    def _at(self, to: Any, step: ir.Value) -> Any:
        return mu.getelementptr(to, [arith.muli(step, constant(self.elements))], ir.BF16Type.get())
