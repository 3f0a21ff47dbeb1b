"""What the simulated workers share: a queue of events in order of time, and device memory as one server of all their units.

Memory serves all sources at once, each its units in order, in proportion to their weights. Between two changes of who is served the shares
stand still, so a unit is done when a common virtual time has grown by its bytes / speed; that makes each event cost the logarithm of the
number of sources. A unit never lands before the latency of an idle memory.
"""

import bisect
import collections
import dataclasses
import heapq
import itertools
import math
from collections.abc import Callable

Action = Callable[[], None]


class EventQueue:
    """Events in order of time, and of their making where times are equal. Microseconds.

    One more event, `moved` at `due`, is put off and brought forward so often that it stands outside the queue.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.count = 0  # of events that have been
        self.due, self.moved = math.inf, lambda: None
        self._events: list[tuple[float, int, Action]] = []
        self._numbers = itertools.count()

    def at(self, time: float, action: Action) -> None:
        heapq.heappush(self._events, (max(time, self.now), next(self._numbers), action))

    def run(self) -> None:
        while self._events or self.due < math.inf:
            if self._events and self._events[0][0] <= self.due:
                self.now, _, action = heapq.heappop(self._events)
            else:
                self.now, action = self.due, self.moved
            self.count += 1
            action()


Unit = tuple[float, float, float, Action]  # bytes, speed, not to land before, what to do when it has landed


@dataclasses.dataclass(eq=False)
class Source:
    """Workers alike, as memory sees them: they fetch one unit after the other. waiting: those that are not served yet. served: the virtual
    time at which the first of them, or the last of `stretch`, will be."""

    workers: int
    waiting: collections.deque[Unit] = dataclasses.field(default_factory=collections.deque)
    served: float = 0.0
    stretch: "Stretch | None" = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stretch:
    """So many units of a source that are served one after the other as one event.

    start: virtual time at which the first of them begins. length: of one. floor: of memory's weight; where it sinks below that, units do not
    follow each other any more as was foreseen. lag: how long after a unit was served the next one is asked for. settle: does what so many of
    the units would have done, each when it was served.
    """

    start: float
    length: float
    units: int
    floor: float
    lag: float
    settle: Callable[[int], None]

    def served(self, virtual: float) -> int:
        """How many units have been served by then, but for the last one, whose service is an event."""
        return max(0, min(self.units - 1, int((virtual - self.start) / self.length)))


class Memory:
    """Device memory: `bandwidth` bytes per microsecond, shared by all sources that have units in flight."""

    def __init__(self, queue: EventQueue, bandwidth: float) -> None:
        self.queue, self.bandwidth = queue, bandwidth
        self.weight = 0.0  # of all sources that are served
        self._in_flight = 0.0
        self._served: list[tuple[float, int, Source]] = []  # by the virtual time at which they will be
        self._numbers = itertools.count()
        self._changes = [(0.0, 0.0, 0.0)]  # of weight: when in virtual time, when, and how long a unit of virtual time takes since
        self._stretches: list[Source] = []
        self._floor = 0.0  # the highest of all stretches
        queue.moved = self._serve

    def fetch(self, source: Source, size: float, speed: float, latency: float, landed: Action) -> None:
        """Each worker of a source fetches a unit of `size` bytes. speed: their share relative to others. Units land when they have been served, and
        not before `latency`."""
        self._in_flight += source.workers * size
        source.waiting.append((size, speed, self.queue.now + latency, landed))
        if len(source.waiting) == 1:
            virtual = self.virtual
            self._weigh(self.weight + source.workers * speed, virtual)
            self._push(source, virtual)
            self._plan()

    @property
    def in_flight(self) -> float:
        """Bytes asked for that have not landed."""
        return self._in_flight - sum(map(self._missing, self._stretches))

    @property
    def virtual(self) -> float:
        """Virtual time now."""
        virtual, time, pace = self._changes[-1]
        return virtual + (self.queue.now - time) / pace if pace else virtual

    def time(self, virtual: float) -> float:
        """When it was so late in virtual time."""
        before, time, pace = self._changes[bisect.bisect_right(self._changes, (virtual, math.inf)) - 1]
        return time + (virtual - before) * pace

    def stretch(self, source: Source, stretch: Stretch) -> None:
        """Serves so many of a source's units from the first on as one event."""
        source.stretch = stretch
        self._stretches.append(source)
        self._floor = max(self._floor, stretch.floor)
        self._move(source, stretch.start + stretch.units * stretch.length)
        self._plan()

    def _missing(self, source: Source) -> float:
        """Bytes of a stretch that are not asked for now, but were at its start."""
        stretch = source.stretch
        if not stretch or not stretch.lag:
            return 0.0
        served = stretch.served(self.virtual)
        asked = not served or self.time(stretch.start + served * stretch.length) + stretch.lag <= self.queue.now
        return 0.0 if asked else source.workers * source.waiting[0][0]

    def _end(self, source: Source, units: int) -> None:
        """Ends a source's stretch, of which so many units have been served."""
        stretch = source.stretch
        assert stretch is not None
        self._in_flight -= self._missing(source)
        source.stretch = None
        self._stretches.remove(source)
        self._floor = max((s.stretch.floor for s in self._stretches if s.stretch), default=0.0)
        stretch.settle(units)

    def _move(self, source: Source, served: float) -> None:
        source.served = served
        self._served = [(served if s is source else at, number, s) for at, number, s in self._served]
        heapq.heapify(self._served)

    def _push(self, source: Source, virtual: float) -> None:
        size, speed, _, _ = source.waiting[0]
        source.served = virtual + size / speed
        heapq.heappush(self._served, (source.served, next(self._numbers), source))

    def _weigh(self, weight: float, virtual: float) -> None:
        """Sources of so much weight are served from now on."""
        self.weight = weight
        self._changes.append((virtual, self.queue.now, weight / self.bandwidth))

    def _plan(self) -> None:
        if self.weight < self._floor:
            self._disturb()
        if self._served:
            virtual, time, pace = self._changes[-1]
            self.queue.due = max(self.queue.now, time + (self._served[0][0] - virtual) * pace)
        else:
            self.queue.due = math.inf

    def _disturb(self) -> None:
        """Ends the stretches whose floor is above the weight."""
        virtual = self.virtual
        for source in list(self._stretches):
            stretch = source.stretch
            if stretch and stretch.floor > self.weight:
                served = stretch.served(virtual)
                self._move(source, stretch.start + (served + 1) * stretch.length)
                self._end(source, served)

    def _serve(self) -> None:
        virtual, _, source = heapq.heappop(self._served)
        if source.stretch:
            self._end(source, source.stretch.units - 1)
        size, speed, earliest, landed = source.waiting.popleft()
        if not source.waiting:
            self._weigh(self.weight - source.workers * speed if self._served else 0.0, virtual)
        else:
            if source.waiting[0][1] != speed:
                self._weigh(self.weight + source.workers * (source.waiting[0][1] - speed), virtual)
            self._push(source, virtual)

        def land() -> None:
            self._in_flight -= source.workers * size
            landed()

        if earliest <= self.queue.now:
            land()
        else:
            self.queue.at(earliest, land)
        self._plan()
