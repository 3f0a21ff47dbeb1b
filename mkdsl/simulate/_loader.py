"""The loader of a cohort, the ring that it fills, and the fold that empties it.

What is known beforehand is not played. When a unit is folded is known as soon as it has landed: a fixed time after that, or after the unit before
is folded. And amid a long run, each unit is issued as another one lands, memory always has the next one to serve, and compute keeps up. Then the
units are equally far apart in memory's virtual time, whatever other cohorts do, and so many of them are one event, a `Stretch`. That holds as
long as memory serves so many others that units come no faster than compute folds them and no sooner than latency lets them. The weight that this
takes is the stretch's floor. At its end, or where memory's weight sinks below its floor, a stretch is settled: everything is set to what it
would be, had each unit been played.
"""

import collections
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mkdsl.simulate._memory import Action, EventQueue, Memory, Source, Stretch
from mkdsl.simulate._work import Work

LONG = 4  # units that are worth a stretch


class Stream(NamedTuple):
    """The units of one step. latencies: until one lands at the soonest, by how many are in flight before it."""

    work: Work
    speed: float
    latencies: Sequence[float]


class Loader:
    """Where one cohort's loader and fold stand. freed: when the stages of the last units folded were or will be free."""

    def __init__(
        self, queue: EventQueue, memory: Memory, workers: int, streams: Sequence[Stream], num_stages: int, max_in_flight: int
    ) -> None:
        self.queue, self.memory, self.source = queue, memory, Source(workers)
        self.num_stages, self.max_in_flight = num_stages, min(max_in_flight, num_stages)
        self.issued = self.landed = self.folded = 0
        self.freed = collections.deque([0.0] * num_stages, maxlen=num_stages)
        self._stalled = 0.0  # until when no stage is free
        self._streams = (s for s in streams if s.work.units)
        self._stream: Stream | None = None  # that is loaded, and how many of its units are not issued
        self._unissued = 0
        self._folding: Stream | None = None  # that compute is amid, if it is, and its runs after this one
        self._runs: Iterator[tuple[float, int]] = iter(())
        self._unfolded, self._ready = 0, 0.0  # units of this run, and when compute is ready for the next of them
        self._done: Action = lambda: None

    def load(self) -> None:
        """Issues what may be issued: its stage is free, and the unit `max_in_flight` places before has landed."""
        if self.source.stretch:
            return
        while (in_flight := self.issued - self.landed) < self.max_in_flight:
            if not self._unissued:
                self._stream = next(self._streams, None)
                if not self._stream:
                    return
                self._unissued = self._stream.work.units
            ahead = self.issued - self.folded
            free = self.freed[ahead] if ahead < self.num_stages else math.inf
            if free > self.queue.now:
                if self._stalled < free < math.inf:
                    self._stalled = free
                    self.queue.at(free, self.load)
                return
            stream = self._stream
            self.issued += 1
            self._unissued -= 1
            self.memory.fetch(self.source, stream.work.streamed_bytes, stream.speed, stream.latencies[in_flight], self._landed)
        self._foresee()

    def _landed(self) -> None:
        self.landed += 1
        self._fold()
        self.load()

    def fold(self, stream: Stream, done: Action) -> None:
        """Compute begins to fold its next step's units."""
        self._folding, self._runs, self._done = stream, iter(stream.work.runs), done
        self._unfolded, self._ready = 0, self.queue.now
        self._fold()
        self.load()

    def _fold(self) -> None:
        """Folds what has landed, as far as compute has come."""
        while self._folding:
            if self._unfolded and self.folded == self.landed:
                return
            if self._unfolded:
                self._ready = max(self._ready, self.queue.now) + self._folding.work.unit_us
                self.freed.append(self._ready)
                self.folded += 1
                self._unfolded -= 1
            elif run := next(self._runs, None):
                self._ready += run[0]
                self._unfolded = run[1]
            else:
                self._folding = None
                self.queue.at(self._ready, self._done)

    # Stretches.

    def _foresee(self) -> None:
        """Begins a stretch where one can be foreseen."""
        units, stream, waiting, most = min(self._unfolded, self._unissued), self._stream, self.source.waiting, self.max_in_flight
        if units < LONG or stream is not self._folding or stream is None or len(waiting) < most:
            return
        memory, now, unit_us = self.memory, self.queue.now, stream.work.unit_us
        tight = most == self.num_stages  # a stage is free only when what has landed there is folded
        lag, length = unit_us if tight else 0.0, stream.work.streamed_bytes / stream.speed
        start, virtual = self.source.served - length, memory.virtual
        bounds = [(unit_us, length), (stream.latencies[most - 1] + lag, most * length)]
        free = [self._ready] if tight else [*itertools.islice(self.freed, most, None), self._ready + unit_us]
        for times in (free, (earliest for _, _, earliest, _ in waiting)):
            bounds += [(time - now, start + i * length - virtual) for i, time in enumerate(times, 1) if time > now]
        if any(time > 0 and virtual <= 0 for time, virtual in bounds):
            return
        floor = memory.bandwidth * max(time / virtual for time, virtual in bounds if virtual > 0)
        if floor <= memory.weight:
            ready = self._ready
            settle = functools.partial(self._settle, stream, start, length, ready)
            memory.stretch(self.source, Stretch(start=start, length=length, units=units, floor=floor, lag=lag, settle=settle))

    def _settle(self, stream, start, length, ready, served) -> None:
        unit_us, waiting, most, tight = stream.work.unit_us, self.source.waiting, self.max_in_flight, self.max_in_flight == self.num_stages
        if not served:
            return
        missing = 0
        for i in range(max(1, served - self.num_stages + 1), served + 1):
            landed = self.memory.time(start + i * length)
            self._ready = max(ready + i * unit_us, landed + unit_us)
            self.freed.append(self._ready)
            issued = self._ready if tight else landed
            if i > served - most:
                unit = waiting.popleft()
                if issued <= self.queue.now:
                    waiting.append((unit[0], unit[1], issued + stream.latencies[most - 1], unit[3]))
                else:
                    missing += 1
                    self.queue.at(issued, self.load)
        self.landed += served
        self.folded += served
        self._unfolded -= served
        self.issued += served - missing
        self._unissued -= served - missing
