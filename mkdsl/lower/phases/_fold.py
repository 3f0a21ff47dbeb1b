"""A fold: stage the resident, fold the worker's tiles past it, run their epilogues."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mkdsl.graph import FoldPhase
from mkdsl.lower import _exchange
from mkdsl.lower._events import wait
from mkdsl.lower._machine import Machine, f32, i32, zeros
from mkdsl.lower._ring import claim, copy, slot_of
from mkdsl.lower._tile import Tile
from mkdsl.lower._types import Buffer, Carry, Index
from mkdsl.lower._walk import Epilogue, over_epilogues, over_peers
from mkdsl.lower.mosaic._layouts import ACC
from mkdsl.lower.phases._accumulate import accumulate, accumulate_async, keep_user_fold, operand, store_sums, sums_at
from mkdsl.lower.phases._epilogue import Finished, preload, run_epilogue
from mkdsl.lower.phases._prologue import Prologue
from mkdsl.schedule import MMA_ROWS, FoldPlan, Schedule

Keep = Callable[[Index, list[jax.Array]], None]  # of (number of the tile, sums)


def plan_of(m: Machine, phase: FoldPhase) -> FoldPlan:
    plan = m.schedule.plan(phase.name)
    assert isinstance(plan, FoldPlan)
    return plan


# Shared memory.


def ring_views(phase: FoldPhase, plan: FoldPlan, schedule: Schedule) -> dict[str, Buffer]:
    """The ring as a copy writes this fold's units, and as the mma reads them."""
    written, read = Tile.of(phase, plan, schedule.padded_batch).views(schedule.num_stages, schedule.stage_bytes)
    return {f"written.{phase.name}": written, f"read.{phase.name}": read}


def buffers(phase: FoldPhase, plan: FoldPlan, batch: int) -> list[dict[str, Buffer]]:
    """The staged operand, sums that wait for their epilogue, and the older rows that it adds; the operand once more as `wgmma` sees it."""
    tile, slots = Tile.of(phase, plan, batch), plan.slots(phase)
    sums = (slots, MMA_ROWS, batch) if batch >= 8 else (batch, slots, MMA_ROWS)
    found = {f"resident.{phase.name}": tile.resident(), f"sums.{phase.name}": plgpu.SMEM((plan.sets, *sums), f32)}
    if added := len(phase.row_reads):
        found[f"added.{phase.name}"] = plgpu.SMEM((len(phase.parts), added, batch, plan.epilogue_tiles * plan.rows), f32)
    return [found, {f"operand.{phase.name}": tile.operand()}] if plan.instruction == "wgmma" else [found]


# The loader.


def load(m: Machine, phase: FoldPhase, iteration: Index, i: Index) -> Index:
    """Issues all units of a fold, in the order in which compute folds them; i counts units, before and after."""
    plan = plan_of(m, phase)
    rank = m.rank if plan.cluster > 1 else 0  # of a cluster each worker has a K stage of its own

    def epilogue(e: Epilogue, i: Index) -> Index:
        def tiles(k_stage: Index, peer: Index, i: Index) -> Index:
            for part in e.parts:
                first, at, count = e.items(m, phase, part, peer)
                i = _load_tiles(m, phase, plan, part, first + at, count, rank + k_stage, iteration, i)
            return i

        return m.times(plan.k_stages, lambda q, i: over_peers(m, phase, functools.partial(tiles, q), i), i)

    return over_epilogues(m, phase, epilogue, i)


def _load_tiles(
    m: Machine, phase: FoldPhase, plan: FoldPlan, part: int, first: Index, count: Index, k_stage: Index, iteration: Index, i: Index
) -> Index:
    """One K stage of consecutive tiles, matrix by matrix. One loop with one copy site per matrix: code is scarce."""
    tile = Tile.of(phase, plan, m.batch)
    for fold in m.graph.code[phase.name].parts[part][0]:
        weight = m.graph.node(m.graph.node(fold).inputs[0])
        rows = tile.handed(weight)
        top = m.layer(weight.op, iteration) * rows.whole + rows.first + first * tile.rows
        behind = rows.first + phase.parts[part].rows > rows.whole  # the last tiles of the last layer reach behind the array

        def half(k: Index, i: Index, fold: int = fold, top: Index = top, behind: bool = behind) -> Index:
            h, u = lax.rem(k, 2), lax.div(k, 2)
            pl.when(h == 0)(lambda: claim(m, i))
            row, column = top + lax.div(u, tile.units) * tile.rows, k_stage * tile.stage_k + lax.rem(u, tile.units) * tile.tile_k
            _copy_half(m, phase, tile, fold, (row, column), h, i, behind=behind)
            return i + h

        i = lax.fori_loop(0, count * (2 * tile.units), half, i)
    return i


def _copy_half(m: Machine, phase: FoldPhase, tile: Tile, fold: int, at: tuple[Index, Index], h: Index, i: Index, *, behind: bool) -> None:
    """One half of a unit at (row, column): rows / 2 output rows, with all their pieces of K. behind: some of the fold's reach behind the array."""
    (row, column), source, half = at, m.refs[f"weight{fold}"], tile.rows // 2
    slot = slot_of(m, i)
    there = m.refs[f"written.{phase.name}"].at[slot, pl.ds(pl.multiple_of(h * half, half), half)]
    first = row + h * half
    rows, columns = pl.ds(first, half), pl.ds(column, tile.tile_k)
    valid = source.shape[0] - first if behind else None
    copy(m, source.at[rows, columns] if tile.split_k == 1 else source.at[rows, :, columns], there, tile.written, slot, valid)


# Compute.


def compute(m: Machine, phase: FoldPhase, iteration: Index, i: Index) -> Index:
    """One execution of a fold by a worker that has tiles of it; i counts ring units.

    Whatever does not need this phase's input is asked for before the wait: weights of the prologue, rows that the epilogue adds.
    """
    plan = plan_of(m, phase)
    prologue = Prologue(m, phase, m.graph.code[phase.name], Tile.of(phase, plan, m.batch), iteration)
    prologue.prepare()
    early = m.schedule.preloads(phase)
    if early:
        preload(m, phase, plan, iteration)
    wait(m, phase, iteration)
    m.stamp(phase, iteration, "known")
    if not early:
        preload(m, phase, plan, iteration)
    prologue.run()
    m.stamp(phase, iteration, "read")

    def epilogue(e: Epilogue, i: Index) -> Index:
        sets, i = _fold_all(m, phase, prologue, e, i)
        m.stamp(phase, iteration, "folded")
        base: Index = 0  # slots of a part's matrices lie behind those of the parts before
        for part, n in zip(e.parts, _slots(m, phase, e, None), strict=True):
            run_epilogue(m, phase, plan, Finished(part, *e.items(m, phase, part), base, sets), iteration)
            base = base + n
        return i

    return over_epilogues(m, phase, epilogue, i)


def _slots(m: Machine, phase: FoldPhase, e: Epilogue, peer: Index) -> list[Index]:
    """Tiles of each part, of all its matrices, that this worker, or a peer, has in an epilogue."""
    parts = m.graph.code[phase.name].parts
    return [len(parts[part][0]) * e.items(m, phase, part, peer)[2] for part in e.parts]


def _fold_all(m: Machine, phase: FoldPhase, prologue: Prologue, e: Epilogue, i: Index) -> tuple[list[Index], Index]:
    """Folds an epilogue's tiles of this worker; in a cluster those of all its workers, and then waits for what they send of this one's. Returns
    the sets of sums that the epilogue adds up."""
    plan, tile = plan_of(m, phase), prologue.tile

    def count(peer: Index) -> Index:
        return functools.reduce(jnp.add, _slots(m, phase, e, peer))

    if plan.cluster == 1:
        store = functools.partial(store_sums, m, phase, tile)
        return [0], (_fold_slots if tile.k_stages == 1 else _fold_k_stages)(m, phase, prologue, count(None), store, i)
    number = _exchange.round_number(m)
    _exchange.announce(m, phase, number, count(None), e.begins)

    def folded(peer: Index, i: Index) -> Index:
        def send(s: Index, sums: list[jax.Array]) -> None:
            _exchange.send_sums(m, phase, plan, sums, s, number, peer)

        return _fold_slots(m, phase, prologue, count(peer), send, i)

    i = over_peers(m, phase, folded, i)
    _exchange.receive(m, phase, prologue.iteration, number)
    return [_exchange.buffer(m, phase, number, source) for source in range(plan.cluster)], i


def _fold_slots(m: Machine, phase: FoldPhase, prologue: Prologue, count: Index, keep: Keep, i: Index) -> Index:
    """Folds the next `count` tiles of the ring; keep(s, sums) says where the s-th one's go. Returns the number of the unit after them."""
    tile, by_wgmma = prologue.tile, m.by_wgmma(plan_of(m, phase))
    in_registers = tile.units == tile.column_groups == 1 and tile.tensor_cores and not by_wgmma
    held = operand(m, phase, tile, 0) if in_registers else None

    def one_tile(s: Index, carry: Carry) -> Carry:
        first = i + s * tile.units
        if not tile.tensor_cores:
            keep_user_fold(m, phase, tile, s, first)
        elif by_wgmma:
            keep(s, accumulate_async(m, phase, tile, first))
        else:
            keep(s, accumulate(m, phase, tile, held, first))
        return carry

    lax.fori_loop(0, count, one_tile, i32(0))
    return i + count * tile.units


def _fold_k_stages(m: Machine, phase: FoldPhase, prologue: Prologue, count: Index, keep: Keep, i: Index) -> Index:
    """All tiles past one K stage of the resident, then past the next: split-K in time."""
    sums = m.refs[f"sums.{phase.name}"]

    def clear(s: Index, carry: Carry) -> Carry:
        for where in sums_at(m, s):
            nothing: Any = zeros((MMA_ROWS, 8), ACC) if m.batch >= 8 else plgpu.layout_cast(jnp.zeros((MMA_ROWS,), f32), ACC.reduce(1))
            sums[where] = nothing
        return carry

    def k_stage(q: Index, i: Index) -> Index:
        prologue.stage(q)
        return _fold_slots(m, phase, prologue, count, keep, i)

    lax.fori_loop(0, count, clear, i32(0))
    return m.times(prologue.tile.k_stages, k_stage, i)
