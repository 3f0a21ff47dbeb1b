"""Stores to shared memory, with addresses that Pallas has no word for, and what is stored of an mma's sums."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic.gpu import utils as mu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector

from mkdsl.lower._types import Context, Index, Layout, Ref
from mkdsl.lower.mosaic._layouts import ACC
from mkdsl.lower.mosaic._ptx import SCALAR, constant

ROWS = 8  # of a swizzled block: the columns of the mma's right-hand side


def store_blocks(
    values: Sequence[jax.Array], there: Ref, where: Sequence[tuple[int, int]], first: Index, *, layout: Layout, to: tuple
) -> None:
    """Stores blocks of a resident, each as often as it takes to fill 8 rows, so that every row is valid data.

    Args:
      values: bfloat16 [1, 2, 4 or 8 rows, width] each.
      there: the resident in shared memory, [groups, blocks, 8, width].
      where: (group, block) of each value, blocks counted from `first`.
      first: int32 [], block.
      layout: of the values in registers. to: of a block in shared memory: () or tiling and swizzle.
    """
    (height, width), blocks = values[0].shape, there.shape[1]
    arrays = [plgpu.layout_cast(v, layout) for v in values]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(to), SCALAR, *(layout for _ in arrays)))
    def go(ctx: Context, ref: Ref, first: Index, *arrays: Any) -> None:
        mu.warpgroup_barrier()
        base = arith.muli(first.registers.item(), constant(ROWS * width))
        begin, element = mu.memref_ptr(ref), ir.BF16Type.get()
        for register, offsets in enumerate(_offsets(arrays[0].layout, height, width, swizzle=2 * width if to else 16)):
            for array, (group, block) in zip(arrays, where, strict=True):
                for offset in offsets:
                    at = arith.addi(base, arith.addi(offset, constant((group * blocks + block) * ROWS * width)))
                    llvm.store(array.registers.flat[register], mu.getelementptr(begin, [at], element))
        mu.warpgroup_barrier()

    go(there, first, *arrays)  # pyright: ignore[reportCallIssue]


def _offsets(layout: Layout, height: int, width: int, *, swizzle: int) -> Iterator[list[ir.Value]]:
    """Of each register of a [height, width] array: where in a block its copies go, in elements. The swizzle exchanges pieces of 16 bytes
    within a row of 128, by the number of that row."""
    word = ir.IntegerType.get_signless(32)
    for row, column in layout.thread_idxs((height, width)):
        row, column = arith.index_castui(word, row), arith.index_castui(word, column)
        out = []
        for copy in range(ROWS // height):
            plain = arith.addi(arith.muli(arith.addi(row, constant(height * copy)), constant(width)), column)
            line = arith.andi(arith.divui(plain, constant(64)), constant(swizzle // 16 - 1))
            out.append(arith.xori(plain, arith.muli(line, constant(8))))
        yield out


def store_vectors(values: Sequence[jax.Array], there: Ref, where: Sequence[tuple[int, ...]], *, layout: Layout) -> None:
    """Stores float32 [height] each to `there` [.., rows] in shared memory, from an index (.., row) on. Pallas cannot store a single number."""
    arrays = [plgpu.layout_cast(v, layout) for v in values]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *(layout for _ in arrays)))
    def go(ctx: Context, ref: Ref, *arrays: Any) -> None:
        mu.warpgroup_barrier()
        for array, (*lead, first) in zip(arrays, where, strict=True):
            for (row,), register in zip(array.layout.thread_idxs(array.shape), array.registers.flat, strict=True):
                for lane in range(array.layout.vector_length):
                    value = vector.extract(register, dynamic_position=[], static_position=[lane])
                    memref.store(value, ref, [*(mu.c(i, row.type) for i in lead), arith.addi(row, mu.c(first + lane, row.type))])
        mu.warpgroup_barrier()

    go(there, *arrays)  # pyright: ignore[reportCallIssue]


def store_diagonal(sums: Sequence[jax.Array], rows: Any, *, split_k: int, sequences: int, add: bool) -> None:
    """Stores what of each mma row has met its own piece of the resident: of row r, column (sequence, r % split_k).

    Args:
      sums: groups of 8 columns, [64, 8] each in the accumulator's layout; column n belongs to piece n % split_k of sequence n // split_k.
      rows: where to, float32 in shared memory: [64, sequences] or, of fewer than 8 sequences, [sequences, 64].
      split_k, sequences: of the columns; what is left of 8 are copies.
      add: to what is there.
    """

    @plgpu.inline_mgpu(arg_types=(*(ACC for _ in sums), plgpu.RefType()))
    def go(ctx: Context, *args: Any) -> None:
        *arrays, ref = args

        def put(value: ir.Value, at: Sequence[ir.Value]) -> None:
            memref.store(arith.addf(value, memref.load(ref, at)) if add else value, ref, at)

        mu.warpgroup_barrier()
        diagonal(arrays, put, split_k=split_k, sequences=sequences)
        mu.warpgroup_barrier()

    go(*sums, rows)


def diagonal(arrays: Sequence[Any], put: Callable[[ir.Value, Sequence[ir.Value]], None], *, split_k: int, sequences: int) -> None:
    """put(value, [row, sequence] or, of fewer than 8 sequences, [sequence, row]) for this thread's values of `store_diagonal`."""
    width = arrays[0].shape[1]
    places: list[Any] = list(arrays[0].layout.thread_idxs((64, width)))  # of a register's first element; rows and columns 8 apart
    for lane in range(arrays[0].layout.vector_length):
        with mu.when(_on_diagonal(places[0], lane, split_k, sequences)):
            for number, array in enumerate(arrays):
                for (row, column), register in zip(places, array.registers.flat, strict=True):
                    sequence = arith.divui(arith.addi(column, mu.c(width * number + lane, column.type)), mu.c(split_k, column.type))
                    value = vector.extract(register, dynamic_position=[], static_position=[lane])
                    put(value, [row, sequence] if sequences >= 8 else [sequence, row])


def _on_diagonal(place: tuple[ir.Value, ir.Value], lane: int, split_k: int, sequences: int) -> ir.Value:
    """Whether a column belongs to a row's own piece of K. The same for rows 8 apart and for all groups of columns, since split_k divides 8."""
    (row, column), pieces = place, mu.c(split_k, place[0].type)
    column = arith.addi(column, mu.c(lane, row.type))
    own = arith.cmpi(arith.CmpIPredicate.eq, arith.remui(column, pieces), arith.remui(row, pieces))
    return arith.andi(own, arith.cmpi(arith.CmpIPredicate.ult, column, mu.c(split_k * sequences, row.type)))
