"""What is decided last, of one schedule: hand-offs, numbers of events and own rows. One thing is changed after the other, while the simulator
says that the step gets faster; tiles and ring stay."""

from mkdsl.graph import OpGraph
from mkdsl.search._draft import timed, with_memory
from mkdsl.search._own import edges, with_own
from mkdsl.search._profile import Profile
from mkdsl.search._protocol import made_safe, other_events, other_handoffs
from mkdsl.search._schedule import Schedule
from mkdsl.search._simulate import simulate
from mkdsl.search._sooner import sooner

WORTH = 0.005  # of a step: by how much workers must know sooner, on average, for other events to be simulated


def refined(graph: OpGraph, schedule: Schedule, gpu: Profile, *, handoffs: bool) -> Schedule:
    """The schedule with all of these changed for the better; hand-offs and events only if those may be."""
    if handoffs:
        schedule = _with_best_events(graph, _with_best_handoffs(graph, schedule, gpu), gpu)
    schedule = _with_own_rows(graph, schedule, gpu)
    if handoffs and any(t.handoff == "counter" for t in schedule.tensors):  # own rows may have made it needless
        schedule = _with_best_handoffs(graph, schedule, gpu)
    return schedule


def _with_best_handoffs(graph: OpGraph, schedule: Schedule, gpu: Profile) -> Schedule:
    """Changes one tensor's hand-off after the other, always the one that gains most, while the simulator says that this is faster."""
    quick = simulate(graph, schedule, gpu, drift=False).us
    promising = [s for _, s in other_handoffs(graph, schedule) if simulate(graph, s, gpu, drift=False).us < quick]
    safe = [s for changed in promising if (s := made_safe(graph, changed)) is not None]
    best = min((timed(graph, s, gpu) for s in safe), key=lambda s: s.predicted_us, default=schedule)
    return _with_best_handoffs(graph, best, gpu) if best.predicted_us < schedule.predicted_us else schedule


def _with_best_events(graph: OpGraph, schedule: Schedule, gpu: Profile) -> Schedule:
    """Changes one phase's number of events after the other, always to that by which workers know soonest, while the simulator says that this is
    faster. Where workers would hardly know sooner, that is not asked: simulating many groups takes long."""
    timeline = simulate(graph, schedule, gpu, drift=False)
    found = [(sooner(graph, schedule, s, timeline), s) for _, s in other_events(graph, schedule)]
    safe = [(us, s) for us, changed in found if us > WORTH * timeline.us and (s := made_safe(graph, changed)) is not None]
    if not safe:
        return schedule
    best = timed(graph, max(safe, key=lambda found: found[0])[1], gpu)
    return _with_best_events(graph, best, gpu) if best.predicted_us < schedule.predicted_us else schedule


def _with_own_rows(graph: OpGraph, schedule: Schedule, gpu: Profile) -> Schedule:
    """Has workers keep the rows that they add later, tensor by tensor, where there is room and the simulator does not say that the tasks and
    waits for it are slower. That there is nothing to fetch is faster, but not simulated."""
    for edge in edges(graph):
        options = [s for s in (with_memory(graph, s) for s in with_own(graph, schedule, *edge)) if s.smem_bytes <= gpu.smem_bytes]
        if len(options) > 1:
            options.sort(key=lambda s: simulate(graph, s, gpu, drift=False).us)
        safe = made_safe(graph, options[0]) if options else None
        if safe is not None:
            kept = safe if _plays_alike(safe, schedule) else timed(graph, safe, gpu)
            schedule = kept if kept.predicted_us <= schedule.predicted_us else schedule
    return schedule


def _plays_alike(a: Schedule, b: Schedule) -> bool:
    """Whether two schedules of the same tiles are the same to the simulator."""
    return a.tensors == b.tensors and all((p.tasks, p.waits) == (q.tasks, q.waits) for p, q in zip(a.phases, b.phases, strict=True))
