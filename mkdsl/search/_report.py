"""A schedule in words and numbers: what was decided and what came second, where time should go and what bounds it, shared memory."""

import statistics
from collections.abc import Sequence

from mkdsl.graph import OpGraph, Phase
from mkdsl.schedule import KIB, Profile, Schedule, TensorPlan, shared_memory
from mkdsl.search._alternatives import Alternative, next_best, next_handoffs
from mkdsl.search._cost import floor_us
from mkdsl.simulate import Timeline, Workload, simulate

# Headings of tables; below one with ">" stand numbers, to the right.
CHOSEN = ("phase", ">runs", "kind", ">items", ">workers", "tiling", "waits for", "fence")
TENSORS = ("tensor", "hand-off", ">slots", ">splits", "dtype")
TIMES = ("phase", ">MB", ">us", ">memory us", ">wait", ">read", ">fold", ">epilogue", "bound by")
SECOND = ("phase or tensor", "instead", ">us")
HIDDEN = 0.15  # of a phase's time: less than this between it and its bound is bound by it


def explain(graph: OpGraph, schedule: Schedule, profile: Profile, *, alternatives: bool = True) -> str:
    """A readable plain-text account of a schedule.

    Args:
      graph: what it is a schedule of.
      schedule: the schedule.
      profile: the GPU it is for.
      alternatives: also what came second for each phase and tensor, which takes another search or so.

    Returns:
      Tables of what was decided per phase, of the predicted time of one execution in the steady state of its loop (streamed megabytes,
      what device memory alone needs for them, and the median worker's wait for its input, reading it, folding and its epilogue), of hand-offs,
      and shared memory over the schedule. Times are the simulator's, in microseconds.
    """
    graph, s, timeline = graph.in_order(schedule.order), schedule, simulate(graph, schedule, profile)
    padding = f" (padded to {s.padded_batch})" if s.padded_batch != s.batch else ""
    lines = [f"{s.target}, batch {s.batch}{padding}, {s.workers} workers"]
    lines += ["what was decided (runs: in a step; items: of each part, spread over the workers):"]
    lines += _table([CHOSEN, *(_chosen(p, graph, s) for p in graph.phases)])
    lines += [f"ring: {s.num_stages} stages of {s.stage_bytes // KIB} KiB, {s.max_in_flight} in flight"]
    lines += [
        "what crosses phases (slots: that iterations use in turn; splits: partial results, which readers merge):",
        *_tensors(graph, s),
    ]
    lines += [
        "where time goes (us: from signal to signal; memory us: what device memory alone needs; wait to epilogue: the median worker's):"
    ]
    lines += _table([TIMES, *(_times(p, graph, s, timeline, profile) for p in graph.phases)])
    if alternatives:
        lines += [
            "what came second (us more a step): of phases by the cost model, of tensors by the simulator",
            *_second(graph, s, profile),
        ]
    memory = shared_memory(graph, s.phases, padded_batch=s.padded_batch, num_stages=s.num_stages, stage_bytes=s.stage_bytes)
    lines += ["shared memory of a worker, over the schedule:", str(memory)]
    floor = floor_us(graph, s.batch, profile)
    lines += [f"predicted: {s.predicted_us:.0f} us a step; floor {floor:.0f} us (streamed bytes at {profile.bandwidth / 1e12:.2f} TB/s)"]
    return "\n".join(lines)


def _chosen(phase: Phase, graph: OpGraph, schedule: Schedule) -> tuple[str, ...]:
    plan, runs = schedule.plan(phase.name), f"{graph.iterations(phase)} x"
    items = "+".join(str(sum(n for _, n in part)) for part in plan.tasks)
    waits = ", ".join(plan.waits) or "-"
    return phase.name, runs, phase.kind, items, str(len(plan.participants)), plan.tiling, waits, "yes" if plan.fence else "-"


def _tensors(graph: OpGraph, schedule: Schedule) -> list[str]:
    def row(t: TensorPlan) -> tuple[str, ...]:
        return t.name, "output" if graph.tensors[t.name].output else t.handoff, str(t.incarnations), str(t.splits), t.dtype

    return _table([TENSORS, *map(row, schedule.tensors)])


def _times(phase: Phase, graph: OpGraph, schedule: Schedule, timeline: Timeline, profile: Profile) -> tuple[str, ...]:
    last = max(s.iteration for s in timeline.spans if s.phase == phase.name)
    spans = [s for s in timeline.spans if (s.phase, s.iteration) == (phase.name, last) for _ in timeline.cohorts[s.cohort]]
    parts = (("arrived", "known"), ("known", "read"), ("read", "folded"), ("folded", "signalled"))
    wait, read, fold, epilogue = (statistics.median(getattr(s, b) - getattr(s, a) for s in spans) for a, b in parts)
    us, streamed = dict(timeline.phase_us)[phase.name], phase.streamed_bytes(schedule.batch)
    memory = streamed / profile.bandwidth * 1e6
    bound = _bound(us, memory, _compute(phase, graph, schedule, profile))
    return (phase.name, f"{streamed / 1e6:.1f}", *(f"{x:.1f}" for x in (us, memory, wait, read, fold, epilogue)), bound)


def _compute(phase: Phase, graph: OpGraph, schedule: Schedule, profile: Profile) -> float:
    """Microseconds of arithmetic and pauses of the busiest worker."""
    workload = Workload(graph, schedule.batch, schedule.padded_batch, profile)
    splits, plan = {t.name: t.splits for t in schedule.tensors}, schedule.plan(phase.name)
    works = [workload.of(phase, plan, counts, splits) for counts in {plan.folded(w) for w in plan.participants}]
    return max(w.units * w.unit_us + w.pauses for w in works)


def _bound(us: float, memory: float, compute: float) -> str:
    """A phase near the time of its bytes is bound by memory (below it, its first units were in the ring already), one near that of its
    arithmetic by compute, any other by the latency of its hand-off and its short dependent steps."""
    if memory >= (1 - HIDDEN) * us:
        return "memory"
    return "compute" if compute >= (1 - HIDDEN) * us else f"latency ({us - max(memory, compute):.1f} us)"


def _second(graph: OpGraph, schedule: Schedule, profile: Profile) -> list[str]:
    found: Sequence[Alternative] = (*next_best(graph, schedule, profile), *next_handoffs(graph, schedule, profile))
    return _table([SECOND, *((a.of, a.what, f"{a.us:+.1f}") for a in found)])


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell."""
    columns = []
    for heading, *cells in zip(*rows, strict=True):
        number, cells = heading.startswith(">"), [heading.removeprefix(">"), *cells]
        width = max(map(len, cells))
        columns.append([c.rjust(width) if number else c.ljust(width) for c in cells])
    return [("  " + "  ".join(row)).rstrip() for row in zip(*columns, strict=True)]
