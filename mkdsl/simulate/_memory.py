"""What the simulated workers share: a queue of events in order of time, and device memory as one server of all their units.

Memory serves all sources at once, each its units in order, in proportion to their weights. Between two changes of who is served the shares
stand still, so a unit is done when a common virtual time has grown by its bytes / speed; that makes each event cost the logarithm of the
number of sources. A unit never lands before the latency of an idle memory.
"""

import collections
import dataclasses
import heapq
import itertools
from collections.abc import Callable

Action = Callable[[], None]


class EventQueue:
    """Events in order of time, and of their making where times are equal. Microseconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self.count = 0  # of events that have been
        self._events: list[tuple[float, int, Action]] = []
        self._numbers = itertools.count()

    def at(self, time: float, action: Action) -> None:
        heapq.heappush(self._events, (max(time, self.now), next(self._numbers), action))

    def run(self) -> None:
        while self._events:
            self.now, _, action = heapq.heappop(self._events)
            self.count += 1
            action()


@dataclasses.dataclass(eq=False)
class Source:
    """Workers alike, as memory sees them: they fetch one unit after the other. waiting: as `Memory.fetch` takes them."""

    workers: int
    waiting: collections.deque[tuple[float, float, float, Action]] = dataclasses.field(default_factory=collections.deque)
    served: bool = True


class Memory:
    """Device memory: `bandwidth` bytes per microsecond, shared by all sources that have units in flight."""

    def __init__(self, queue: EventQueue, bandwidth: float) -> None:
        self.queue, self.bandwidth = queue, bandwidth
        self.in_flight = 0.0  # bytes asked for that have not landed
        self._weight, self._virtual, self._since = 0.0, 0.0, 0.0
        self._queue: list[tuple[float, int, Source, float]] = []  # by the virtual time at which a source's first unit is served
        self._numbers = itertools.count()
        self._version = 0

    def fetch(self, source: Source, size: float, speed: float, latency: float, landed: Action) -> None:
        """Each worker of a source fetches a unit of `size` bytes. speed: their share relative to others. Units land when they have been served, and
        not before `latency`."""
        self.in_flight += source.workers * size
        source.waiting.append((size, speed, self.queue.now + latency, landed))
        if source.served:
            self._advance()
            self._serve(source)
            self._plan()

    def _serve(self, source: Source) -> None:
        size, speed, _, _ = source.waiting[0]
        source.served = False
        self._weight += source.workers * speed
        heapq.heappush(self._queue, (self._virtual + size / speed, next(self._numbers), source, source.workers * speed))

    def _advance(self) -> None:
        if self._weight:
            self._virtual += (self.queue.now - self._since) * self.bandwidth / self._weight
        self._since = self.queue.now

    def _plan(self) -> None:
        self._version += 1
        if self._queue:
            version, left = self._version, max(0.0, self._queue[0][0] - self._virtual)
            self.queue.at(self.queue.now + left * self._weight / self.bandwidth, lambda: self._served(version))

    def _served(self, version: int) -> None:
        if version != self._version:  # somebody else came in between
            return
        self._advance()
        self._virtual, _, source, weight = heapq.heappop(self._queue)
        self._weight = self._weight - weight if self._queue else 0.0
        source.served = True
        size, _, earliest, landed = source.waiting.popleft()
        if source.waiting:
            self._serve(source)

        def land() -> None:
            self.in_flight -= source.workers * size
            landed()

        self.queue.at(earliest, land)
        self._plan()
