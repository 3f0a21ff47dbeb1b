"""User folds: the step's jaxpr evaluated on tiles of 64 rows, without tensor cores.

A step sees a tile [64, width], a piece of the resident [width] and carries [64]. In registers the tile has the mma accumulator's layout, a
piece is spread over rows and a carry over columns only where an operation needs it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from mkdsl.graph import Phase, StepWalker
from mkdsl.lower._machine import Machine, Request, f32, spread
from mkdsl.lower._ring import await_unit, free_stage, slot_of
from mkdsl.lower._tile import Tile
from mkdsl.lower._types import Carry, Index, Ref
from mkdsl.lower.mosaic._layouts import ACC
from mkdsl.ops import Fold
from mkdsl.schedule import MMA_ROWS

REDUCTIONS = {"reduce_sum": jnp.sum, "reduce_max": jnp.max, "reduce_min": jnp.min}


@dataclasses.dataclass(frozen=True)
class OnTile:
    """A value of a step: `axes` says along which of (rows, columns) it varies."""

    array: Any
    axes: tuple[int, ...]


def user_fold(m: Machine, phase: Phase, tile: Tile, op: Fold, i: Index) -> list[jax.Array]:
    """Folds one tile's units, from the i-th on, with the user's step; returns the finished rows [64] of each sequence."""
    written, read = m.refs[f"written.{phase.name}"], m.refs[f"read.{phase.name}"]
    arrays = len(op.init)

    def one_unit(c: Index, carries: Carry) -> Carry:
        slot = slot_of(m, i + c)
        await_unit(m, slot)
        whole = written[slot][:MMA_ROWS] if m.interpret else None

        def block(q: Index, carries: Carry) -> Carry:
            left = _tile(tile, whole, read, slot, q)
            out = []
            for b in range(m.batch):
                x = _piece(m, phase, b, c * (tile.tile_k // tile.width) + q)
                out += _step(op, carries[b * arrays : (b + 1) * arrays], left, x)
            return tuple(out)

        carries = m.times(tile.tile_k // tile.width, block, carries)
        free_stage(m, slot)
        return carries

    start = tuple(plgpu.layout_cast(jnp.full((MMA_ROWS,), v, f32), ACC.reduce(1)) for _ in range(m.batch) for v in op.init)
    carries = m.times(tile.units, one_unit, start)
    return [_finish(op, carries[b * arrays : (b + 1) * arrays]) for b in range(m.batch)]


def _tile(tile: Tile, whole: jax.Array | None, read: Ref, slot: Index, q: Index) -> OnTile:
    if whole is not None:
        return OnTile(lax.dynamic_slice(whole, (0, q * tile.width), (MMA_ROWS, tile.width)), (0, 1))
    start = q * tile.width if isinstance(q, int) else pl.multiple_of(q * tile.width, tile.width)
    return OnTile(plgpu.load(read.at[slot, pl.ds(0, MMA_ROWS), pl.ds(start, tile.width)], layout=ACC, optimized=False), (0, 1))


def _piece(m: Machine, phase: Phase, sequence: int, block: Index) -> OnTile:
    staged = m.refs[f"resident.{phase.name}"]
    group, row = divmod(sequence, 8)
    request = Request(staged, (group, block, row), None, (pl.ds(0, staged.shape[-1]),), ACC.reduce(0))
    return OnTile(m.load(request).astype(f32), (1,))


def _step(op: Fold, carry: Sequence[jax.Array], tile: OnTile, x: OnTile) -> list[jax.Array]:
    args = [*(OnTile(c, (0,)) for c in carry), tile, x]
    pack = (lambda c: c[0]) if len(carry) == 1 else tuple
    shapes = [
        *(jax.ShapeDtypeStruct((MMA_ROWS,), f32) for _ in carry),
        *(jax.ShapeDtypeStruct(v.array.shape, v.array.dtype) for v in (tile, x)),
    ]
    return _evaluate(lambda *a: op.step(pack(a[:-2]), a[-2], a[-1]), shapes, args)


def _finish(op: Fold, carry: Sequence[jax.Array]) -> jax.Array:
    pack = (lambda c: c[0]) if len(carry) == 1 else tuple
    shapes = [jax.ShapeDtypeStruct((MMA_ROWS,), f32) for _ in carry]
    return _evaluate(lambda *a: op.finish(pack(a)), shapes, [OnTile(c, (0,)) for c in carry])[0]


def _evaluate(f: Callable[..., Any], shapes: Sequence[Any], args: Sequence[OnTile]) -> list[jax.Array]:
    closed = jax.make_jaxpr(f)(*shapes)
    width = args[-1].array.shape[-1]
    outs = _Emitter(width).run(closed.jaxpr, closed.consts, args)
    return [_to(o, (0,), width).astype(f32) for o in outs]


def _to(value: OnTile, axes: tuple[int, ...], width: int) -> jax.Array:
    """The value spread to vary along `axes`."""
    if value.axes == axes:
        return value.array
    shape, layout = (
        ((MMA_ROWS, width), ACC) if axes == (0, 1) else ((MMA_ROWS,), ACC.reduce(1)) if axes == (0,) else ((width,), ACC.reduce(0))
    )
    if value.axes == ():
        filler = np.asarray(value.array)
        return plgpu.layout_cast(jnp.full(shape, filler.item(), filler.dtype), layout)
    return spread(value.array, shape, value.axes[0], layout)


@dataclasses.dataclass(frozen=True)
class _Emitter(StepWalker[OnTile]):
    width: int

    def axes(self, value: OnTile) -> tuple[int, ...]:
        return value.axes

    def constant(self, array: Any) -> OnTile:
        return OnTile(np.asarray(array), ())

    def view(self, eqn: Any, value: OnTile) -> OnTile:
        return value

    def reduced(self, name: str, tile: OnTile) -> OnTile:
        return OnTile(REDUCTIONS[name](tile.array, axis=1), (0,))

    def dot(self, tile: OnTile, piece: OnTile) -> OnTile:
        product = tile.array.astype(f32) * _to(OnTile(piece.array.astype(f32), (1,)), (0, 1), self.width)
        return OnTile(jnp.sum(product, axis=1), (0,))

    def mapped(self, eqn: Any, values: list[OnTile]) -> OnTile:
        axes = tuple(sorted({a for v in values for a in v.axes}))
        if not axes:
            return OnTile(np.asarray(eqn.primitive.bind(*(v.array for v in values), **eqn.params)), ())
        return OnTile(eqn.primitive.bind(*(_to(v, axes, self.width) for v in values), **eqn.params), axes)
