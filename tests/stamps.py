"""What a kernel's stamps would be if it did as the simulator says: the way back, for what reads them."""

import numpy as np

from mkdsl.gpu import measured_timeline
from mkdsl.graph import OpGraph
from mkdsl.schedule import Profile, Schedule
from mkdsl.simulate import Timeline, simulate

ALMOST_AROUND = (1 << 32) - 20_000  # nanoseconds: the clock's low bits wrap around while the step runs


def stamps_of(graph: OpGraph, timeline: Timeline, pace: float = 1.0, start: int = ALMOST_AROUND) -> np.ndarray:
    """int32 [workers, steps, 5], as `Program.timed` returns it. pace: by which all takes longer. start: the clock at the beginning."""
    steps = {key: n for n, key in enumerate((name, i) for s in graph.segments for i in range(s.repeats) for name in s.phases)}
    stamps = np.zeros((sum(map(len, timeline.cohorts)), len(steps), 5), np.int64)
    for span in timeline.spans:
        for worker in timeline.cohorts[span.cohort]:
            stamps[worker, steps[span.phase, span.iteration]] = [start + round(1e3 * pace * us) for us in span[3:]]
    return stamps.astype(np.uint32).view(np.int32)


def stamped(graph: OpGraph, schedule: Schedule, gpu: Profile, pace: float = 1.0) -> Timeline:
    """The timeline of such stamps."""
    graph = graph.in_order(schedule.order)
    return measured_timeline(graph, stamps_of(graph, simulate(graph, schedule, gpu, whole=True), pace))
