"""Epilogues: the sums of finished tiles, whatever elementwise code follows them, and their way to other workers."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mkdsl.graph import FoldPhase
from mkdsl.lower._machine import Machine, Request, i32, zeros
from mkdsl.lower._types import Carry, Index
from mkdsl.lower.evaluate._evaluator import fetch
from mkdsl.lower.evaluate._frames import Rows
from mkdsl.schedule import EPILOGUE_VALUES, FoldPlan


@dataclasses.dataclass(frozen=True)
class Finished:
    """Tiles of a part whose sums are complete: `count` of this worker's, whose first is `first`, from the `at`-th on. Their sums lie in slots from
    `base` on, matrix by matrix, and are the total of all `sets`."""

    part: int
    first: Index
    at: Index
    count: Index
    base: Index
    sets: Sequence[Index]


def block_tiles(plan: FoldPlan, part: int, batch: int) -> int:
    """Tiles of one block of an epilogue: as many as the smallest epilogue of any worker has, so that overlapping blocks of this size cover every
    epilogue, but no more than a few values per thread, whose code is written out."""
    epilogues = plan.epilogues(part) if plan.cluster > 1 else None
    smallest = min((n // (epilogues or -(-n // plan.epilogue_tiles)) for _, n in plan.tasks[part] if n), default=1)
    return max(1, min(smallest, EPILOGUE_VALUES // (plan.rows * batch)))


def run_epilogue(m: Machine, phase: FoldPhase, plan: FoldPlan, tiles: Finished, iteration: Index) -> None:
    """Finishes tiles in blocks of a fixed size. The last block overlaps the one before and writes the same values twice."""
    t, size = tiles, block_tiles(plan, tiles.part, m.batch)
    folds, written = m.graph.code[phase.name].parts[t.part]

    def block(j: Index, carry: Carry) -> Carry:
        offset = jnp.minimum(j * size, t.count - size)
        frame = _frame(m, phase, plan, t.part, t.first + t.at + offset, iteration)
        for z, fold in enumerate(folds):
            frame.values[fold] = _total(m, plan, frame, t.base + z * t.count + offset, t.sets)
        leaves = row_leaves(m, frame, written)
        if not plan.several_epilogues:  # else nothing was preloaded
            frame.values |= {id: m.load(_added(m, phase, plan, frame, t.part, id, t.at + offset)) for id in leaves}
        fetch([(frame, leaves)])
        store(m, frame, t.part, written)
        return carry

    lax.fori_loop(0, lax.div(t.count + (size - 1), size), block, i32(0))


def _frame(m: Machine, phase: FoldPhase, plan: FoldPlan, part: int, tile: Index, iteration: Index) -> Rows:
    rows = block_tiles(plan, part, m.batch) * plan.rows
    return Rows(m, phase, iteration, sequence=0, sequences=m.batch, first=tile * plan.rows, count=rows)


def _total(m: Machine, plan: FoldPlan, frame: Rows, slot: Index, sets: Sequence[Index]) -> jax.Array:
    """A fold's rows: the sum of their pieces of K, of all sets."""
    sums, where = m.refs[f"sums.{plan.name}"], pl.ds(slot * plan.rows, frame.count)

    def piece(p: Index) -> jax.Array:
        if m.batch >= 8:
            view = (sums.shape[1] * plan.rows, plan.split_k, m.batch)
            each = [m.load(Request(sums, (s,), view, (where, p, pl.ds(0, m.batch)), frame.layout, transposed=True)) for s in sets]
        else:
            view = (m.batch, sums.shape[2] * plan.rows, plan.split_k)
            each = [m.load(Request(sums, (s,), view, (pl.ds(0, m.batch), where, p), frame.layout)) for s in sets]
        return functools.reduce(jnp.add, each)

    if m.batch >= 8 and plan.split_k > 1:  # a loop where code is scarcer than time
        return m.times(plan.split_k, lambda p, total: total + piece(p), zeros(frame.shape, frame.layout))
    return functools.reduce(lambda total, p: total + piece(p), range(1, plan.split_k), piece(0))


def preload(m: Machine, phase: FoldPhase, plan: FoldPlan, iteration: Index) -> None:
    """Copies the rows of older tensors that the epilogue adds to shared memory, while there is nothing else to do. There is room for those of one
    epilogue only."""
    if plan.several_epilogues:
        return
    for part, (_, written) in enumerate(m.graph.code[phase.name].parts):
        if leaves := row_leaves(m, _frame(m, phase, plan, part, 0, iteration), written):
            _copy(m, phase, plan, part, leaves, iteration)


def _copy(m: Machine, phase: FoldPhase, plan: FoldPlan, part: int, leaves: list[int], iteration: Index) -> None:
    """Copies what the epilogue of a part adds, in that epilogue's blocks."""
    (first, n), size = m.tasks(phase, part), block_tiles(plan, part, m.batch)

    def block(j: Index, carry: Carry) -> Carry:
        offset = jnp.minimum(j * size, n - size)
        frame = _frame(m, phase, plan, part, first + offset, iteration)
        fetch([(frame, leaves)])
        for id in leaves:
            m.store(_added(m, phase, plan, frame, part, id, offset), frame.values[id])
        return carry

    lax.fori_loop(0, lax.div(n + (size - 1), size), block, i32(0))


def _added(m: Machine, phase: FoldPhase, plan: FoldPlan, frame: Rows, part: int, id: int, offset: Index) -> Request:
    """Where an older tensor's rows of a part lie in shared memory: [part, tensor, sequence, row]."""
    tensor = phase.row_reads.index(m.graph.tensor_of[id])
    where = pl.ds(0, m.batch), pl.ds(offset * plan.rows, frame.count)
    return Request(m.refs[f"added.{phase.name}"], (part, tensor), None, where, frame.layout)


def row_leaves(m: Machine, frame: Rows, roots: tuple[int, ...]) -> list[int]:
    """Tensor nodes that a frame must load to evaluate `roots`. What this phase writes itself is computed, never read back."""
    parts = m.graph.code[frame.phase.name].parts
    fresh = {id for _, ids in parts for id in ids if m.graph.computes(frame.phase, id)}
    found, seen, stack = {}, set(frame.values) | {f for folds, _ in parts for f in folds}, list(roots)
    while stack:
        id = stack.pop()
        if id in seen and id not in fresh:
            continue
        seen.add(id)
        if id in m.graph.tensor_of and id not in fresh:
            found[id] = None
        elif m.graph.node(id).kind not in ("reduce", "fold"):
            stack.extend(m.graph.node(id).inputs)
    return list(found)


def store(m: Machine, frame: Rows, part: int, written: tuple[int, ...]) -> None:
    """Writes the finished values to their tensors."""
    for id, name in zip(written, frame.phase.parts[part].writes, strict=True):
        value = plgpu.layout_cast(frame.evaluate(id), frame.layout).astype(m.schedule.tensor(name).dtype)
        m.hand_over(name, frame.phase, frame.iteration, lambda slot, name=name: frame.at(name, slot), value)
