"""The compute side of a fold: stage the resident, fold the worker's tiles past it, finish their rows."""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mkdsl.graph import Phase
from mkdsl.lower._frames import Rows, fetch, iota
from mkdsl.lower._layouts import ACC, LHS, RHS
from mkdsl.lower._loader import COMPUTE, for_groups
from mkdsl.lower._machine import Machine, Request, f32, i32, times, zeros
from mkdsl.lower._resident import Prologue
from mkdsl.lower._tiles import ROWS, Tile


def fold_phase(m: Machine, phase: Phase, l: Any, i: Any) -> Any:
    """One execution of a fold by a worker that has tiles of it; i counts ring units."""
    plan, code = m.schedule.plan(phase.name), m.graph.code[phase.name]
    tile = Tile.of(phase, plan, m.batch)
    m.wait(phase, plan, l)
    prologue = Prologue(m, phase, code, tile, l)
    prologue.run()
    for part in range(len(phase.parts)):
        i = _part(m, phase, part, tile, prologue, l, i)
    if plan.fence:
        m.fence()
    return i


def _part(m: Machine, phase: Phase, part: int, tile: Tile, prologue: Prologue, l: Any, i: Any) -> Any:
    plan = m.schedule.plan(phase.name)
    folds = m.graph.code[phase.name].parts[part][0]
    first, n = m.tasks(phase, part, COMPUTE)
    slots = m.refs[f"rows.{phase.name}"]
    operand = _operand(m, phase, tile, 0, 0) if tile.pieces == tile.chunks == tile.groups == 1 else None

    def one_tile(t: Any, i: Any) -> Any:
        for z in range(len(folds)):
            accs, i = _accumulate(m, phase, tile, operand, i)
            for b, row in enumerate(_sum_parts(m, tile, accs)):
                where = (z, b, t)
                slots[where] = row if tile.pieces == 1 else row + plgpu.load(slots.at[where], layout=ACC.reduce(1), optimized=False)
        return i

    def group(a: Any, count: Any, i: Any) -> Any:
        if tile.pieces == 1:
            i = lax.fori_loop(0, count, one_tile, i)
        else:
            i = _piecewise(m, tile, prologue, slots, len(folds), count, one_tile, i)
        _finish(m, phase, part, first + a, count, l)
        return i

    return for_groups(n, plan.group, group, i)


def _piecewise(m: Machine, tile: Tile, prologue: Prologue, slots: Any, matrices: int, count: Any, one_tile: Any, i: Any) -> Any:
    """All tiles past one piece of the resident, then the next piece: a K-split in time."""

    def clear(t: Any, carry: Any) -> Any:
        for z in range(matrices):
            for b in range(m.batch):
                slots[z, b, t] = plgpu.layout_cast(jnp.zeros((ROWS,), f32), ACC.reduce(1))
        return carry

    def piece(q: Any, i: Any) -> Any:
        prologue.stage(q)
        return lax.fori_loop(0, count, one_tile, i)

    lax.fori_loop(0, count, clear, i32(0))
    return lax.fori_loop(0, tile.pieces, piece, i)


def _operand(m: Machine, phase: Phase, tile: Tile, group: int, chunk: Any) -> list[jax.Array]:
    """The resident's blocks that meet one unit, as right-hand sides [width, 8]."""
    staged, per_chunk = m.refs[f"resident.{phase.name}"], tile.chunk // tile.width
    blocks = [staged.at[group, chunk * per_chunk + q] for q in range(per_chunk)]
    if m.interpret:
        return [b[...].T for b in blocks]
    return [plgpu.load(b.transpose((1, 0)), layout=RHS) for b in blocks]


def _accumulate(m: Machine, phase: Phase, tile: Tile, operand: list[jax.Array] | None, i: Any) -> tuple[list[jax.Array], Any]:
    """Folds one tile's units; returns [64, 8] sums per group of columns. Several accumulators hide the mma's latency."""
    written, read = m.refs[f"stage.{phase.name}"]
    full, empty = m.refs["full"], m.refs["empty"]
    copies = max(1, 4 // tile.groups)

    def one_unit(c: Any, carry: Any) -> Any:
        accs, i = list(carry[0]), carry[1]
        slot = lax.rem(i, m.schedule.stages)
        first = operand or _operand(m, phase, tile, 0, c)
        plgpu.barrier_wait(full.at[slot])
        whole = _unit(tile, written, slot) if m.interpret else None
        for q in range(tile.chunk // tile.width):
            columns = pl.ds(q * tile.width, tile.width)
            left = whole[:, q * tile.width : (q + 1) * tile.width] if m.interpret else plgpu.load(read.at[slot, pl.ds(0, ROWS), columns], layout=LHS)
            for g in range(tile.groups):
                right = first[q] if g == 0 else _operand_block(m, phase, tile, g, c, q)
                at = g * copies + q % copies
                accs[at] = m.mma(accs[at], left, right)
        if m.interpret:
            plgpu.commit_smem()  # the race detector wants the last ordinary read ordered before the next copy
        plgpu.barrier_arrive(empty.at[slot])
        return tuple(accs), i + 1

    start = tuple(zeros((ROWS, 8), ACC) for _ in range(tile.groups * copies))
    accs, i = times(tile.chunks, one_unit, (start, i))
    return [sum(accs[g * copies + 1 : (g + 1) * copies], accs[g * copies]) for g in range(tile.groups)], i


def _unit(tile: Tile, written: Any, slot: Any) -> jax.Array:
    """A unit's [64, chunk] read through the view it was written through, as interpret mode wants it."""
    return written[slot][: tile.rows].reshape(ROWS, tile.chunk)


def _operand_block(m: Machine, phase: Phase, tile: Tile, group: int, chunk: Any, q: int) -> jax.Array:
    block = m.refs[f"resident.{phase.name}"].at[group, chunk * (tile.chunk // tile.width) + q]
    return block[...].T if m.interpret else plgpu.load(block.transpose((1, 0)), layout=RHS)


def _sum_parts(m: Machine, tile: Tile, accs: list[jax.Array]) -> list[jax.Array]:
    """Per sequence: each mma row's own part, [64]. Row r * parts + p meets x's part p only in column (sequence, p)."""
    row, column = (iota(m, (ROWS, 8), axis, ACC) for axis in (0, 1))
    out = []
    for b in range(m.batch):
        group, at = divmod(b * tile.parts, 8)
        mine = column == lax.rem(row, tile.parts) + at
        out.append(jnp.sum(jnp.where(mine, accs[group], 0.0), axis=1))
    return out


def _finish(m: Machine, phase: Phase, part: int, first: Any, count: Any, l: Any) -> None:
    """Finishes `count` tiles in blocks of a fixed size; the last block overlaps the one before, which writes the same values twice."""
    size = finish_size(m, phase, part)

    def block(j: Any, carry: Any) -> Any:
        _finish_block(m, phase, part, first, jnp.minimum(j * size, count - size), size, l)
        return carry

    lax.fori_loop(0, lax.div(count + (size - 1), size), block, i32(0))


def finish_size(m: Machine, phase: Phase, part: int) -> int:
    """The smallest group of tiles that any worker finishes at once."""
    plan = m.schedule.plan(phase.name)
    counts = [n for _, n in plan.tasks[part] if n]
    return min(n // -(-n // plan.group) for n in counts)


def _finish_block(m: Machine, phase: Phase, part: int, first: Any, offset: Any, size: int, l: Any) -> None:
    plan, code = m.schedule.plan(phase.name), m.graph.code[phase.name]
    folds, written = code.parts[part]
    frame = Rows(m, phase, l, sequence=0, sequences=m.batch, first=(first + offset) * plan.rows, count=size * plan.rows)
    slots = m.refs[f"rows.{phase.name}"]
    view = (m.batch, slots.shape[2] * plan.rows, plan.parts)
    for z, fold in enumerate(folds):
        at = [Request(slots, (z,), view, (pl.ds(0, m.batch), pl.ds(offset * plan.rows, frame.count), p), frame.layout) for p in range(plan.parts)]
        pieces = [m.load(r) for r in at]
        frame.values[fold] = sum(pieces[1:], pieces[0])
    fetch([(frame, frame_leaves(m, frame, written))])
    store(m, frame, phase, part, written, l)


def frame_leaves(m: Machine, frame: Rows, roots: tuple[int, ...]) -> list[int]:
    """Tensor nodes that a frame must load to evaluate `roots`. What this phase writes itself is computed, never read back."""
    fresh = {id for _, ids in m.graph.code[frame.phase.name].parts for id in ids}
    found, seen, stack = {}, set(frame.values), list(roots)
    while stack:
        id = stack.pop()
        if id in seen:
            continue
        seen.add(id)
        if id in m.graph.tensor_of and id not in fresh:
            found[id] = None
        elif m.graph.node(id).kind != "reduce":
            stack.extend(m.graph.node(id).inputs)
    return list(found)


def store(m: Machine, frame: Rows, phase: Phase, part: int, written: tuple[int, ...], l: Any) -> None:
    """Writes the finished values to their tensors."""
    for id, name in zip(written, phase.parts[part].writes, strict=True):
        tensor = m.graph.tensors[name]
        value = plgpu.layout_cast(frame.evaluate(id), frame.layout)
        inside = m.home(name) == phase.segment
        instance = (l + 1 if tensor.carried else l) if inside else 0
        m.hand_over(name, instance, lambda inc, name=name: frame.at(name, inc), value, clears=inside)
