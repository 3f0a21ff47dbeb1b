"""Features of heads exchanged between threads, by way of shared memory."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from mkdsl.lower._types import Context, Layout, Ref
from mkdsl.lower.mosaic._ptx import constant


def partners(halves: Sequence[jax.Array], scratch: Ref, *, dims: int, interleaved: bool, layout: Layout) -> list[jax.Array]:
    """What each feature of heads is rotated against (`Rope.partners`); 0 for features that pass.

    Args:
      halves: float32 [heads, head_dim / 2], the heads' first and second halves.
      scratch: float32 in shared memory, at least as much.
      dims, interleaved: of the rotation. layout: of the halves in registers.
    """
    shape = halves[0].shape
    arrays = [plgpu.layout_cast(h, layout) for h in halves]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), *(layout for _ in arrays)),
        return_type=[plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout) for _ in arrays],
    )
    def go(ctx: Context, ref: Ref, *arrays: Any) -> Any:
        begin, element = mu.memref_ptr(ref), ir.F32Type.get()
        places = [list(_places(a.layout, shape, half)) for half, a in enumerate(arrays)]
        mu.warpgroup_barrier()
        for array, where in zip(arrays, places, strict=True):
            for register, (head, feature) in zip(array.registers.flat, where, strict=True):
                llvm.store(register, mu.getelementptr(begin, [arith.addi(head, feature)], element))
        mu.warpgroup_barrier()

        def load(kind: ir.Type, head: ir.Value, feature: ir.Value) -> ir.Value:
            at = arith.addi(head, _partner(feature, dims, interleaved))
            there = llvm.load(kind, mu.getelementptr(begin, [at], element))
            passes = arith.cmpi(arith.CmpIPredicate.uge, feature, constant(dims))
            nothing = arith.constant(kind, ir.DenseElementsAttr.get_splat(kind, ir.FloatAttr.get(element, 0.0)))
            return arith.select(passes, nothing, there) if dims < 2 * shape[1] else there

        return [
            _like(array, [load(array.registers.flat[0].type, *place) for place in where])
            for array, where in zip(arrays, places, strict=True)
        ]

    return list(go(scratch, *arrays))


def _places(layout: Any, shape: tuple[int, ...], half: int) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Of each register of a half: where its head begins, and which feature of it that is."""
    word = ir.IntegerType.get_signless(32)
    for head, column in layout.thread_idxs(shape):
        head, column = arith.index_castui(word, head), arith.index_castui(word, column)
        yield arith.muli(head, constant(2 * shape[1])), arith.addi(column, constant(half * shape[1]))


def _partner(feature: ir.Value, dims: int, interleaved: bool) -> ir.Value:
    """For a feature that passes: some feature of the same head."""
    if interleaved:
        return arith.xori(feature, constant(1))
    first = arith.cmpi(arith.CmpIPredicate.ult, feature, constant(dims // 2))
    return arith.addi(feature, arith.select(first, constant(dims // 2), constant(-(dims // 2))))


def _like(array: fa.FragmentedArray, values: Sequence[ir.Value]) -> fa.FragmentedArray:
    registers = np.empty(array.registers.shape, dtype=object)
    registers.reshape(-1)[:] = list(values)
    return fa.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=array.is_signed)
