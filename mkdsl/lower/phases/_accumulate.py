"""Folding one tile of the ring: by `mma`, by `wgmma` or with a user's step, and where its sums are kept."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mkdsl.graph import FoldPhase
from mkdsl.lower._machine import Machine, i32, spread, zeros
from mkdsl.lower._ring import await_unit, free_stage, slot_of
from mkdsl.lower._tile import Tile
from mkdsl.lower._types import Carry, Index, Ref
from mkdsl.lower.evaluate._frames import iota
from mkdsl.lower.evaluate._user_fold import user_fold
from mkdsl.lower.mosaic import _ptx
from mkdsl.lower.mosaic._layouts import ACC, LHS, RHS
from mkdsl.lower.mosaic._stores import store_diagonal
from mkdsl.schedule import MMA_ROWS


def keep_user_fold(m: Machine, phase: FoldPhase, tile: Tile, s: Index, i: Index) -> None:
    """Folds a tile with the user's step."""
    op = m.graph.node(m.graph.code[phase.name].parts[0][0][0]).op
    each = user_fold(m, phase, tile, op, i)
    for where, value in zip(sums_at(m, s), _together(m, each), strict=True):
        m.refs[f"sums.{phase.name}"][where] = value


def sums_at(m: Machine, s: Index) -> list[tuple[Index, ...]]:
    """Where a tile's sums go in the first set: [sequence, slot, 64], or [slot, 64, sequences] from 8 sequences on."""
    if m.batch >= 8:
        return [(0, s, slice(None), pl.ds(8 * h, 8)) for h in range(m.batch // 8)]
    return [(0, b, s) for b in range(m.batch)]


def operand(m: Machine, phase: FoldPhase, tile: Tile, unit: Index) -> list[jax.Array]:
    """The right-hand sides [width, 8] of one unit, for the first group of columns."""
    return [_operand_block(m, phase, tile, 0, unit, q) for q in range(tile.tile_k // tile.width)]


def _operand_block(m: Machine, phase: FoldPhase, tile: Tile, group: int, unit: Index, q: int) -> jax.Array:
    block = m.refs[f"resident.{phase.name}"].at[group, unit * (tile.tile_k // tile.width) + q]
    return block[...].T if m.interpret else plgpu.load(block.transpose((1, 0)), layout=RHS)


def accumulate(m: Machine, phase: FoldPhase, tile: Tile, held: list[jax.Array] | None, i: Index) -> list[jax.Array]:
    """Folds one tile's units, from the i-th on; returns [64, 8] sums per group of columns. held: `operand` of all units, if it is in registers.

    Several accumulators hide the mma's latency: copies of one where there are few groups; else the groups themselves, in a loop.
    """
    written, read = m.refs[f"written.{phase.name}"], m.refs[f"read.{phase.name}"]
    copies = max(1, 4 // tile.column_groups)

    def one_unit(c: Index, accs: Carry) -> Carry:
        slot = slot_of(m, i + c)
        first = held or (operand(m, phase, tile, c) if copies > 1 else None)
        await_unit(m, slot)
        whole = written[slot][: tile.rows].reshape(MMA_ROWS, tile.tile_k) if m.interpret else None

        def columns(q: Index, accs: Carry) -> Carry:
            left = _left(m, tile, whole, read, slot, q)
            out = list(accs)
            for g in range(tile.column_groups):
                right = first[q] if first and g == 0 else _operand_block(m, phase, tile, g, c, q)
                at = g * copies + (q % copies if copies > 1 else 0)
                out[at] = m.mma(out[at], left, right)
            return tuple(out)

        blocks = tile.tile_k // tile.width
        if copies > 1:
            for q in range(blocks):
                accs = columns(q, accs)
        else:
            accs = m.times(blocks, columns, accs)
        free_stage(m, slot)
        return accs

    accs = m.times(tile.units, one_unit, tuple(zeros((MMA_ROWS, 8), ACC) for _ in range(tile.column_groups * copies)))
    return [functools.reduce(jnp.add, accs[g * copies : (g + 1) * copies]) for g in range(tile.column_groups)]


def accumulate_async(m: Machine, phase: FoldPhase, tile: Tile, i: Index) -> list[jax.Array]:
    """The same by `wgmma`, which reads both operands from shared memory; returns all columns' sums at once."""
    left, right = m.refs[f"read.{phase.name}"], m.refs[f"operand.{phase.name}"]

    def fold(acc: Carry) -> jax.Array:
        def one_unit(c: Index, carry: Carry) -> Carry:
            slot = slot_of(m, i + c)
            await_unit(m, slot)
            at = _ptx.opaque(i32(c))  # else where the operand lies would be kept in registers all through the kernel
            columns = pl.ds(pl.multiple_of(at * tile.tile_k, tile.tile_k), tile.tile_k)
            plgpu.wgmma(acc, left.at[slot, pl.ds(0, MMA_ROWS)], right.at[:, columns].transpose((1, 0)))
            plgpu.wgmma_wait(0)
            free_stage(m, slot)
            return carry

        m.times(tile.units, one_unit, i32(0))
        return acc[...]

    return [pl.run_scoped(fold, plgpu.WGMMAAccumulatorRef((MMA_ROWS, 8 * tile.column_groups)))]


def _left(m: Machine, tile: Tile, whole: jax.Array | None, read: Ref, slot: Index, q: Index) -> jax.Array:
    """Block q of a unit, [64, width], as the mma's left-hand side."""
    if whole is not None:
        return lax.dynamic_slice(whole, (0, q * tile.width), (MMA_ROWS, tile.width))
    start = q * tile.width if isinstance(q, int) else pl.multiple_of(q * tile.width, tile.width)
    return plgpu.load(read.at[slot, pl.ds(0, MMA_ROWS), pl.ds(start, tile.width)], layout=LHS)


def store_sums(m: Machine, phase: FoldPhase, tile: Tile, s: Index, sums: list[jax.Array]) -> None:
    """A tile's sums, or its sums so far, to their slot. Row r * split_k + p has met piece p of the resident only in column (sequence, p)."""
    add, rows = tile.k_stages > 1, m.refs[f"sums.{phase.name}"]
    if not m.interpret:
        where = rows.at[0, s] if m.batch >= 8 else rows.at[0, :, s]
        store_diagonal(sums, where, split_k=tile.split_k, sequences=m.batch, add=add)
        return
    columns = jnp.concatenate(sums, axis=1)[:, : m.batch * tile.split_k].reshape(MMA_ROWS, m.batch, tile.split_k)
    mine = lax.broadcasted_iota(i32, columns.shape, 2) == lax.rem(lax.broadcasted_iota(i32, columns.shape, 0), tile.split_k)
    own = jnp.sum(jnp.where(mine, columns, 0.0), axis=2)
    for n, where in enumerate(sums_at(m, s)):
        value = own[:, 8 * n : 8 * n + 8] if m.batch >= 8 else own[:, n]
        rows[where] = value + rows[where] if add else value


def _together(m: Machine, each: list[jax.Array]) -> list[jax.Array]:
    """Rows [64] per sequence as they are stored: from 8 sequences on eight together, [64, 8]."""
    if m.batch < 8:
        return each
    column = iota(m, (MMA_ROWS, 8), 1, ACC)
    out = []
    for h in range(m.batch // 8):
        together = zeros((MMA_ROWS, 8), ACC)
        for j in range(8):
            together = jnp.where(column == j, spread(each[8 * h + j], (MMA_ROWS, 8), 0, ACC), together)
        out.append(together)
    return out
