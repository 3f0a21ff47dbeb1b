"""What other numbers of events could gain, told from the timeline of a schedule: cheap enough to decide what is worth simulating."""

import numpy as np

from mkdsl.graph import OpGraph, Phase
from mkdsl.search._groups import awaited, signalled
from mkdsl.search._schedule import Schedule
from mkdsl.search._simulate import Timeline


def sooner(graph: OpGraph, schedule: Schedule, other: Schedule, timeline: Timeline) -> float:
    """By how many microseconds of a step workers would, on average, know sooner that their events have come if these were those of `other`, the
    same schedule but for numbers of events, and everybody signalled when they do in a timeline of `schedule`."""
    total = 0.0
    for phase in graph.phases:
        for before in map(graph.phase, schedule.plan(phase.name).waits):
            now, then = (_come(graph, s, timeline, phase, before) for s in (schedule, other))
            total += float((now - then).mean()) * graph.iterations(phase)
    return total


def _come(graph: OpGraph, schedule: Schedule, timeline: Timeline, phase: Phase, before: Phase) -> np.ndarray:
    """[worker]: when the last of the events of a phase before has come that it waits for; 0 if it waits for none."""
    signals = signalled(before, schedule.plan(before.name))
    come = np.where(signals, _signalled_at(timeline, schedule.workers, before.name)[:, None], 0.0).max(axis=0)
    return np.where(awaited(graph, schedule, phase, before), come, 0.0).max(axis=1)


def _signalled_at(timeline: Timeline, workers: int, phase: str) -> np.ndarray:
    """[worker]: when it signalled in the last iteration; 0 if it takes no part."""
    out = np.zeros(workers)
    for span in timeline.spans:
        if span.phase == phase:  # in order of iterations
            out[list(timeline.crews[span.crew])] = span.signalled
    return out
