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

    `due` and `next` are one more event, whose time changes too often for the queue.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.count = 0  # of events that have been
        self.due: Callable[[], float] = lambda: math.inf
        self.next: Action = lambda: None
        self._events: list[tuple[float, int, Action]] = []
        self._numbers = itertools.count()

    def at(self, time: float, action: Action) -> None:
        heapq.heappush(self._events, (time if time > self.now else self.now, next(self._numbers), action))

    def run(self) -> None:
        while (due := self.due()) < math.inf or self._events:
            if self._events and self._events[0][0] <= due:
                self.now, _, action = heapq.heappop(self._events)
            else:
                self.now, action = due, self.next
            self.count += 1
            action()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stretch:
    """So many units of one source that are served one after the other without a break, as one event.

    start: virtual time at which the service of the first of them begins. length: of one. lag: until the next one is asked for after one was
    served, in microseconds. floor: the weight that memory must serve for that to last. settle: called with a number of units, does what all
    would have done when they were served.
    """

    start: float
    length: float
    units: int
    lag: float
    floor: float
    settle: Callable[[int], None]

    def served(self, virtual: float) -> int:
        """How many have been by then, without the last one, whose service is an event."""
        return max(0, min(self.units - 1, int((virtual - self.start) / self.length)))


@dataclasses.dataclass(eq=False)
class Source:
    """Workers alike, as memory sees them: they fetch one unit after the other. waiting: (bytes, speed, not to land before, what landing does) of
    those that are not served yet. served: the virtual time at which the first of them will be, or the last of the stretch."""

    workers: int
    waiting: collections.deque[tuple[float, float, float, Action]] = dataclasses.field(default_factory=collections.deque)
    served: float = 0.0
    stretch: Stretch | None = None


class Memory:
    """Device memory: `bandwidth` bytes per microsecond, shared by all sources that have units in flight."""

    def __init__(self, queue: EventQueue, bandwidth: float) -> None:
        self.queue, self.bandwidth = queue, bandwidth
        self.weight = 0.0  # of all sources that are served
        self._in_flight = 0.0
        self._sources: list[tuple[float, int, Source]] = []  # that are served, by the virtual time until when
        self._numbers = itertools.count()
        self._changes = [(0.0, 0.0, 0.0)]  # of the weight: virtual time, time, and microseconds per unit of virtual time from then on
        self._stretched: list[Source] = []
        self._floor = 0.0  # the highest of all stretches
        queue.due, queue.next = self._due, self._serve

    def fetch(self, source: Source, size: float, speed: float, latency: float, landed: Action) -> None:
        """Each worker of a source fetches a unit of `size` bytes. speed: their share relative to others. Units land when they have been served, and
        not before `latency`."""
        self._in_flight += source.workers * size
        source.waiting.append((size, speed, self.queue.now + latency, landed))
        if len(source.waiting) == 1:
            virtual = self.virtual()
            self._weigh(self.weight + source.workers * speed, virtual)
            self._begin(source, virtual)

    def stretch(self, source: Source, stretch: Stretch) -> None:
        """Serves a source's units from the first that waits on as one event."""
        source.stretch = stretch
        self._stretched.append(source)
        self._floor = max(self._floor, stretch.floor)
        self._until(source, stretch.start + stretch.units * stretch.length)

    def in_flight(self) -> float:
        """Bytes asked for that have not landed."""
        return self._in_flight - sum(map(self._lagging, self._stretched))

    def virtual(self) -> float:
        """Virtual time now."""
        virtual, time, pace = self._changes[-1]
        return virtual + (self.queue.now - time) / pace if pace else virtual

    def time(self, virtual: float) -> float:
        """When it was so late in virtual time."""
        before, time, pace = self._changes[bisect.bisect_right(self._changes, (virtual, math.inf)) - 1]
        return time + (virtual - before) * pace

    # Service.

    def _due(self) -> float:
        """When the next unit or stretch will have been served, if nothing changes until then."""
        if self.weight < self._floor:
            self._disturb()
        if not self._sources:
            return math.inf
        virtual, time, pace = self._changes[-1]
        due = time + (self._sources[0][0] - virtual) * pace
        return due if due > self.queue.now else self.queue.now

    def _serve(self) -> None:
        virtual, _, source = heapq.heappop(self._sources)
        if source.stretch:
            self._end(source, source.stretch.units - 1)
        size, speed, earliest, landed = source.waiting.popleft()
        following = source.waiting[0][1] if source.waiting else 0.0
        if following != speed:
            self._weigh(self.weight + source.workers * (following - speed) if self._sources or following else 0.0, virtual)
        if following:
            self._begin(source, virtual)

        def land() -> None:
            self._in_flight -= source.workers * size
            landed()

        if earliest <= self.queue.now:
            land()
        else:
            self.queue.at(earliest, land)

    def _begin(self, source: Source, virtual: float) -> None:
        """Serves a source's first unit from now on."""
        size, speed, _, _ = source.waiting[0]
        source.served = virtual + size / speed
        heapq.heappush(self._sources, (source.served, next(self._numbers), source))

    def _weigh(self, weight: float, virtual: float) -> None:
        """Serves sources of so much weight from now on."""
        self.weight = weight
        self._changes.append((virtual, self.queue.now, weight / self.bandwidth))

    # Stretches.

    def _until(self, source: Source, virtual: float) -> None:
        """Serves a source until another virtual time than before."""
        source.served = virtual
        self._sources = [(s.served, number, s) for _, number, s in self._sources]
        heapq.heapify(self._sources)

    def _disturb(self) -> None:
        """Ends the stretches whose floor is above the weight."""
        virtual = self.virtual()
        for source in list(self._stretched):
            stretch = source.stretch
            if stretch and stretch.floor > self.weight:
                served = stretch.served(virtual)
                self._until(source, stretch.start + (served + 1) * stretch.length)
                self._end(source, served)

    def _end(self, source: Source, served: int) -> None:
        """Ends a source's stretch, of which so many units have been served."""
        stretch = source.stretch
        assert stretch
        self._in_flight -= self._lagging(source)
        source.stretch = None
        self._stretched.remove(source)
        self._floor = max((s.stretch.floor for s in self._stretched if s.stretch), default=0.0)
        stretch.settle(served)

    def _lagging(self, source: Source) -> float:
        """Bytes of the unit that a stretch asks for a little later than now."""
        stretch = source.stretch
        if not stretch or not stretch.lag:
            return 0.0
        served = stretch.served(self.virtual())
        asked = not served or self.time(stretch.start + served * stretch.length) + stretch.lag <= self.queue.now
        return 0.0 if asked else source.workers * source.waiting[0][0]
