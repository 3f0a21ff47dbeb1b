"""Finishes: rows of finished tiles, whatever elementwise code follows them, and their way to other workers."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mkdsl.graph import Phase
from mkdsl.lower._frames import Rows, fetch
from mkdsl.lower._machine import Machine, Request, i32, zeros
from mkdsl.search import FRAME, PhasePlan


def finish_size(plan: PhasePlan, part: int, batch: int) -> int:
    """Tiles finished at once: the smallest group that any worker has, so that every group is covered by overlapping blocks of this size, but
    no more than a few values per thread, whose code is written out."""
    rounds = plan.rounds(part) if plan.cluster > 1 else None
    smallest = min((n // (rounds or -(-n // plan.group)) for _, n in plan.tasks[part] if n), default=1)
    return max(1, min(smallest, FRAME // (plan.rows * batch)))


def finish_part(m: Machine, phase: Phase, part: int, first: Any, at: Any, count: Any, base: Any, sets: Sequence[Any], l: Any) -> None:
    """Finishes tiles [first + at, + count), whose rows lie in slots from `base` on, matrix by matrix, as sums of all `sets`.

    In blocks of a fixed size; the last one overlaps the one before, which writes the same values twice.
    """
    size = finish_size(m.schedule.plan(phase.name), part, m.batch)

    def block(j: Any, carry: Any) -> Any:
        offset = jnp.minimum(j * size, count - size)
        frame = _frame(m, phase, part, first + at + offset, l)
        slots = [base + z * count + offset for z in range(len(m.graph.code[phase.name].parts[part][0]))]
        _fold_values(m, phase, part, frame, slots, sets)
        written = m.graph.code[phase.name].parts[part][1]
        leaves = row_leaves(m, frame, written)
        _from_side(m, frame, part, leaves, at + offset)
        fetch([(frame, leaves)])
        store(m, frame, part, written)
        return carry

    lax.fori_loop(0, lax.div(count + (size - 1), size), block, i32(0))


def _frame(m: Machine, phase: Phase, part: int, tile: Any, l: Any) -> Rows:
    plan = m.schedule.plan(phase.name)
    return Rows(m, phase, l, sequence=0, sequences=m.batch, first=tile * plan.rows, count=finish_size(plan, part, m.batch) * plan.rows)


def _fold_values(m: Machine, phase: Phase, part: int, frame: Rows, slots: list[Any], sets: Sequence[Any]) -> None:
    """The folds' own rows: each the sum of its parts, of all sets."""
    plan, rows = m.schedule.plan(phase.name), m.refs[f"rows.{phase.name}"]
    for fold, slot in zip(m.graph.code[phase.name].parts[part][0], slots, strict=True):
        where = pl.ds(slot * plan.rows, frame.count)

        def piece(p: Any, where: Any = where) -> jax.Array:
            if m.batch >= 8:
                view = (rows.shape[1] * plan.rows, plan.parts, m.batch)
                each = [m.load(Request(rows, (s,), view, (where, p, pl.ds(0, m.batch)), frame.layout, transposed=True)) for s in sets]
            else:
                view = (m.batch, rows.shape[2] * plan.rows, plan.parts)
                each = [m.load(Request(rows, (s,), view, (pl.ds(0, m.batch), where, p), frame.layout)) for s in sets]
            return functools.reduce(jnp.add, each)

        if m.batch >= 8 and plan.parts > 1:  # a loop where code is scarcer than time
            frame.values[fold] = m.times(plan.parts, lambda p, total, piece=piece: total + piece(p), zeros(frame.shape, frame.layout))
        else:
            frame.values[fold] = functools.reduce(lambda total, p, piece=piece: total + piece(p), range(1, plan.parts), piece(0))


def preload(m: Machine, phase: Phase, l: Any) -> None:
    """Copies the rows of older tensors that the finish adds to shared memory, while there is nothing else to do."""
    plan = m.schedule.plan(phase.name)
    if plan.grouped:
        return
    for part, (_, written) in enumerate(m.graph.code[phase.name].parts):
        if leaves := row_leaves(m, _frame(m, phase, part, 0, l), written):
            _copy(m, phase, part, leaves, l)


def _copy(m: Machine, phase: Phase, part: int, leaves: list[int], l: Any) -> None:
    """Copies what the finish of a part adds, in the blocks of that finish."""
    (first, n), size = m.tasks(phase, part), finish_size(m.schedule.plan(phase.name), part, m.batch)

    def block(j: Any, carry: Any) -> Any:
        offset = jnp.minimum(j * size, n - size)
        frame = _frame(m, phase, part, first + offset, l)
        fetch([(frame, leaves)])
        for id in leaves:
            m.store(_side(m, frame, part, id, offset), frame.values[id])
        return carry

    lax.fori_loop(0, lax.div(n + (size - 1), size), block, i32(0))


def _side(m: Machine, frame: Rows, part: int, id: int, offset: Any) -> Request:
    """Where an older tensor's rows of a part lie in shared memory: [part, tensor, sequence, row]."""
    plan, slot = m.schedule.plan(frame.phase.name), frame.phase.row_reads.index(m.graph.tensor_of[id])
    where = pl.ds(0, m.batch), pl.ds(offset * plan.rows, frame.count)
    return Request(m.refs[f"side.{plan.name}"], (part, slot), None, where, frame.layout)


def _from_side(m: Machine, frame: Rows, part: int, leaves: list[int], offset: Any) -> None:
    """The older rows that are in shared memory already."""
    if not m.schedule.plan(frame.phase.name).grouped:
        frame.values |= {id: m.load(_side(m, frame, part, id, offset)) for id in leaves}


def row_leaves(m: Machine, frame: Rows, roots: tuple[int, ...]) -> list[int]:
    """Tensor nodes that a frame must load to evaluate `roots`. What this phase writes itself is computed, never read back."""
    parts = m.graph.code[frame.phase.name].parts
    fresh = {id for _, ids in parts for id in ids if m.graph.tensor_of.get(id) in (None, *frame.phase.writes)}  # not what is only handed on
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
        tensor = m.graph.tensors[name]
        value = plgpu.layout_cast(frame.evaluate(id), frame.layout).astype(m.schedule.tensor(name).dtype)
        inside = m.home(name) == frame.phase.segment
        instance = (frame.l + 1 if tensor.carried else frame.l) if inside else 0
        m.hand_over(name, instance, lambda inc, name=name: frame.at(name, inc), value, clears=inside)
