"""What is decided last, of one schedule: its hand-offs. One is changed after the other, while the simulator says that the step gets faster; tiles
and ring stay."""

from mkdsl.graph import OpGraph
from mkdsl.schedule import Profile, Schedule
from mkdsl.search._draft import timed
from mkdsl.search._handoffs import made_safe, other_handoffs
from mkdsl.simulate import simulate


def with_best_handoffs(graph: OpGraph, schedule: Schedule, gpu: Profile) -> Schedule:
    """Changes one tensor's hand-off after the other, always the one that gains most, while the simulator says that this is faster."""
    quick = simulate(graph, schedule, gpu, drift=False).us
    promising = [s for _, s in other_handoffs(graph, schedule) if simulate(graph, s, gpu, drift=False).us < quick]
    safe = [s for changed in promising if (s := made_safe(graph, changed)) is not None]
    best = min((timed(graph, s, gpu) for s in safe), key=lambda s: s.predicted_us, default=schedule)
    return with_best_handoffs(graph, best, gpu) if best.predicted_us < schedule.predicted_us else schedule
