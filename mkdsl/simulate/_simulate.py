"""A discrete-event simulation of a schedule: every worker's loader and compute, the ring between them, memory's bandwidth, hand-offs.

Workers with the same counts of items do the same thing at the same time, so they are simulated as one cohort, in three paces: memory does not
serve all SMs alike, and at equal work they drift apart (`Profile.drift`). A hand-off is three trips through the memory system: the signal to its
counter, a look at the counters, and the data. It is four where the signal releases, which first waits until its stores are acknowledged. A trip
takes longer the more bytes are in flight when it is made (`Profile.handoff`, `Profile.released`). A loop is simulated for as many iterations as
it takes to be in steady state, and the rest is counted like the last ones, unless all are asked for.
"""

import collections
import functools
from collections.abc import Iterator

from mkdsl.graph import OpGraph
from mkdsl.schedule import KIB, Profile, Schedule, interpolate, releases
from mkdsl.simulate._cohorts import Cohort, Event, Step, cohorts
from mkdsl.simulate._memory import Action, EventQueue, Memory
from mkdsl.simulate._timeline import Span, Timeline, timeline
from mkdsl.simulate._work import Work

SATURATED = 0.9  # of the bandwidth: with more bytes in flight than reach this, units wait for each other and not for memory's latency
STEADY = 4  # iterations of a loop until the last two stand for the rest
PACES = (-1.0, 0.0, 1.0)  # of memory's service to a third of the workers each, in `Profile.drift`


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
    graph, launched = graph.in_order(schedule.order), profile.launched(schedule.cluster)
    return _Simulation(graph, schedule, launched, whole, PACES if drift else (0.0,)).run()


Wish = float | list[Action]


class _Simulation:
    def __init__(self, graph: OpGraph, schedule: Schedule, profile: Profile, whole: bool, paces: tuple[float, ...]) -> None:
        self.graph, self.schedule, self.profile, self.paces = graph, schedule, profile, paces
        self.queue = EventQueue()
        self.memory = Memory(self.queue, profile.bandwidth * 1e-6)
        self.saturated = KIB * next((x for x, reached in profile.stream if reached >= SATURATED), profile.stream[-1][0])
        self.repeats = [s.repeats if whole else min(s.repeats, STEADY) for s in graph.segments]
        self.participants = {p.name: len(p.participants) for p in schedule.phases}
        self.released = {p.name for p in graph.phases if releases(graph, schedule, p)}
        self.latencies: dict[float, float] = {}
        self.left: dict[Event, int] = {}  # workers that have not signalled yet
        self.known: dict[Event, float] = {}  # when an event's counter was complete
        self.waiting: dict[Event, list[Action]] = collections.defaultdict(list)
        self.spans: list[Span] = []
        self.cohorts = cohorts(graph, schedule, profile, self.repeats, len(paces))

    def run(self) -> Timeline:
        for cohort in self.cohorts:
            cohort.landing = functools.partial(self._landed, cohort)
            self._load(cohort)
            self._resume(self._compute(cohort))
        self.queue.run()
        asleep = [c.workers for c in self.cohorts if c.freed < len(c.units)]
        if asleep or any(self.waiting.values()):
            raise ValueError(f"workers wait for ever: {asleep}")
        return timeline(self.graph, self.repeats, tuple(c.workers for c in self.cohorts), self.spans, self.queue.count)

    # The loader.

    def _load(self, cohort: Cohort) -> None:
        """Issues what may be issued: its stage is free, and the unit `max_in_flight` places before has landed."""
        s, c = self.schedule, cohort
        while c.issued < len(c.units) and c.issued - c.freed < s.num_stages and c.issued - c.landed < s.max_in_flight:
            work, place = c.units[c.issued]
            c.issued += 1
            speed = 1 + self.profile.drift * self.paces[(c.number + place) % len(self.paces)]  # nobody is always the slow one
            in_flight = max(work.unit_bytes, min(work.unit_bytes * (c.issued - c.landed), self.saturated))
            self.memory.fetch(c.source, work.streamed_bytes, speed, self._latency(in_flight), c.landing)

    def _latency(self, in_flight: float) -> float:
        """From a unit's issue to its landing while memory keeps up, if every worker has so many bytes in flight: Little's law."""
        if in_flight not in self.latencies:
            self.latencies[in_flight] = self.profile.issue_us + in_flight / self.profile.worker_rate(in_flight)
        return self.latencies[in_flight]

    def _landed(self, cohort: Cohort) -> None:
        cohort.landed += 1
        self._load(cohort)
        self._wake(cohort.waiting)

    # Compute: a generator that yields the time at which it goes on, or a list that it stands in until somebody wakes it.

    def _resume(self, compute: Iterator[Wish]) -> None:
        wish = next(compute, None)
        if isinstance(wish, list):
            wish.append(lambda: self._resume(compute))
        elif wish is not None:
            self.queue.at(wish, lambda: self._resume(compute))

    def _wake(self, sleepers: list[Action]) -> None:
        going, sleepers[:] = list(sleepers), []
        for go in going:
            go()

    def _compute(self, cohort: Cohort) -> Iterator[Wish]:
        for step in cohort.steps:
            arrived = self.queue.now
            for event in step.waits:
                while event not in self.known:
                    yield self.waiting[event]
                yield max(self.queue.now, self.known[event]) + self._trip(event[0] in self.released)
            known, released = self.queue.now, any(event[0] in self.released for event in step.waits)
            yield known + (self._trip(released) if step.phase.reads or step.phase.row_reads else 0.0) + step.work.read
            read = self.queue.now
            yield read + step.work.before
            yield from self._fold(cohort, step.work)
            folded = self.queue.now
            yield folded + step.work.after
            self.spans.append(Span(cohort.number, step.phase.name, step.iteration, arrived, known, read, folded, self.queue.now))
            self._signal(cohort, step)

    def _fold(self, cohort: Cohort, work: Work) -> Iterator[Wish]:
        for pause, units in work.runs:
            if pause:
                yield self.queue.now + pause
            for _ in range(units):
                while cohort.landed == cohort.freed:
                    yield cohort.waiting
                yield self.queue.now + work.unit_us
                cohort.freed += 1
                self._load(cohort)

    def _signal(self, cohort: Cohort, step: Step) -> None:
        event = step.phase.name, step.iteration
        self.left[event] = self.left.get(event, self.participants[step.phase.name]) - len(cohort.workers)
        if not self.left[event]:
            released = step.phase.name in self.released
            self.known[event] = self.queue.now + self._trip(released) * (1 + released)
            self._wake(self.waiting[event])

    def _trip(self, released: bool) -> float:
        """One of a hand-off's trips through the memory system, as full as that is now."""
        curve, trips = (self.profile.released, 4) if released else (self.profile.handoff, 3)
        return interpolate(curve, self.memory.in_flight / self.schedule.workers / KIB) / trips
