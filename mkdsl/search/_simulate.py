"""A discrete-event simulation of a schedule: every worker's loader and compute, the ring between them, memory's bandwidth, hand-offs.

Workers with the same counts of items do the same thing at the same time, so they are simulated as one, in three paces: memory does not
serve all SMs alike, and at equal work they drift apart (`Profile.drift`). A hand-off is three trips through the memory system: the signal to
its counter, a look at the counter, and the data; four where the signal releases, which first waits for its stores' acknowledgement. A trip
takes longer the more bytes are in flight when it is made (`Profile.handoff`, `Profile.released`). A loop is simulated for as many iterations as
it takes to be in steady state, the rest is counted like the last ones, unless all are asked for.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

from mkdsl.graph import OpGraph, Phase
from mkdsl.search._cost import bandwidth
from mkdsl.search._events import Action, Clock, Memory, Source
from mkdsl.search._profile import KIB, Profile, interpolate
from mkdsl.search._schedule import Schedule
from mkdsl.search._work import Work, Workload

SATURATED = 0.9  # of the bandwidth: with more bytes in flight than reach this, units wait for each other and not for memory's latency
STEADY = 4  # iterations of a loop until the last two stand for the rest
PACES = (-1.0, 0.0, 1.0)  # of memory's service to a third of the workers each, in `Profile.drift`


class Span(NamedTuple):
    """One execution of a phase by workers that are alike. Microseconds: compute arrives; knows that its input is there; has read it; has
    folded its units; has signalled."""

    crew: int
    phase: str
    iteration: int
    arrived: float
    known: float
    read: float
    folded: float
    signalled: float


@dataclasses.dataclass(frozen=True)
class Timeline:
    """What the simulation says. `crews`: workers that are alike, by their numbers. us: of one step. phase_us: of one execution of each phase
    in the steady state of its loop, from the last signal of all phases before to its own last signal."""

    crews: tuple[tuple[int, ...], ...]
    spans: tuple[Span, ...]
    us: float
    phase_us: tuple[tuple[str, float], ...]


def simulate(graph: OpGraph, schedule: Schedule, profile: Profile, *, whole: bool = False, drift: bool = True) -> Timeline:
    """Plays a schedule.

    Args:
      graph: what it is a schedule of.
      schedule: the schedule; it need not be proven, but must not deadlock.
      profile: the GPU.
      whole: every iteration of every loop.
      drift: workers that are alike keep different paces; without, a third of the time is needed.

    Raises:
      ValueError: workers wait for ever, or the GPU holds no such clusters.
    """
    return _Simulation(
        graph.in_order(schedule.order), schedule, profile.launched(schedule.cluster), whole, PACES if drift else (0.0,)
    ).run()


Wish = float | list[Action]
Event = tuple[str, int]  # phase, iteration


class Step(NamedTuple):
    """One phase in one iteration, as one crew sees it. `waits`: the events to wait for."""

    phase: Phase
    iteration: int
    work: Work
    waits: tuple[Event, ...]


@dataclasses.dataclass
class Crew:
    """Workers that are alike: where their loader and their compute stand."""

    number: int
    workers: tuple[int, ...]
    source: Source
    steps: list[Step]
    units: list[tuple[Work, int]]  # of which work each unit is, and of which step
    issued: int = 0
    landed: int = 0
    freed: int = 0
    landing: Action = lambda: None  # what a unit's landing does
    waiting: list[Action] = dataclasses.field(default_factory=list)  # compute, for a unit to land


class _Simulation:
    def __init__(self, graph: OpGraph, schedule: Schedule, profile: Profile, whole: bool, paces: tuple[float, ...]) -> None:
        self.paces = paces
        self.graph, self.schedule, self.profile = graph, schedule, profile
        self.clock = Clock()
        self.memory = Memory(self.clock, profile.bandwidth * 1e-6)
        self.saturated = KIB * next((x for x, reached in profile.stream if reached >= SATURATED), profile.stream[-1][0])
        self.repeats = [s.repeats if whole else min(s.repeats, STEADY) for s in graph.segments]
        self.participants = {p.name: len(p.participants) for p in schedule.phases}
        released = {t.name for t in schedule.tensors if t.handoff == "counter"}
        self.released = {p.name for p in graph.phases if released.intersection(p.writes)}
        self.latencies: dict[float, float] = {}
        self.left: dict[Event, int] = {}  # workers that have not signalled yet
        self.known: dict[Event, float] = {}  # when an event's counter was complete
        self.waiting: dict[Event, list[Action]] = collections.defaultdict(list)
        self.spans: list[Span] = []
        self.crews = self._crews()

    # Who does what.

    def _crews(self) -> list[Crew]:
        alike: dict[tuple[tuple[int, ...], ...], list[int]] = collections.defaultdict(list)
        for worker in range(self.schedule.workers):
            alike[tuple(p.folded(worker) for p in self.schedule.phases)].append(worker)
        dtypes = {t.name: t.dtype for t in self.schedule.tensors}
        workload = Workload(self.graph, self.schedule.batch, self.schedule.padded_batch, self.profile, dtypes)
        splits = {t.name: t.splits for t in self.schedule.tensors}
        crews: list[Crew] = []
        for counts, workers in alike.items():
            by_name = {p.name: n for p, n in zip(self.schedule.phases, counts, strict=True)}
            works = {
                name: workload.of(self.graph.phase(name), self.schedule.plan(name), n, splits) for name, n in by_name.items() if any(n)
            }
            steps = list(self._steps(works))
            units = [(step.work, at) for at, step in enumerate(steps) for _ in range(step.work.units)]
            for third in filter(None, (workers[i :: len(self.paces)] for i in range(len(self.paces)))):
                crews.append(Crew(len(crews), tuple(third), Source(len(third)), steps, units))
        return crews

    def _steps(self, works: dict[str, Work]) -> Iterator[Step]:
        for segment, repeats in zip(self.graph.segments, self.repeats, strict=True):
            for iteration in range(repeats):
                for name in segment.phases:
                    if name in works:
                        phase = self.graph.phase(name)
                        yield Step(phase, iteration, works[name], tuple(self._waits(phase, iteration)))

    def _waits(self, phase: Phase, iteration: int) -> Iterator[Event]:
        for before in map(self.graph.phase, self.schedule.plan(phase.name).waits):
            if before.segment < phase.segment:
                if iteration == 0:
                    yield before.name, self.repeats[before.segment] - 1
            elif self.graph.order[before.name] < self.graph.order[phase.name]:
                yield before.name, iteration
            elif iteration > 0:
                yield before.name, iteration - 1

    # The loader.

    def _load(self, crew: Crew) -> None:
        """Issues what may be issued: its stage is free, and the unit `window` places before has landed."""
        s = self.schedule
        while crew.issued < len(crew.units) and crew.issued - crew.freed < s.stages and crew.issued - crew.landed < s.window:
            work, step = crew.units[crew.issued]
            crew.issued += 1
            speed = 1 + self.profile.drift * self.paces[(crew.number + step) % len(self.paces)]  # nobody is always the slow one
            in_flight = max(work.unit_bytes, min(work.unit_bytes * (crew.issued - crew.landed), self.saturated))
            self.memory.fetch(crew.source, work.streamed_bytes, speed, self._latency(in_flight), crew.landing)

    def _latency(self, in_flight: float) -> float:
        """From a unit's issue to its landing while memory keeps up, if every worker has so many bytes in flight: Little's law."""
        if in_flight not in self.latencies:
            self.latencies[in_flight] = self.profile.issue_us + in_flight / bandwidth(self.profile, in_flight)
        return self.latencies[in_flight]

    def _landed(self, crew: Crew) -> None:
        crew.landed += 1
        self._load(crew)
        self._wake(crew.waiting)

    # Compute: a generator that yields the time at which it goes on, or a list that it stands in until somebody wakes it.

    def _resume(self, compute: Iterator[Wish]) -> None:
        wish = next(compute, None)
        if isinstance(wish, list):
            wish.append(lambda: self._resume(compute))
        elif wish is not None:
            self.clock.at(wish, lambda: self._resume(compute))

    def _wake(self, sleepers: list[Action]) -> None:
        going, sleepers[:] = list(sleepers), []
        for go in going:
            go()

    def _compute(self, crew: Crew) -> Iterator[Wish]:
        for step in crew.steps:
            arrived = self.clock.now
            for event in step.waits:
                while event not in self.known:
                    yield self.waiting[event]
                yield max(self.clock.now, self.known[event]) + self._trip(event[0] in self.released)
            known, released = self.clock.now, any(event[0] in self.released for event in step.waits)
            yield known + (self._trip(released) if step.phase.reads or step.phase.row_reads else 0.0) + step.work.read
            read = self.clock.now
            yield read + step.work.before
            yield from self._fold(crew, step.work)
            folded = self.clock.now
            yield folded + step.work.after
            self.spans.append(Span(crew.number, step.phase.name, step.iteration, arrived, known, read, folded, self.clock.now))
            self._signal(crew, step)

    def _fold(self, crew: Crew, work: Work) -> Iterator[Wish]:
        for pause, units in work.runs:
            if pause:
                yield self.clock.now + pause
            for _ in range(units):
                while crew.landed == crew.freed:
                    yield crew.waiting
                yield self.clock.now + work.unit_us
                crew.freed += 1
                self._load(crew)

    def _signal(self, crew: Crew, step: Step) -> None:
        event = step.phase.name, step.iteration
        self.left[event] = self.left.get(event, self.participants[step.phase.name]) - len(crew.workers)
        if not self.left[event]:
            released = step.phase.name in self.released
            self.known[event] = self.clock.now + self._trip(released) * (1 + released)
            self._wake(self.waiting[event])

    def _trip(self, released: bool) -> float:
        """One of a hand-off's trips through the memory system, as full as that is now."""
        curve, trips = (self.profile.released, 4) if released else (self.profile.handoff, 3)
        return interpolate(curve, self.memory.in_flight / self.schedule.workers / KIB) / trips

    # The result.

    def run(self) -> Timeline:
        for crew in self.crews:
            crew.landing = functools.partial(self._landed, crew)
            self._load(crew)
            self._resume(self._compute(crew))
        self.clock.run()
        asleep = [crew.workers for crew in self.crews if crew.freed < len(crew.units)]
        if asleep or any(self.waiting.values()):
            raise ValueError(f"workers wait for ever: {asleep}")
        ends = self._ends()
        before = (0.0, *itertools.accumulate(ends.values(), max))  # phases side by side need not end in order
        took = {key: max(0.0, end - latest) for (key, end), latest in zip(ends.items(), before, strict=False)}
        phase_us = [(p.name, self._steady(took, p)) for p in self.graph.phases]
        skipped = [n - repeats for n, repeats in zip((s.repeats for s in self.graph.segments), self.repeats, strict=True)]
        counted = sum(skipped[self.graph.phase(name).segment] * us for name, us in phase_us)
        return Timeline(tuple(c.workers for c in self.crews), tuple(self.spans), max(ends.values()) + counted, tuple(phase_us))

    def _ends(self) -> dict[tuple[str, int], float]:
        """When the last worker signalled each step, in program order."""
        ends: dict[tuple[str, int], float] = collections.defaultdict(float)
        for span in self.spans:
            key = span.phase, span.iteration
            ends[key] = max(ends[key], span.signalled)
        order = sorted(ends, key=lambda key: (self.graph.phase(key[0]).segment, key[1], self.graph.order[key[0]]))
        return {key: ends[key] for key in order}

    def _steady(self, took: dict[tuple[str, int], float], phase: Phase) -> float:
        """Of a loop's phase, the mean of its last two iterations."""
        repeats = self.repeats[phase.segment]
        last = range(max(0, repeats - 2), repeats)
        return sum(took[phase.name, i] for i in last) / len(last)
