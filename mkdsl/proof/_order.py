"""The order in which a schedule's steps happen, proved by vector clocks.

A step is one phase in one iteration. Every worker walks the steps in program order and takes part in those it has items of. A step's
event has come when all who take part in it have signalled, which they do after their reads and writes. A step's clock says up to which
step a worker that starts it knows every other to be done: its own program order, joined with the events it waited for.

Loops are unrolled to a few iterations. That suffices: a path between steps of iterations i and j runs through iterations i to j only, all
waits inside a loop reach back at most one iteration, and the steps and waits of iteration i + 1 are those of i, shifted. So whether one
step happens before another d iterations later does not depend on i, and what must be proved of a tensor spans at most as many iterations as
it has incarnations. `incarnations` + 2 iterations hold a first, a last, and every such span.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from mkdsl.graph import OpGraph, Phase
from mkdsl.proof._classes import VectorClock, WorkerClasses
from mkdsl.schedule import Awaited, Schedule, awaited, releases

NEVER = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One phase in one iteration; `index` in program order. who: the classes that take part. clock: see above. released: the same through
    release events alone; early: before the phase's waits. event, release: what its event adds to the clocks of those who wait for it."""

    index: int
    phase: Phase
    iteration: int
    who: np.ndarray
    early: VectorClock
    clock: VectorClock
    released: VectorClock

    @property
    def event(self) -> np.ndarray:
        return self.clock.event(self.who, self.index)

    @property
    def release(self) -> np.ndarray:
        return self.released.event(self.who, self.index)

    def __str__(self) -> str:
        return f"{self.phase.name} in iteration {self.iteration}"


class Execution:
    """The unrolled steps of a schedule with their clocks."""

    def __init__(self, graph: OpGraph, schedule: Schedule) -> None:
        self.graph, self.schedule, self.classes = graph, schedule, WorkerClasses(graph, schedule)
        span = max((t.incarnations for t in schedule.tensors), default=1) + 2
        self.repeats = [min(s.repeats, span) for s in graph.segments]
        self.steps: list[Step] = []
        self.of: dict[str, list[Step]] = {p.name: [] for p in graph.phases}  # by iteration
        self._run()

    def _run(self) -> None:
        n = len(self.classes.size)
        clock = released = VectorClock(np.full((n, n), -1, np.int32), np.full(n, -1, np.int32))
        for index, (phase, iteration) in enumerate(self._program()):
            who, early = self.classes.who[phase.name], clock
            waited = list(self.waited(phase, self.schedule.plan(phase.name).waits, iteration))
            clock = clock.joined(who, [s.event for s in waited])
            released = released.joined(who, [s.release for s in waited if self.releases(s.phase)])
            step = Step(index, phase, iteration, who, early, clock, released)
            self.steps.append(step)
            self.of[phase.name].append(step)
            own = np.where(who, np.int32(index), clock.own)
            clock, released = VectorClock(clock.others, own), VectorClock(released.others, own)

    def _program(self) -> Iterator[tuple[Phase, int]]:
        for segment, repeats in zip(self.graph.segments, self.repeats, strict=True):
            phases = [self.graph.phase(name) for name in segment.phases]
            for iteration in range(repeats):
                for phase in phases:
                    yield phase, iteration

    def waited(self, phase: Phase, waits: tuple[str, ...], iteration: int) -> Iterator[Step]:
        """The steps whose events a phase that waits for `waits` waits for in an iteration."""
        for before in map(self.graph.phase, waits):
            match awaited(self.graph, phase, before):
                case Awaited.LAST:
                    yield from self.of[before.name] if iteration == 0 else ()
                case Awaited.SAME:
                    yield self.of[before.name][iteration]
                case Awaited.PREVIOUS:
                    yield from self.of[before.name][iteration - 1 : iteration] if iteration else ()

    def releases(self, phase: Phase) -> bool:
        """Whether a phase's event releases its stores."""
        return releases(self.graph, self.schedule, phase)

    def implies(self, phase: str, waits: tuple[str, ...], before: str) -> bool:
        """Whether a phase that waits for `waits` need not wait for `before` besides: the same order, through release events if that hands over by
        release and acquire. No path to an event's waiter leads through the same wait in another iteration, so this execution, in which it
        stands, tells."""
        released = self.releases(self.graph.phase(before))
        for step in self.of[phase]:
            others = [s for s in self.waited(step.phase, waits, step.iteration) if not released or self.releases(s.phase)]
            known = self._before_waits(step, released).joined(step.who, [s.release if released else s.event for s in others])
            for earlier in self.waited(step.phase, (before,), step.iteration):
                if self.classes.all_pairs(earlier.who, step.who).late(earlier.index, known):
                    return False
        return True

    def _before_waits(self, step: Step, released: bool) -> VectorClock:
        if not released:
            return step.early
        former = self.steps[step.index - 1].released if step.index else VectorClock(np.full_like(step.early.others, -1), step.early.own)
        return VectorClock(former.others, step.early.own)

    def fenced_after(self, fences: set[str]) -> np.ndarray:
        """[step, class]: the first later step in which its workers fence, which orders what they did in this one; NEVER if there is none."""
        out = np.full((len(self.steps) + 1, len(self.classes.size)), NEVER, np.int32)
        for step in reversed(self.steps):
            out[step.index] = out[step.index + 1]
            if step.phase.name in fences:
                out[step.index, step.who] = step.index
        return out[1:]
