"""The loader: walks the worker's queue from first to last unit and never waits for activations.

A unit fills one stage with two copies. Before it is issued, its stage must be free and the unit `window` places earlier must have landed:
bytes in flight are the latency of everybody's hand-offs. TMA copies where there is one, and says itself when a unit has landed; else the
loader's own threads copy (`cp.async`), and say so.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mkdsl.graph import Phase
from mkdsl.lower import _copies
from mkdsl.lower._machine import Machine, i32
from mkdsl.lower._tiles import KV_WRITTEN, Tile
from mkdsl.search import PhasePlan


def load_phase(m: Machine, phase: Phase, l: Any, i: Any) -> Any:
    """Issues all units of a phase; i counts units, before and after."""
    if phase.kind == "fold":
        return _fold(m, phase, l, i)
    if phase.kind == "attention":
        return _attention(m, phase, l, i)
    return i


def _fold(m: Machine, phase: Phase, l: Any, i: Any) -> Any:
    """In the order in which compute folds: pieces of the resident, then the cluster's workers, then parts, their matrices, their tiles."""
    plan = m.schedule.plan(phase.name)

    def pieces(which: Sequence[int], group: Any, groups: Any, i: Any) -> Any:
        def tiles(piece: Any, mate: Any, i: Any) -> Any:
            for part in which:
                first, n = m.tasks(phase, part, mate)
                a, count = share(n, group, groups)
                i = _tiles(m, phase, part, first + a, count, piece, l, i)
            return i

        first = m.rank if plan.cluster > 1 else 0
        return m.times(plan.pieces, lambda q, i: over_mates(m, plan, lambda mate, i: tiles(first + q, mate, i), i), i)

    if not plan.grouped:
        return pieces(range(len(phase.parts)), 0, 1, i)
    for part in range(len(phase.parts)):
        groups = group_count(m, phase, part)
        i = lax.fori_loop(0, groups, lambda j, i, part=part, groups=groups: pieces((part,), j, groups, i), i)
    return i


def _tiles(m: Machine, phase: Phase, part: int, first: Any, count: Any, piece: Any, l: Any, i: Any) -> Any:
    """One piece of consecutive tiles, matrix by matrix. One loop with one copy site per matrix: code is scarce."""
    tile = Tile.of(phase, m.schedule.plan(phase.name), m.batch)
    for fold in m.graph.code[phase.name].parts[part][0]:
        weight = m.graph.node(m.graph.node(fold).inputs[0])
        top = m.layer(weight.op, l) * weight.shape[0] + first * tile.rows

        def half(k: Any, i: Any, fold: int = fold, top: Any = top) -> Any:
            h, u = lax.rem(k, 2), lax.div(k, 2)
            pl.when(h == 0)(lambda: claim(m, i))
            row = top + lax.div(u, tile.chunks) * tile.rows
            _half(m, phase, tile, fold, row, piece * tile.piece + lax.rem(u, tile.chunks) * tile.chunk, h, i)
            return i + h

        i = lax.fori_loop(0, count * (2 * tile.chunks), half, i)
    return i


def _half(m: Machine, phase: Phase, tile: Tile, fold: int, row: Any, column: Any, h: Any, i: Any) -> None:
    """One half of a unit: rows / 2 output rows, all their parts."""
    source, half, columns = m.refs[f"weight{fold}"], tile.rows // 2, pl.ds(column, tile.chunk)
    slot = lax.rem(i, m.schedule.stages)
    there = m.refs[f"stage.{phase.name}"][0].at[slot, pl.ds(pl.multiple_of(h * half, half), half)]
    rows = pl.ds(row + h * half, half)
    _copy(m, source.at[rows, columns] if tile.parts == 1 else source.at[rows, :, columns], there, tile.written, slot)


def group_count(m: Machine, phase: Phase, part: int) -> Any:
    """In how many groups this worker's tiles of a part finish: as few as it takes, in a cluster that shares them as many for all."""
    plan = m.schedule.plan(phase.name)
    if plan.cluster > 1:
        return plan.rounds(part)
    return lax.div(m.tasks(phase, part)[1] + (plan.group - 1), plan.group)


def share(n: Any, group: Any, groups: Any) -> tuple[Any, Any]:
    """(first, count) of one of so many balanced groups of n items."""
    if isinstance(groups, int) and groups == 1:
        return 0, n
    first = lax.div(group * n, i32(groups))
    return first, lax.div((group + 1) * n, i32(groups)) - first


def over_mates(m: Machine, plan: PhasePlan, body: Callable[[Any, Any], Any], init: Any) -> Any:
    """body(mate, carry) for all workers that fold this one's tiles with it, itself last."""
    if plan.cluster == 1:
        return body(None, init)
    return m.times(plan.cluster, lambda j, carry: body(lax.rem(m.rank + 1 + j, plan.cluster), carry), init)


def claim(m: Machine, i: Any) -> None:
    """Waits until unit i may be issued: its stage is free, and unit i - window has landed.

    Without TMA nobody else says that a unit has landed, so the loader does, before it waits for anybody.
    """
    stages, window = m.schedule.stages, m.schedule.window
    if not m.tma:
        pl.when(i >= window)(lambda: _land(m, i - window, window - 1))

    @pl.when(i >= stages)
    def _() -> None:
        plgpu.barrier_wait(m.refs["empty"].at[lax.rem(i, stages)])

    if m.tma:
        pl.when(i >= window)(lambda: plgpu.barrier_wait(m.refs["full"].at[lax.rem(i - window, stages)]))


def _copy(m: Machine, source: Any, there: Any, layout: tuple, slot: Any) -> None:
    """One of a unit's two copies, asynchronous; `layout`: of the stage."""
    if m.tma:
        plgpu.copy_gmem_to_smem(source, there, m.refs["full"].at[slot])
    else:
        _copies.copy_async(source, there, layout)


def _land(m: Machine, i: Any, later: int) -> None:
    """Waits for unit i, behind which `later` units have been issued, and tells compute."""
    _copies.wait_copies(2 * later)
    plgpu.barrier_arrive(m.refs["full"].at[lax.rem(i, m.schedule.stages)])


def land_last(m: Machine, units: Any) -> None:
    """After all units: without TMA the last `window` of them have yet to land."""
    for later in reversed(range(0 if m.tma else m.schedule.window)):
        i = units - 1 - later
        pl.when(i >= 0)(lambda i=i, later=later: _land(m, i, later))


def drain(m: Machine, units: Any) -> None:
    """Observes what is left of every barrier's phases, which interpret mode insists on."""
    stages, window = m.schedule.stages, m.schedule.window

    def last(n: int, barriers: Any) -> None:
        def one(k: Any, _: Any) -> None:
            i = units - n + k

            @pl.when(i >= 0)
            def _() -> None:
                plgpu.barrier_wait(barriers.at[lax.rem(jnp.maximum(i, 0), stages)])

        lax.fori_loop(0, n, lambda k, c: (one(k, c), c)[1], i32(0))

    last(window, m.refs["full"])
    last(stages, m.refs["empty"])


# The KV cache.


def _attention(m: Machine, phase: Phase, l: Any, i: Any) -> Any:
    """In the order in which compute folds: an item of each worker of the cluster at a time."""
    plan, groups = m.schedule.plan(phase.name), group_count(m, phase, 0)

    def items(mate: Any, j: Any, i: Any) -> Any:
        first, n = m.tasks(phase, 0, mate)
        a, count = share(n, j, groups)
        return lax.fori_loop(0, count, lambda t, i: _kv_item(m, phase, first + a + t, mate, l, i), i)

    return lax.fori_loop(0, groups, lambda j, i: over_mates(m, plan, lambda mate, i: items(mate, j, i), i), i)


def kv_item(m: Machine, phase: Phase, item: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(sequence, kv head, split) of an attention item."""
    splits = m.schedule.plan(phase.name).splits
    head = lax.div(item, splits)
    return lax.div(head, phase.kv_heads), lax.rem(head, phase.kv_heads), lax.rem(item, splits)


def kv_share(m: Machine, phase: Phase, split: Any, mate: Any) -> Any:
    """Which share of an item's cache this worker folds: all of a split, or of one that a mate has to write, what falls to this one."""
    plan = m.schedule.plan(phase.name)
    return split if plan.cluster == 1 else split + plan.splits * lax.rem(m.rank - mate + plan.cluster, plan.cluster)


def kv_blocks(m: Machine, phase: Phase, sequence: Any, at: Any) -> tuple[jax.Array, jax.Array]:
    """(first, count) of the cache blocks of share `at`: first, first + shares, ...; those that hold a position before `pos`."""
    plan = m.schedule.plan(phase.name)
    shares = plan.splits * plan.cluster
    pos = jnp.minimum(m.refs["pos"][sequence], phase.k)
    end = lax.div(pos + (plan.chunk - 1), plan.chunk)
    low = 0 if phase.window is None else lax.div(jnp.maximum(pos - (phase.window - 1), 0), plan.chunk)
    first = low + lax.rem(at - low + shares * (phase.k // plan.chunk + 1), shares)
    return first, lax.div(jnp.maximum(end - first, 0) + (shares - 1), shares)


def _kv_item(m: Machine, phase: Phase, item: Any, mate: Any, l: Any, i: Any) -> Any:
    plan = m.schedule.plan(phase.name)
    sequence, head, split = kv_item(m, phase, item)
    first, n = kv_blocks(m, phase, sequence, kv_share(m, phase, split, mate))
    caches = [m.graph.node(m.graph.node(c).inputs[0]).op for c in m.graph.node(m.graph.code[phase.name].parts[0][0][0]).inputs[1:3]]
    view, half = m.refs[f"stage.{phase.name}"], plan.chunk // 2

    def unit(k: Any, i: Any, cache: Any) -> Any:
        start = (first + k * (plan.splits * plan.cluster)) * plan.chunk
        claim(m, i)
        slot = lax.rem(i, m.schedule.stages)
        for h in range(2):
            source = m.refs[f"cache{cache.index}"].at[sequence, m.layer(cache, l), head, pl.ds(start + h * half, half), :]
            _copy(m, source, view.at[slot, pl.ds(h * half, half)], KV_WRITTEN, slot)
        return i + 1

    def block(j: Any, i: Any) -> Any:
        return functools.reduce(lambda i, cache: unit(j, i, cache), caches, i)

    return lax.fori_loop(0, n, block, i)
