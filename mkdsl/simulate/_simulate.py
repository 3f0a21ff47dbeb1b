"""A discrete-event simulation of a schedule: every worker's loader and compute, the ring between them, memory's bandwidth, hand-offs.

Workers with the same counts of items do the same thing at the same time, so they are simulated as one cohort, in three paces: memory does not
serve all SMs alike, and at equal work they drift apart (`Profile.drift`). A hand-off is three trips through the memory system: the signal to its
counter, a look at the counters, and the data. It is four where the signal releases, which first waits until its stores are acknowledged. A trip
takes longer the more bytes are in flight when it is made (`Profile.handoff`, `Profile.released`). A loop is simulated for as many iterations as
it takes to be in steady state, and the rest is counted like the last ones, unless all are asked for.
"""

import collections
import functools
from collections.abc import Callable, Iterator, Sequence

from mkdsl.graph import OpGraph
from mkdsl.schedule import KIB, Profile, Schedule, interpolate, releases
from mkdsl.simulate._cohorts import Cohort, Event, Step, cohorts
from mkdsl.simulate._loader import Loader, Stream
from mkdsl.simulate._memory import Action, EventQueue, Memory
from mkdsl.simulate._timeline import Span, Timeline, timeline

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


Wish = float | Callable[[Action], None]


class _Simulation:
    def __init__(self, graph: OpGraph, schedule: Schedule, profile: Profile, whole: bool, paces: tuple[float, ...]) -> None:
        self.graph, self.schedule, self.profile, self.paces = graph, schedule, profile, paces
        self.queue = EventQueue()
        self.memory = Memory(self.queue, profile.bandwidth * 1e-6)
        self.saturated = KIB * next((x for x, reached in profile.stream if reached >= SATURATED), profile.stream[-1][0])
        self.repeats = [s.repeats if whole else min(s.repeats, STEADY) for s in graph.segments]
        self.participants = {p.name: len(p.participants) for p in schedule.phases}
        self.released = {p.name for p in graph.phases if releases(graph, schedule, p)}
        self.latencies: dict[int, list[float]] = {}  # by the bytes of a unit
        self.left: dict[Event, int] = {}  # workers that have not signalled yet
        self.known: dict[Event, float] = {}  # when an event's counter was complete
        self.waiting: dict[Event, list[Action]] = collections.defaultdict(list)
        self.spans: list[Span] = []
        self.cohorts = cohorts(graph, schedule, profile, self.repeats, len(paces))

    def run(self) -> Timeline:
        loaders = [self._start(cohort) for cohort in self.cohorts]
        self.queue.run()
        asleep = [c.workers for c, loader in zip(self.cohorts, loaders, strict=True) if loader.folded < sum(s.work.units for s in c.steps)]
        if asleep or any(self.waiting.values()):
            raise ValueError(f"workers wait for ever: {asleep}")
        return timeline(self.graph, self.repeats, tuple(c.workers for c in self.cohorts), self.spans, self.queue.count)

    def _start(self, cohort: Cohort) -> Loader:
        streams = [
            Stream(step.work, self._speed(cohort, place), self._latencies(step.work.unit_bytes)) for place, step in enumerate(cohort.steps)
        ]
        loader = Loader(self.queue, self.memory, len(cohort.workers), streams, self.schedule.num_stages, self.schedule.max_in_flight)
        loader.load()
        compute = self._compute(cohort, loader, streams)

        def go() -> None:
            wish = next(compute, None)
            if callable(wish):
                wish(go)
            elif wish is not None:
                self.queue.at(wish, go)

        go()
        return loader

    def _speed(self, cohort: Cohort, place: int) -> float:
        """Of a cohort's fetches in one of its steps: nobody is always the slow one."""
        return 1 + self.profile.drift * self.paces[(cohort.number + place) % len(self.paces)]

    def _latencies(self, unit_bytes: int) -> list[float]:
        """From a unit's issue to its landing while memory keeps up, by how many units every worker has in flight already: Little's law."""
        if unit_bytes not in self.latencies:
            in_flight = [max(unit_bytes, min(unit_bytes * (n + 1), self.saturated)) for n in range(self.schedule.max_in_flight)]
            self.latencies[unit_bytes] = [self.profile.issue_us + n / self.profile.worker_rate(n) if n else 0.0 for n in in_flight]
        return self.latencies[unit_bytes]

    # Compute: a generator that yields the time at which it goes on, or what it asks to wake it.

    def _compute(self, cohort: Cohort, loader: Loader, streams: Sequence[Stream]) -> Iterator[Wish]:
        for step, stream in zip(cohort.steps, streams, strict=True):
            arrived = self.queue.now
            for event in step.waits:
                if event not in self.known:
                    yield self.waiting[event].append
                yield max(self.queue.now, self.known[event]) + self._trip(event[0] in self.released)
            known, released = self.queue.now, any(event[0] in self.released for event in step.waits)
            yield known + (self._trip(released) if step.phase.reads or step.phase.row_reads else 0.0) + step.work.read
            read = self.queue.now
            yield read + step.work.before
            yield functools.partial(loader.fold, stream)
            folded = self.queue.now
            yield folded + step.work.after
            self.spans.append(Span(cohort.number, step.phase.name, step.iteration, arrived, known, read, folded, self.queue.now))
            self._signal(cohort, step)

    def _signal(self, cohort: Cohort, step: Step) -> None:
        event = step.phase.name, step.iteration
        self.left[event] = self.left.get(event, self.participants[step.phase.name]) - len(cohort.workers)
        if not self.left[event]:
            released = step.phase.name in self.released
            self.known[event] = self.queue.now + self._trip(released) * (1 + released)
            for go in self.waiting.pop(event, ()):
                go()

    def _trip(self, released: bool) -> float:
        """One of a hand-off's trips through the memory system, as full as that is now."""
        curve, trips = (self.profile.released, 4) if released else (self.profile.handoff, 3)
        return interpolate(curve, self.memory.in_flight() / self.schedule.workers / KIB) / trips
