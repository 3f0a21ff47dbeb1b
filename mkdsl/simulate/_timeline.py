"""What a simulation says: the spans of every phase's executions, and the times that follow from them."""

import collections
import dataclasses
import itertools
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from mkdsl.graph import OpGraph

SETTLED = 2  # iterations of a loop until it is in steady state
PARTS = (("wait", "arrived", "known"), ("read", "known", "read"), ("fold", "read", "folded"), ("epilogue", "folded", "signalled"))


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
    """What the simulation says, or what a kernel's own stamps say.

    cohorts: the workers of each, by their numbers. spans: of all cohorts. us: of one step. phase_us: of one execution of each phase in the steady
    state of its loop, from the last signal of all phases before to its own last signal. events: how many the simulation took; none were measured.
    """

    cohorts: tuple[tuple[int, ...], ...]
    spans: tuple[Span, ...]
    us: float
    phase_us: tuple[tuple[str, float], ...]
    events: int

    def parts_us(self, phase: str) -> dict[str, float]:
        """What the median worker does in one execution of a phase in the steady state of its loop: it waits, reads, folds, and runs its epilogue."""
        spans = [s for s in self.spans if s.phase == phase]
        last = max(s.iteration for s in spans)
        steady = [s for s in spans if s.iteration >= min(SETTLED, last) for _ in self.cohorts[s.cohort]]
        return {name: statistics.median(getattr(s, end) - getattr(s, start) for s in steady) for name, start, end in PARTS}

    def __repr__(self) -> str:
        return (
            f"<Timeline of {self.us:.1f} us: {len(self.phase_us)} phases, {len(self.cohorts)} cohorts of workers, {len(self.spans)} spans>"
        )


def timeline(graph: OpGraph, repeats: Sequence[int], cohorts: tuple[tuple[int, ...], ...], spans: Sequence[Span], events: int) -> Timeline:
    """The timeline of these spans. repeats: how many iterations of each segment were simulated; the rest is counted like the last two."""
    took, end = _took(graph, spans)
    phase_us = []
    for phase in graph.phases:
        last = range(max(0, repeats[phase.segment] - 2), repeats[phase.segment])
        phase_us.append((phase.name, sum(took[phase.name, i] for i in last) / len(last)))
    skipped = [segment.repeats - n for segment, n in zip(graph.segments, repeats, strict=True)]
    counted = sum(skipped[graph.phase(name).segment] * us for name, us in phase_us)
    return Timeline(cohorts, tuple(spans), end + counted, tuple(phase_us), events)


def observed(graph: OpGraph, cohorts: tuple[tuple[int, ...], ...], spans: Sequence[Span]) -> Timeline:
    """The timeline of all spans of a step, as they were measured. Iterations are not alike, so a phase's time is the median of those in steady state."""
    took, end = _took(graph, spans)

    def median(name: str, repeats: int) -> float:
        return statistics.median(took[name, i] for i in range(min(SETTLED, repeats - 1), repeats))

    return Timeline(cohorts, tuple(spans), end, tuple((p.name, median(p.name, graph.iterations(p))) for p in graph.phases), 0)


def _took(graph: OpGraph, spans: Sequence[Span]) -> tuple[dict[tuple[str, int], float], float]:
    """(how long each step took after all before it had ended, when the last one ended)."""
    ends = _ends(graph, spans)
    before = (0.0, *itertools.accumulate(ends.values(), max))  # phases side by side need not end in order
    return {key: max(0.0, end - latest) for (key, end), latest in zip(ends.items(), before, strict=False)}, max(ends.values())


def _ends(graph: OpGraph, spans: Sequence[Span]) -> dict[tuple[str, int], float]:
    """When the last worker signalled each step, in program order."""
    ends: dict[tuple[str, int], float] = collections.defaultdict(float)
    for span in spans:
        key = span.phase, span.iteration
        ends[key] = max(ends[key], span.signalled)
    return {key: ends[key] for key in sorted(ends, key=lambda key: (graph.phase(key[0]).segment, key[1], graph.order[key[0]]))}
