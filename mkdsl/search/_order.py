"""The order in which a schedule's steps happen, proved by vector clocks.

A step is one phase in one iteration. Every worker walks the steps in program order and takes part in those it has items of. A step's
event has come when all who take part in it have signalled, which they do after their reads and writes. `clock[w, v]` says up to which
step worker w, starting a step, knows worker v to be done: its own program order, joined with the events it waited for.

Loops are unrolled to a few iterations. That suffices: a path between steps of iterations i and j runs through iterations i to j only, all
waits inside a loop reach back at most one iteration, and the steps and waits of iteration i + 1 are those of i, shifted. So whether one
step happens before another d iterations later does not depend on i, and what must be proved of a tensor spans at most as many iterations as
it has incarnations. `incarnations` + 2 iterations hold a first, a last, and every such span.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from mkdsl.graph import OpGraph, Phase
from mkdsl.search._schedule import Schedule

NEVER = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One phase in one iteration; `index` in program order. clock: see above; released: the same through release events alone;
    early: before the phase's waits."""

    index: int
    phase: Phase
    iteration: int
    workers: np.ndarray
    early: np.ndarray
    clock: np.ndarray
    released: np.ndarray

    def __str__(self) -> str:
        return f"{self.phase.name} in iteration {self.iteration}"


class Execution:
    """The unrolled steps of a schedule with their clocks."""

    def __init__(self, graph: OpGraph, schedule: Schedule) -> None:
        self.graph, self.schedule = graph, schedule
        span = max((t.incarnations for t in schedule.tensors), default=1) + 2
        self.repeats = [min(s.repeats, span) for s in graph.segments]
        self.position = {name: i for i, name in enumerate(n for s in graph.segments for n in s.phases)}
        outputs = {name for name, t in graph.tensors.items() if t.output}
        self.counters = {t.name for t in schedule.tensors if t.handoff == "counter"} - outputs
        self.steps: list[Step] = []
        self.at: dict[tuple[str, int], Step] = {}
        self._run()

    def _run(self) -> None:
        workers = self.schedule.workers
        clock, released = (np.full((workers, workers), -1, np.int32) for _ in range(2))
        events: list[np.ndarray] = []
        releases: list[np.ndarray] = []
        for index, (phase, iteration) in enumerate(self._program()):
            plan = self.schedule.plan(phase.name)
            who, early = np.array(plan.participants()), clock.copy()
            for before in self.waited(phase, plan.waits, iteration):
                clock[who] = np.maximum(clock[who], events[before.index])
                if self.counters.intersection(before.phase.writes):
                    released[who] = np.maximum(released[who], releases[before.index])
            step = Step(index, phase, iteration, who, early, clock.copy(), released.copy())
            self.steps.append(step)
            self.at[phase.name, iteration] = step
            for c, out in ((clock, events), (released, releases)):
                c[who, who] = index
                out.append(c[who].max(axis=0))

    def _program(self) -> Iterator[tuple[Phase, int]]:
        for segment, repeats in zip(self.graph.segments, self.repeats, strict=True):
            phases = [self.graph.phase(name) for name in segment.phases]
            for iteration in range(repeats):
                for phase in phases:
                    yield phase, iteration

    def waited(self, phase: Phase, waits: tuple[str, ...], iteration: int) -> Iterator[Step]:
        """The steps whose events a phase waits for in an iteration."""
        for before in map(self.graph.phase, waits):
            if before.segment < phase.segment:
                if iteration == 0:
                    yield from (self.at[before.name, i] for i in range(self.repeats[before.segment]))
            elif self.position[before.name] < self.position[phase.name]:
                yield self.at[before.name, iteration]
            elif iteration > 0:
                yield self.at[before.name, iteration - 1]

    def implies(self, phase: str, before: str) -> bool:
        """Whether `phase`'s other waits imply one for `before`: the same order, through release events if it hands over by counter."""
        by_release = bool(self.counters.intersection(self.graph.phase(before).writes))
        for step in (s for s in self.steps if s.phase.name == phase):
            known = step.released if by_release else step.clock
            for earlier in self.waited(step.phase, (before,), step.iteration):
                if (known[np.ix_(step.workers, earlier.workers)] < earlier.index).any():
                    return False
        return True

    def fenced_after(self, fences: set[str]) -> np.ndarray:
        """[step, worker]: the first later step in which the worker fences, which orders what it did in this one; NEVER if there is none."""
        out = np.full((len(self.steps) + 1, self.schedule.workers), NEVER, np.int32)
        for step in reversed(self.steps):
            out[step.index] = out[step.index + 1]
            if step.phase.name in fences:
                out[step.index, step.workers] = step.index
        return out[1:]
