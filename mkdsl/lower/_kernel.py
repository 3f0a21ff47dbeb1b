"""The template: one persistent kernel of two roles that walk the same static queue.

mega: one launch runs every phase of every iteration, handing over through counters and self-validating data. phased: one launch per
phase, from the same tile code; it is what interpret mode runs on a CPU, and the ablation that shows what one launch buys.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax
from jax.experimental import pallas as pl

from mkdsl.graph import OpGraph, Phase, Segment
from mkdsl.lower import _exchange
from mkdsl.lower._events import signal
from mkdsl.lower._machine import COMPUTE, LOADER, Machine, f32, i32
from mkdsl.lower._operands import Operand, task_table
from mkdsl.lower._ring import barriers, drain, land_last
from mkdsl.lower._types import Buffer, Index, Ref
from mkdsl.lower._waits import first_note
from mkdsl.lower.mosaic._deadline import NOTE, publish, start_clock
from mkdsl.lower.mosaic._layouts import grid
from mkdsl.lower.phases import KINDS
from mkdsl.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class Scratch:
    """Shared memory and barriers of one worker, as (name, type); several names share the bytes of a union."""

    unions: tuple[tuple[tuple[str, ...], Buffer], ...]

    def types(self) -> list[Buffer]:
        return [t for _, t in self.unions]

    def bind(self, refs: Sequence[Ref]) -> dict[str, Ref]:
        out: dict[str, Ref] = {}
        for (names, union), ref in zip(self.unions, refs, strict=True):
            buffers = [buffer for group in ref for buffer in group] if isinstance(union, plgpu.RefUnion) else [ref]
            out |= dict(zip(names, buffers, strict=True))
        return out


def scratch(graph: OpGraph, schedule: Schedule, phases: Sequence[Phase], *, tma: bool, watched: bool) -> Scratch:
    """What these phases need: the ring under all its views, reductions, barriers, and in one union what a phase needs for itself."""
    views, needed = {}, []
    for phase in phases:
        plan, kind = schedule.plan(phase.name), KINDS[type(phase)]
        views |= kind.ring_views(phase, plan, schedule)
        needed += kind.buffers(phase, plan, schedule.padded_batch)
    columns = task_table(graph, schedule, watched=watched).shape[1]
    single = [("tasks", plgpu.SMEM((2, schedule.cluster, columns), i32))]
    single += [("exchange", plgpu.SMEM((_exchange.WORDS,), i32))] if schedule.cluster > 1 else []
    single += barriers(schedule.num_stages, tma=tma) if views else []
    single += _reductions(graph, schedule, phases)
    unions = [_union([{name: type} for name, type in views.items()]), _union(needed)] if views else []
    return Scratch((*unions, *(((name,), type) for name, type in single)))


def _union(alternatives: list[dict[str, Buffer]]) -> tuple[tuple[str, ...], Buffer]:
    """Groups of buffers of which one group lives at a time."""
    return tuple(name for group in alternatives for name in group), plgpu.RefUnion(*(tuple(group.values()) for group in alternatives))


def _reductions(graph: OpGraph, schedule: Schedule, phases: Sequence[Phase]) -> list[tuple[str, Buffer]]:
    slots = max((len(graph.code[p.name].stats) for p in phases), default=0)
    if not slots:
        return []
    split_k = max(schedule.plan(p.name).split_k for p in phases)
    rows = -(-schedule.padded_batch * split_k // 8) * 8
    received = [("received", plgpu.SMEM((schedule.cluster, slots, rows), f32))] if schedule.cluster > 1 else []
    return [("statistics", plgpu.SMEM((slots, rows), f32)), *received]


def make_kernel(
    graph: OpGraph,
    schedule: Schedule,
    found: Sequence[Operand],
    phases: Sequence[Phase],
    *,
    interpret: bool,
    concurrent: bool,
    tma: bool,
    deadline: float | None = None,
) -> Callable[..., None]:
    """The kernel of these phases. Called with the operands in order (written ones as refs), and, unless concurrent, the iteration [1]. deadline:
    seconds after which workers that wait for each other give up, or None."""
    room = scratch(graph, schedule, phases, tma=tma, watched=deadline is not None)

    def body(*refs: Ref) -> None:
        m = Machine(graph, schedule, interpret, concurrent, tma, deadline)
        m.refs = {o.name: r for o, r in zip(found, refs, strict=False)} | room.bind(refs[-len(room.unions) :])
        if schedule.cluster > 1:
            _exchange.start(m)
        warpgroup = lax.axis_index("wg")
        iteration = None if concurrent else refs[len(found)][0]
        pl.when(warpgroup == LOADER)(lambda: _role(m, phases, LOADER, _load, iteration))
        pl.when(warpgroup == COMPUTE)(lambda: _role(m, phases, COMPUTE, _compute, iteration))
        if schedule.cluster > 1 and deadline is not None:
            _exchange.finish(m)

    cluster: dict[str, Any] = {"cluster": (schedule.cluster,), "cluster_names": ("cta",)} if schedule.cluster > 1 else {}
    return plgpu.kernel(
        body, out_type=(), scratch_types=room.types(), num_threads=2, thread_name="wg",
        grid=(schedule.workers // schedule.cluster,), grid_names=("sm",), **cluster,
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )  # fmt: skip


def _role(m: Machine, phases: Sequence[Phase], role: int, run: Callable[..., Index], iteration: Index) -> None:
    """Walks the queue: every phase of every iteration, or one phase of one."""
    m.role = role
    for peer in range(m.schedule.cluster):
        _copy_tasks(m, role, peer)
    if role == COMPUTE and m.deadline is not None:
        start_clock(m.watched, round(1e9 * m.deadline))
    i = i32(0)
    if iteration is not None:
        for phase in phases:
            i = run(m, phase, iteration, i)
    else:
        for segment in m.graph.segments:
            i = _segment(m, segment, run, i)
    if role == LOADER and "full" in m.refs:
        land_last(m, i)
        if m.interpret:
            drain(m, i)
    if role == COMPUTE and m.deadline is not None:
        publish(m.watched, m.refs["counters"].at[pl.ds(first_note(m.graph) + NOTE * m.worker, NOTE)])


def _copy_tasks(m: Machine, role: int, peer: int) -> None:
    """The row of the task table of one worker of the cluster, for this role."""
    here, there = (role, peer), lax.axis_index("sm") * m.schedule.cluster + peer
    row, layout = m.refs["table"].at[there], grid(1, m.refs["tasks"].shape[-1]).reduce(0)
    m.refs["tasks"][here] = m.refs["table"][there] if m.interpret else plgpu.load(row, layout=layout, optimized=False)


def _segment(m: Machine, segment: Segment, run: Callable[..., Index], i: Index) -> Index:
    def once(iteration: Index, i: Index) -> Index:
        for name in segment.phases:
            i = run(m, m.graph.phase(name), iteration, i)
        return i

    return once(0, i) if segment.repeats == 1 else lax.fori_loop(0, segment.repeats, once, i)


def _load(m: Machine, phase: Phase, iteration: Index, i: Index) -> Index:
    return KINDS[type(phase)].load(m, phase, iteration, i)


def _compute(m: Machine, phase: Phase, iteration: Index, i: Index) -> Index:
    """One phase, if this worker has items of it or shares a peer's."""
    plan = m.schedule.plan(phase.name)

    def go(i: Index) -> Index:
        m.stamp(phase, iteration, "arrived")
        i = KINDS[type(phase)].compute(m, phase, iteration, i)
        signal(m, phase)
        m.stamp(phase, iteration, "signalled")
        return i

    if len(plan.participants) == m.schedule.workers:
        return go(i)
    counts = [m.tasks(phase, part, peer)[1] for part in range(len(phase.parts)) for peer in m.peers(phase)]
    return lax.cond(sum(counts[1:], counts[0]) > 0, go, lambda i: i, i)
