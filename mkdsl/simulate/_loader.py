"""The loader of a cohort, the ring that it fills, and the fold that empties it.

What is known beforehand is not played. When a unit will be folded is known as soon as it has landed. And amid a long run of equal units each is
asked for when another one lands, so that memory always has the next one to serve, and compute waits for each. As long as that lasts, units are
equally far apart in memory's virtual time, whatever other cohorts do: they are one event, a `Stretch`. It lasts as long as memory is busy enough:
units then come no faster than compute folds them, and no sooner than latency allows. At its end, or when memory's weight sinks too low, all
counters and times are set to what they would be, had each unit been played.
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
    """The units of one step. latencies: from asking for one to its landing at the soonest, by how many are in flight already."""

    work: Work
    speed: float
    latencies: Sequence[float]


class Loader:
    """Where one cohort's loader and fold stand: how many units were asked for, have landed, and have landed while compute folds their step."""

    def __init__(
        self, queue: EventQueue, memory: Memory, workers: int, streams: Sequence[Stream], num_stages: int, max_in_flight: int
    ) -> None:
        self.queue, self.memory, self.source = queue, memory, Source(workers)
        self.num_stages, self.max_in_flight = num_stages, min(max_in_flight, num_stages)
        self.issued = self.landed = self.folded = 0
        self._freed = collections.deque([0.0] * num_stages, maxlen=num_stages)  # when the last units folded leave their stages
        self._stalled = 0.0  # until when the next unit waits for a stage
        self._streams = (s for s in streams if s.work.units)
        self._stream: Stream | None = None  # that is asked for, and how many of its units are not yet
        self._unissued = 0
        self._folding: Stream | None = None  # that compute folds now, if any, and how many of its units it did not yet
        self._unfolded = 0
        self._runs: Iterator[tuple[float, int]] = iter(())  # those after this one
        self._run = 0  # units of this run that are not folded yet
        self._ready = 0.0  # when compute can begin with the next of them
        self._done: Action = lambda: None

    def load(self) -> None:
        """Issues what may be issued: its stage is free, and the unit `max_in_flight` places before has landed."""
        if self.source.stretch:
            return
        while (in_flight := self.issued - self.landed) < self.max_in_flight:
            if (stream := self._next_stream()) is None:
                return
            ahead = self.issued - self.folded
            free = self._freed[ahead] if ahead < self.num_stages else math.inf
            if free > self.queue.now:
                if self._stalled < free < math.inf:
                    self._stalled = free
                    self.queue.at(free, self.load)
                return
            self.issued += 1
            self._unissued -= 1
            self.memory.fetch(self.source, stream.work.streamed_bytes, stream.speed, stream.latencies[in_flight], self._landed)
        self._foresee()

    def _next_stream(self) -> Stream | None:
        """The stream that the next unit is of; None after the last."""
        if not self._unissued:
            self._stream = next(self._streams, None)
            self._unissued = self._stream.work.units if self._stream else 0
        return self._stream

    def _landed(self) -> None:
        self.landed += 1
        self._fold()
        self.load()

    def fold(self, stream: Stream, done: Action) -> None:
        """Compute begins to fold a step's units. done: what it does when all are folded."""
        self._folding, self._unfolded, self._done = stream, stream.work.units, done
        self._runs, self._run, self._ready = iter(stream.work.runs), 0, self.queue.now
        self._fold()
        self.load()

    def _fold(self) -> None:
        """Folds what has landed, as far as compute has come."""
        while self._folding:
            if self._run and self.folded == self.landed:
                return
            if self._run:
                self._ready = max(self._ready, self.queue.now) + self._folding.work.unit_us
                self._freed.append(self._ready)
                self.folded += 1
                self._run -= 1
                self._unfolded -= 1
            elif run := next(self._runs, None):
                self._ready += run[0]
                self._run = run[1]
            else:
                self._folding = None
                self.queue.at(self._ready, self._done)

    # Stretches.

    def _foresee(self) -> None:
        """Begins a stretch where one can be foreseen: over the rest of the step, if compute waits even after each pause, or of the run."""
        stream = self._stream
        if stream is None or stream is not self._folding or len(self.source.waiting) < self.max_in_flight:
            return
        work = stream.work
        for units, each_us in ((self._unfolded, work.unit_us + work.longest_pause), (self._run, work.unit_us)):
            if min(units, self._unissued) >= LONG and (floor := self._floor(stream, each_us)) <= self.memory.weight:
                length = work.streamed_bytes / stream.speed
                start = self.source.served - length
                self.memory.stretch(
                    self.source,
                    Stretch(
                        start=start,
                        length=length,
                        units=min(units, self._unissued),
                        floor=floor,
                        lag=work.unit_us if self._tight else 0.0,
                        settle=functools.partial(self._settle, stream, start, self._ready),
                    ),
                )
                return

    @property
    def _tight(self) -> bool:
        """Whether as many units are in flight as there are stages: then one is asked for only when the one that has landed is folded."""
        return self.max_in_flight == self.num_stages

    def _floor(self, stream: Stream, each_us: float) -> float:
        """The least weight of memory at which no unit of a stretch that begins now would be late. each_us: compute's time for one."""
        now, virtual, length = self.queue.now, self.memory.virtual(), stream.work.streamed_bytes / stream.speed
        latency = stream.latencies[self.max_in_flight - 1] + (stream.work.unit_us if self._tight else 0.0)
        least = max(each_us / length, latency / (self.max_in_flight * length))
        if least * self.memory.bandwidth > self.memory.weight:
            return math.inf
        start = self.source.served - length - virtual
        free = (
            [self._ready] if self._tight else [*itertools.islice(self._freed, self.max_in_flight, None), self._ready + stream.work.unit_us]
        )
        for times in (free, (earliest for _, _, earliest, _ in self.source.waiting)):
            for i, time in enumerate(times, 1):
                if time > now:
                    if start + i * length <= 0:
                        return math.inf
                    least = max(least, (time - now) / (start + i * length))
        return least * self.memory.bandwidth

    def _settle(self, stream: Stream, start: float, ready: float, served: int) -> None:
        """Does what the first units of a stretch would have done, each when it was served."""
        unit_us, length, latency = stream.work.unit_us, stream.work.streamed_bytes / stream.speed, stream.latencies[self.max_in_flight - 1]
        waiting, issued = self.source.waiting, served
        skipped = max(0, served - self.num_stages)
        ready += skipped * unit_us + self._skip(skipped)
        for i in range(skipped + 1, served + 1):
            landed = self.memory.time(start + i * length)
            ready = max(ready + self._skip(1), landed) + unit_us
            self._freed.append(ready)
            if i > served - self.max_in_flight:
                size, speed, _, land = waiting.popleft()
                asked = ready if self._tight else landed
                if asked <= self.queue.now:
                    waiting.append((size, speed, asked + latency, land))
                else:
                    issued -= 1
                    self.queue.at(asked, self.load)
        self._ready = ready
        self.landed += served
        self.folded += served
        self._unfolded -= served
        self.issued += issued
        self._unissued -= issued
        self._fold()

    def _skip(self, units: int) -> float:
        """Goes on by so many units, and returns compute's pauses before them."""
        pauses = 0.0
        while units > self._run:
            units -= self._run
            pause, self._run = next(self._runs)
            pauses += pause
        self._run -= units
        return pauses
