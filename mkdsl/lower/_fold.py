"""The compute side of a fold: stage the resident, fold the worker's tiles past it, finish their rows."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mkdsl.graph import Phase
from mkdsl.lower import _exchange, _ptx
from mkdsl.lower._finish import finish_part, preload
from mkdsl.lower._frames import iota
from mkdsl.lower._layouts import ACC, LHS, RHS
from mkdsl.lower._loader import group_count, over_mates, share
from mkdsl.lower._machine import Machine, i32, spread, zeros
from mkdsl.lower._own_fold import fold_own
from mkdsl.lower._resident import Prologue
from mkdsl.lower._signals import wait
from mkdsl.lower._stores import store_own_parts
from mkdsl.lower._tiles import ROWS, Tile

Keep = Callable[[Any, list[jax.Array]], None]  # of (number of the tile, sums)


def fold_phase(m: Machine, phase: Phase, l: Any, i: Any) -> Any:
    """One execution of a fold by a worker that has tiles of it; i counts ring units.

    Whatever does not need this phase's input is asked for before the wait: weights of the prologue, rows that the finish adds.
    """
    plan = m.schedule.plan(phase.name)
    prologue = Prologue(m, phase, m.graph.code[phase.name], Tile.of(phase, plan, m.batch), l)
    prologue.prepare()
    early = m.schedule.preloads(phase)
    if early:
        preload(m, phase, l)
    wait(m, phase, l)
    m.stamp(phase, l, "known")
    if not early:
        preload(m, phase, l)
    prologue.run()
    m.stamp(phase, l, "read")
    return (_grouped if plan.grouped else _at_once)(m, phase, prologue, l, i)


def _at_once(m: Machine, phase: Phase, prologue: Prologue, l: Any, i: Any) -> Any:
    """All of a worker's tiles, of every part and matrix, in one loop; then each part's finish."""
    parts = m.graph.code[phase.name].parts

    def slots(mate: Any) -> list[Any]:
        return [len(folds) * m.tasks(phase, part, mate)[1] for part, (folds, _) in enumerate(parts)]

    sets, i = _fold_all(m, phase, prologue, lambda mate: functools.reduce(jnp.add, slots(mate)), True, i)
    m.stamp(phase, l, "folded")
    base: Any = 0
    for part, n in enumerate(slots(None)):
        first, count = m.tasks(phase, part)
        finish_part(m, phase, part, first, 0, count, base, sets, l)
        base = base + n
    return i


def _grouped(m: Machine, phase: Phase, prologue: Prologue, l: Any, i: Any) -> Any:
    """Part by part, so many tiles at a time as finished rows have room for."""
    for part, (folds, _) in enumerate(m.graph.code[phase.name].parts):
        groups = group_count(m, phase, part)

        def group(j: Any, i: Any, part: int = part, matrices: int = len(folds), groups: Any = groups) -> Any:
            def slots(mate: Any) -> Any:
                return matrices * share(m.tasks(phase, part, mate)[1], j, groups)[1]

            sets, i = _fold_all(m, phase, prologue, slots, j == 0 if part == 0 else None, i)
            m.stamp(phase, l, "folded")
            first, n = m.tasks(phase, part)
            finish_part(m, phase, part, first, *share(n, j, groups), 0, sets, l)
            return i

        i = lax.fori_loop(0, groups, group, i)
    return i


def _fold_all(m: Machine, phase: Phase, prologue: Prologue, slots: Callable[[Any], Any], begins: Any, i: Any) -> tuple[list[Any], Any]:
    """Folds the next `slots(None)` tiles of this worker, or as many as it says of each worker of the cluster, and waits for what the others
    send of this one's. `begins`: whether the phase does, and reductions are sent too. Returns the sets of finished rows that the finish adds up."""
    plan, tile = m.schedule.plan(phase.name), prologue.tile
    if plan.cluster == 1:
        store = functools.partial(store_sums, m, phase, tile)
        return [0], (_fold_slots if tile.pieces == 1 else _piecewise)(m, phase, prologue, slots(None), store, i)
    number = _exchange.round_number(m)
    _exchange.announce(m, phase, number, slots(None), begins)

    def folded(mate: Any, i: Any) -> Any:
        def send(s: Any, sums: list[jax.Array]) -> None:
            _exchange.send_sums(m, phase, sums, s, number, mate)

        return _fold_slots(m, phase, prologue, slots(mate), send, i)

    i = over_mates(m, plan, folded, i)
    _exchange.receive(m, number)
    return [_exchange.buffer(m, phase, number, source) for source in range(plan.cluster)], i


def _fold_slots(m: Machine, phase: Phase, prologue: Prologue, count: Any, keep: Keep, i: Any) -> Any:
    """Folds the next `count` tiles of the ring; keep(s, sums) says where the s-th one's go. Returns the number of the unit after them."""
    tile = prologue.tile
    kept = tile.chunks == tile.groups == 1 and tile.tensor_cores and not m.by_wgmma(phase)
    operand = _operand(m, phase, tile, 0) if kept else None

    def one_tile(s: Any, carry: Any) -> Any:
        first = i + s * tile.chunks
        if not tile.tensor_cores:
            _keep_own(m, phase, tile, s, first)
        elif m.by_wgmma(phase):
            keep(s, accumulate_async(m, phase, tile, first))
        else:
            keep(s, accumulate(m, phase, tile, operand, first))
        return carry

    lax.fori_loop(0, count, one_tile, i32(0))
    return i + count * tile.chunks


def _keep_own(m: Machine, phase: Phase, tile: Tile, s: Any, i: Any) -> None:
    """A tile of the user's own fold."""
    own = m.graph.node(m.graph.code[phase.name].parts[0][0][0]).op
    each = fold_own(m, phase, tile, own, i)
    for where, value in zip(_slot(m, s), _together(m, each), strict=True):
        m.refs[f"rows.{phase.name}"][where] = value


def _piecewise(m: Machine, phase: Phase, prologue: Prologue, count: Any, keep: Keep, i: Any) -> Any:
    """All tiles past one piece of the resident, then the next piece: a K-split in time."""
    rows = m.refs[f"rows.{phase.name}"]

    def clear(s: Any, carry: Any) -> Any:
        for where in _slot(m, s):
            rows[where] = zeros((ROWS, 8), ACC) if m.batch >= 8 else plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ACC.reduce(1))
        return carry

    def piece(q: Any, i: Any) -> Any:
        prologue.stage(q)
        return _fold_slots(m, phase, prologue, count, keep, i)

    lax.fori_loop(0, count, clear, i32(0))
    return m.times(prologue.tile.pieces, piece, i)


def _slot(m: Machine, s: Any) -> list[tuple[Any, ...]]:
    """Where a tile's rows go in the first set: [sequence, slot, 64], or [slot, 64, sequences] from 8 sequences on."""
    if m.batch >= 8:
        return [(0, s, slice(None), pl.ds(8 * h, 8)) for h in range(m.batch // 8)]
    return [(0, b, s) for b in range(m.batch)]


def _operand(m: Machine, phase: Phase, tile: Tile, chunk: Any) -> list[jax.Array]:
    """The first group's right-hand sides [width, 8] for one unit."""
    return [_operand_block(m, phase, tile, 0, chunk, q) for q in range(tile.chunk // tile.width)]


def _operand_block(m: Machine, phase: Phase, tile: Tile, group: int, chunk: Any, q: int) -> jax.Array:
    block = m.refs[f"resident.{phase.name}"].at[group, chunk * (tile.chunk // tile.width) + q]
    return block[...].T if m.interpret else plgpu.load(block.transpose((1, 0)), layout=RHS)


def accumulate(m: Machine, phase: Phase, tile: Tile, operand: list[jax.Array] | None, i: Any) -> list[jax.Array]:
    """Folds one tile's units, from the i-th on; returns [64, 8] sums per group of columns.

    Several accumulators hide the mma's latency: copies of one where there are few groups; else the groups themselves, in a loop.
    """
    written, read = m.refs[f"stage.{phase.name}"]
    copies = max(1, 4 // tile.groups)

    def one_unit(c: Any, accs: Any) -> Any:
        slot = lax.rem(i + c, m.schedule.stages)
        first = operand or (_operand(m, phase, tile, c) if copies > 1 else None)
        plgpu.barrier_wait(m.refs["full"].at[slot])
        whole = written[slot][: tile.rows].reshape(ROWS, tile.chunk) if m.interpret else None

        def columns(q: Any, accs: Any) -> Any:
            left = _left(m, tile, whole, read, slot, q)
            out = list(accs)
            for g in range(tile.groups):
                right = first[q] if first and g == 0 else _operand_block(m, phase, tile, g, c, q)
                at = g * copies + (q % copies if copies > 1 else 0)
                out[at] = m.mma(out[at], left, right)
            return tuple(out)

        blocks = tile.chunk // tile.width
        if copies > 1:
            for q in range(blocks):
                accs = columns(q, accs)
        else:
            accs = m.times(blocks, columns, accs)
        m.free_stage(slot)
        return accs

    accs = m.times(tile.chunks, one_unit, tuple(zeros((ROWS, 8), ACC) for _ in range(tile.groups * copies)))
    return [functools.reduce(jnp.add, accs[g * copies : (g + 1) * copies]) for g in range(tile.groups)]


def accumulate_async(m: Machine, phase: Phase, tile: Tile, i: Any) -> list[jax.Array]:
    """The same by `wgmma`, which reads both operands from shared memory; returns all columns' sums at once."""
    left, right = m.refs[f"stage.{phase.name}"][1], m.refs[f"operand.{phase.name}"]

    def fold(acc: Any) -> jax.Array:
        def one_unit(c: Any, carry: Any) -> Any:
            slot = lax.rem(i + c, m.schedule.stages)
            plgpu.barrier_wait(m.refs["full"].at[slot])
            at = _ptx.opaque(i32(c))  # else where the operand lies would be kept in registers all through the kernel
            columns = pl.ds(pl.multiple_of(at * tile.chunk, tile.chunk), tile.chunk)
            plgpu.wgmma(acc, left.at[slot, pl.ds(0, ROWS)], right.at[:, columns].transpose((1, 0)))
            plgpu.wgmma_wait(0)
            m.free_stage(slot)
            return carry

        m.times(tile.chunks, one_unit, i32(0))
        return acc[...]

    return [pl.run_scoped(fold, plgpu.WGMMAAccumulatorRef((ROWS, 8 * tile.groups)))]


def _left(m: Machine, tile: Tile, whole: jax.Array | None, read: Any, slot: Any, q: Any) -> jax.Array:
    """Block q of a unit, [64, width], as the mma's left-hand side."""
    if whole is not None:
        return lax.dynamic_slice(whole, (0, q * tile.width), (ROWS, tile.width))
    start = q * tile.width if isinstance(q, int) else pl.multiple_of(q * tile.width, tile.width)
    return plgpu.load(read.at[slot, pl.ds(0, ROWS), pl.ds(start, tile.width)], layout=LHS)


def store_sums(m: Machine, phase: Phase, tile: Tile, s: Any, sums: list[jax.Array]) -> None:
    """Finished mma rows to their slot, or their sums so far. Row r * parts + p has met x's part p only in column (sequence, p)."""
    add, rows = tile.pieces > 1, m.refs[f"rows.{phase.name}"]
    if not m.interpret:
        where = rows.at[0, s] if m.batch >= 8 else rows.at[0, :, s]
        store_own_parts(sums, where, parts=tile.parts, sequences=m.batch, add=add)
        return
    columns = jnp.concatenate(sums, axis=1)[:, : m.batch * tile.parts].reshape(ROWS, m.batch, tile.parts)
    mine = lax.broadcasted_iota(i32, columns.shape, 2) == lax.rem(lax.broadcasted_iota(i32, columns.shape, 0), tile.parts)
    own = jnp.sum(jnp.where(mine, columns, 0.0), axis=2)
    for n, where in enumerate(_slot(m, s)):
        value = own[:, 8 * n : 8 * n + 8] if m.batch >= 8 else own[:, n]
        rows[where] = value + rows[where] if add else value


def _together(m: Machine, each: list[jax.Array]) -> list[jax.Array]:
    """Rows [64] per sequence as they are stored: from 8 sequences on eight together, [64, 8]."""
    if m.batch < 8:
        return each
    column = iota(m, (ROWS, 8), 1, ACC)
    out = []
    for h in range(m.batch // 8):
        together = zeros((ROWS, 8), ACC)
        for j in range(8):
            together = jnp.where(column == j, spread(each[8 * h + j], (ROWS, 8), 0, ACC), together)
        out.append(together)
    return out
