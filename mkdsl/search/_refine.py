"""What is decided last, of one schedule: hand-offs, and where two warpgroups fold. One thing is changed after the other, while the simulator
says that the step gets faster; tiles and ring stay."""

from collections.abc import Iterator

from mkdsl.graph import OpGraph
from mkdsl.search._cost import Ring
from mkdsl.search._draft import in_turns, timed
from mkdsl.search._profile import Profile
from mkdsl.search._protocol import made_safe, other_handoffs
from mkdsl.search._schedule import Schedule
from mkdsl.search._simulate import simulate
from mkdsl.search._work import Workload


def refined(graph: OpGraph, schedule: Schedule, gpu: Profile, *, handoffs: bool) -> Schedule:
    """The schedule with both changed for the better; hand-offs only if those may be."""
    if handoffs:
        schedule = _with_best_handoffs(graph, schedule, gpu)
    return _with_turns(graph, schedule, gpu)


def _with_best_handoffs(graph: OpGraph, schedule: Schedule, gpu: Profile) -> Schedule:
    """Changes one tensor's hand-off after the other, always the one that gains most, while the simulator says that this is faster."""
    quick = simulate(graph, schedule, gpu, drift=False).us
    promising = [s for _, s in other_handoffs(graph, schedule) if simulate(graph, s, gpu, drift=False).us < quick]
    safe = [s for changed in promising if (s := made_safe(graph, changed)) is not None]
    best = min((timed(graph, s, gpu) for s in safe), key=lambda s: s.predicted_us, default=schedule)
    return _with_best_handoffs(graph, best, gpu) if best.predicted_us < schedule.predicted_us else schedule


def _with_turns(graph: OpGraph, schedule: Schedule, gpu: Profile) -> Schedule:
    """Has a second warpgroup fold, in fold after fold that is bound by compute, where there is room for it."""
    for name in _bound_by_compute(graph, schedule, gpu) if gpu.warpgroups > 1 else ():
        changed = in_turns(graph, schedule, {name, *(p.name for p in schedule.phases if p.warpgroups > 1)})
        if changed.smem_bytes <= gpu.smem_bytes:
            changed = timed(graph, changed, gpu)
            schedule = changed if changed.predicted_us < schedule.predicted_us else schedule
    return schedule


def _bound_by_compute(graph: OpGraph, schedule: Schedule, gpu: Profile) -> Iterator[str]:
    """Folds whose units take longer than they take to come."""
    s, gpu = schedule, gpu.launched(schedule.cluster)
    rate, workload = Ring(s.stage_bytes, s.window).bandwidth(gpu), Workload(graph, s.batch, s.padded_batch, gpu)
    for phase in (p for p in graph.phases if p.kind == "fold"):
        plan = s.plan(phase.name)
        work = workload.of(phase, plan, max(map(plan.folded, range(s.workers)), key=sum), {t.name: t.splits for t in s.tensors})
        if work.unit_us > work.streamed_bytes / rate:
            yield phase.name
