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

from mkdsl.graph import OpGraph, Phase
from mkdsl.lower import _exchange
from mkdsl.lower._attention import attention_phase, carry_words, query_columns
from mkdsl.lower._fold import fold_phase
from mkdsl.lower._layouts import grid
from mkdsl.lower._loader import drain, land_last, load_phase
from mkdsl.lower._machine import COMPUTE, LOADER, Machine, bf16, f32, i32
from mkdsl.lower._map import map_phase
from mkdsl.lower._operands import Operand, task_table
from mkdsl.lower._signals import signal
from mkdsl.lower._tiles import ROWS, Tile, kv_view
from mkdsl.search import PhasePlan, Schedule


@dataclasses.dataclass(frozen=True)
class Scratch:
    """Shared memory and barriers of one worker, as (name, type); several names share the bytes of a union."""

    unions: tuple[tuple[tuple[str, ...], Any], ...]

    def types(self) -> list[Any]:
        return [t for _, t in self.unions]

    def bind(self, refs: Sequence[Any]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for (names, union), ref in zip(self.unions, refs, strict=True):
            buffers = [buffer for group in ref for buffer in group] if isinstance(union, plgpu.RefUnion) else [ref]
            out |= dict(zip(names, buffers, strict=True))
        return out


def scratch(graph: OpGraph, schedule: Schedule, phases: Sequence[Phase], *, tma: bool) -> Scratch:
    """What these phases need: the ring under all its views, reductions, barriers, and in one union what lives in one phase only."""
    ring, own = {}, []
    for phase in phases:
        plan = schedule.plan(phase.name)
        if phase.kind == "fold":
            views = Tile.of(phase, plan, schedule.padded_batch).views(schedule.stages, schedule.stage_bytes)
            ring[f"written.{phase.name}"], ring[f"read.{phase.name}"] = views
            own.append(_fold(phase, plan, schedule.padded_batch))
            if plan.instruction == "wgmma":
                own.append({f"operand.{phase.name}": Tile.of(phase, plan, schedule.padded_batch).operand()})
        if phase.kind == "attention":
            ring[f"stage.{phase.name}"] = kv_view(schedule.stages, schedule.stage_bytes, phase.head_dim)
            own.append(_attention(phase, plan))
    single = [("tasks", plgpu.SMEM((2, schedule.cluster, task_table(graph, schedule).shape[1]), i32))]
    single += [("exchange", plgpu.SMEM((_exchange.WORDS,), i32))] if schedule.cluster > 1 else []
    single += _barriers(schedule.stages, 2 if tma else 1) if ring else []
    single += _reductions(graph, schedule, phases)
    unions = [_union([{name: type} for name, type in ring.items()]), _union(own)] if ring else []
    return Scratch((*unions, *(((name,), type) for name, type in single)))


def _union(alternatives: list[dict[str, Any]]) -> tuple[tuple[str, ...], Any]:
    """Groups of buffers of which one group lives at a time."""
    return tuple(name for group in alternatives for name in group), plgpu.RefUnion(*(tuple(group.values()) for group in alternatives))


def _fold(phase: Phase, plan: PhasePlan, batch: int) -> dict[str, Any]:
    """The staged operand, finished rows, and the older rows that are added to them."""
    slots = plan.slots(phase)
    rows = (slots, ROWS, batch) if batch >= 8 else (batch, slots, ROWS)
    buffers = {
        f"resident.{phase.name}": Tile.of(phase, plan, batch).resident(),
        f"rows.{phase.name}": plgpu.SMEM((plan.sets, *rows), f32),
    }
    if added := len(phase.row_reads):
        buffers[f"side.{phase.name}"] = plgpu.SMEM((len(phase.parts), added, batch, plan.group * plan.rows), f32)
    return buffers


def _attention(phase: Phase, plan: PhasePlan) -> dict[str, Any]:
    columns, d = query_columns(phase), phase.head_dim
    buffers = {
        "q": plgpu.SMEM((columns, d), bf16),
        "p": plgpu.SMEM((plan.chunk, columns), bf16),
        "out": plgpu.SMEM((d, columns), f32),
        "score": plgpu.SMEM((columns,), f32),
        "own": plgpu.SMEM((2, d), bf16),
    }
    if plan.cluster > 1:
        buffers["received"] = plgpu.SMEM((plan.sets, carry_words(phase)), f32)
    return {f"{name}.{phase.name}": buffer for name, buffer in buffers.items()}


def _barriers(stages: int, arrivals: int) -> list[tuple[str, Any]]:
    """`arrivals`: two copies by TMA, each of which arrives by itself, or the loader once."""
    return [("full", plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages)), ("empty", plgpu.Barrier(num_barriers=stages))]


def _reductions(graph: OpGraph, schedule: Schedule, phases: Sequence[Phase]) -> list[tuple[str, Any]]:
    slots = max((len(graph.code[p.name].stats) for p in phases), default=0)
    if not slots:
        return []
    parts = max(schedule.plan(p.name).parts for p in phases)
    rows = -(-schedule.padded_batch * parts // 8) * 8
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
) -> Callable[..., None]:
    """The kernel of these phases. Called with the operands in order (written ones as refs), and, unless concurrent, the iteration [1]."""
    room = scratch(graph, schedule, phases, tma=tma)

    def body(*refs: Any) -> None:
        m = Machine(graph, schedule, interpret, concurrent, tma)
        m.refs = {o.name: r for o, r in zip(found, refs, strict=False)} | room.bind(refs[-len(room.unions) :])
        for phase in phases:
            if phase.kind == "fold":
                m.refs[f"stage.{phase.name}"] = (m.refs[f"written.{phase.name}"], m.refs[f"read.{phase.name}"])
        if schedule.cluster > 1:
            _exchange.start(m)
        warpgroup = lax.axis_index("wg")
        iteration = None if concurrent else refs[len(found)][0]
        pl.when(warpgroup == LOADER)(lambda: _role(m, phases, LOADER, load_phase, iteration))
        pl.when(warpgroup == COMPUTE)(lambda: _role(m, phases, COMPUTE, _compute, iteration))

    cluster: dict[str, Any] = {"cluster": (schedule.cluster,), "cluster_names": ("cta",)} if schedule.cluster > 1 else {}
    return plgpu.kernel(
        body, out_type=(), scratch_types=room.types(), num_threads=2, thread_name="wg",
        grid=(schedule.workers // schedule.cluster,), grid_names=("sm",), **cluster,
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )  # fmt: skip


def _role(m: Machine, phases: Sequence[Phase], role: int, run: Callable[..., Any], iteration: Any) -> None:
    """Walks the queue: every phase of every iteration, or one phase of one."""
    m.role = role
    for mate in range(m.schedule.cluster):
        _copy_tasks(m, role, mate)
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


def _copy_tasks(m: Machine, role: int, mate: int) -> None:
    """The row of the task table of one worker of the cluster, for this role."""
    here, there = (role, mate), lax.axis_index("sm") * m.schedule.cluster + mate
    row, layout = m.refs["table"].at[there], grid(1, m.refs["tasks"].shape[-1]).reduce(0)
    m.refs["tasks"][here] = m.refs["table"][there] if m.interpret else plgpu.load(row, layout=layout, optimized=False)


def _segment(m: Machine, segment: Any, run: Callable[..., Any], i: Any) -> Any:
    def once(l: Any, i: Any) -> Any:
        for name in segment.phases:
            i = run(m, m.graph.phase(name), l, i)
        return i

    return once(0, i) if segment.repeats == 1 else lax.fori_loop(0, segment.repeats, once, i)


def _compute(m: Machine, phase: Phase, l: Any, i: Any) -> Any:
    plan, run = m.schedule.plan(phase.name), {"fold": fold_phase, "attention": attention_phase, "map": map_phase}[phase.kind]

    def go(i: Any) -> Any:
        m.stamp(phase, l, "arrived")
        i = run(m, phase, l, i)
        signal(m, phase)
        m.stamp(phase, l, "signalled")
        return i

    if len(plan.participants) == m.schedule.workers:
        return go(i)
    counts = [m.tasks(phase, part, mate)[1] for part in range(len(phase.parts)) for mate in m.mates(phase)]
    return lax.cond(sum(counts[1:], counts[0]) > 0, go, lambda i: i, i)
