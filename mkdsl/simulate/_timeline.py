"""What a simulation says: the spans of every phase's executions, and the times that follow from them."""

import collections
import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from mkdsl.graph import OpGraph


class Span(NamedTuple):
    """One execution of a phase by one cohort of workers. Microseconds at which compute arrives; knows that its input is there; has read it; has
    folded its units; has signalled."""

    cohort: int
    phase: str
    iteration: int
    arrived: float
    known: float
    read: float
    folded: float
    signalled: float


@dataclasses.dataclass(frozen=True)
class Timeline:
    """What the simulation says.

    cohorts: the workers of each, by their numbers. spans: of all cohorts. us: of one step. phase_us: of one execution of each phase in the steady
    state of its loop, from the last signal of all phases before to its own last signal. events: how many the simulation took.
    """

    cohorts: tuple[tuple[int, ...], ...]
    spans: tuple[Span, ...]
    us: float
    phase_us: tuple[tuple[str, float], ...]
    events: int


def timeline(graph: OpGraph, repeats: Sequence[int], cohorts: tuple[tuple[int, ...], ...], spans: Sequence[Span], events: int) -> Timeline:
    """The timeline of these spans. repeats: how many iterations of each segment were simulated; the rest is counted like the last two."""
    ends = _ends(graph, spans)
    before = (0.0, *itertools.accumulate(ends.values(), max))  # phases side by side need not end in order
    took = {key: max(0.0, end - latest) for (key, end), latest in zip(ends.items(), before, strict=False)}
    phase_us = []
    for phase in graph.phases:
        last = range(max(0, repeats[phase.segment] - 2), repeats[phase.segment])
        phase_us.append((phase.name, sum(took[phase.name, i] for i in last) / len(last)))
    skipped = [segment.repeats - n for segment, n in zip(graph.segments, repeats, strict=True)]
    counted = sum(skipped[graph.phase(name).segment] * us for name, us in phase_us)
    return Timeline(cohorts, tuple(spans), max(ends.values()) + counted, tuple(phase_us), events)


def _ends(graph: OpGraph, spans: Sequence[Span]) -> dict[tuple[str, int], float]:
    """When the last worker signalled each step, in program order."""
    ends: dict[tuple[str, int], float] = collections.defaultdict(float)
    for span in spans:
        key = span.phase, span.iteration
        ends[key] = max(ends[key], span.signalled)
    return {key: ends[key] for key in sorted(ends, key=lambda key: (graph.phase(key[0]).segment, key[1], graph.order[key[0]]))}
