"""The cost model: a prediction of where a step's time goes, calibrated on one machine. It ranks schedules; it promises nothing.

A phase has a latency (hand-off, staging, the dependent steps before and after its fold), a stream (what its busiest worker fetches, at that
worker's share of device memory) and a compute time. The ring couples phases: while compute waits, the loader runs ahead until every stage
is full, so a phase starts with up to `num_stages` units already there. `Ahead` carries that, in microseconds of stream.

Calibrated on the hand-written Llama-3.2-1B step (batch 1, context 512, H200): 645-656 us with 6 stages, 661-667 with 5, 686 with 4.
"""

import dataclasses

from mkdsl.graph import OpGraph, Phase
from mkdsl.schedule import KIB, Profile, interpolate
from mkdsl.search._candidates import Candidate
from mkdsl.simulate import Work, Workload

OVERLAP = 0.02  # of what is hidden behind the stream, this much shows: epilogues and staging that nothing waits for are not free


@dataclasses.dataclass(frozen=True)
class Cost:
    """One execution of a phase, in microseconds. `latency`: compute waits, the loader need not. `stream`, `compute`: of the fold.

    A unit may be smaller than a stage: `filled` is its part of one, `empty` what all of the phase's units leave empty.
    """

    latency: float
    stream: float
    compute: float
    filled: float = 1.0
    empty: float = 0.0


@dataclasses.dataclass(frozen=True)
class Ring:
    """The loader's side: units of `stage_bytes`, `max_in_flight` of them in flight."""

    stage_bytes: int
    max_in_flight: int

    def bandwidth(self, profile: Profile) -> float:
        """Bytes per microsecond of one worker."""
        return profile.worker_rate(self.max_in_flight * self.stage_bytes)

    def capacity(self, profile: Profile, num_stages: int) -> float:
        """Microseconds of stream that a full ring holds."""
        return num_stages * self.stage_bytes / self.bandwidth(profile)


def advance(cost: Cost, ahead: float, capacity: float) -> tuple[float, float]:
    """(duration, microseconds of stream ahead afterwards) of one phase that starts with `ahead` microseconds of stream in the ring."""
    room = _room(cost, capacity)
    there = min(ahead + cost.latency, room)
    folding = max(cost.stream - there, cost.compute)
    return cost.latency + folding, min(there + folding - cost.stream, capacity)


def _room(cost: Cost, capacity: float) -> float:
    """Microseconds of a phase's stream that the ring holds."""
    return max(capacity * cost.filled, capacity - cost.empty)


def no_worse(a: Cost, b: Cost, capacity: float) -> bool:
    """Whether a phase that costs `a` never ends later than one that costs `b`, nor less far ahead than by waiting as long."""
    return a.latency <= b.latency and a.stream <= b.stream and a.compute <= b.compute and _room(a, capacity) >= _room(b, capacity)


class Model:
    """Costs of one graph's phases on one GPU under one ring."""

    def __init__(self, graph: OpGraph, batch: int, profile: Profile, ring: Ring, *, released: bool, padded_batch: int) -> None:
        self.profile, self.ring, self.workload = profile, ring, Workload(graph, batch, padded_batch, profile)
        # A hand-off meets a ring that fills while it waits: on average half of what may be in flight is.
        in_flight = ring.max_in_flight * ring.stage_bytes / KIB / 2
        self.handoff = interpolate(profile.released if released else profile.handoff, in_flight)

    def cost(self, phase: Phase, candidate: Candidate, splits: dict[str, int]) -> Cost:
        """Of one execution by the busiest worker; `splits` of the attention tensors it reads."""
        return self._cost(phase, self.workload.of(phase, candidate.plan, self._busiest(phase, candidate), splits))

    def _busiest(self, phase: Phase, candidate: Candidate) -> tuple[int, ...]:
        """Items per part that a worker with the most to stream folds: of one part, unless there are fewer workers than parts."""
        if len(phase.parts) > self.profile.workers:
            return candidate.folded
        most = max(range(len(phase.parts)), key=lambda i: candidate.folded[i] * len(phase.parts[i].weights))
        return tuple(n if i == most else 0 for i, n in enumerate(candidate.folded))

    def _arrival(self, phase: Phase) -> float:
        return self.handoff if phase.reads or phase.row_reads else 0.0

    def _cost(self, phase: Phase, work: Work) -> Cost:
        unit_us = work.streamed_bytes / self.ring.bandwidth(self.profile)
        drift = min(self.profile.drift * work.units * unit_us, self.profile.drift_us)
        filled = min(1.0, work.streamed_bytes / self.ring.stage_bytes) if work.units else 1.0
        empty = work.units * (1.0 - filled) * self.ring.capacity(self.profile, 1)
        compute = work.units * work.unit_us + work.pauses
        latency = self._arrival(phase) + work.read + work.before + work.after
        return Cost(latency + OVERLAP * compute, work.units * unit_us + drift, compute, filled, empty)


def floor_us(graph: OpGraph, batch: int, profile: Profile) -> float:
    """The time device memory needs for what one step streams."""
    total = sum(phase.streamed_bytes(batch) * graph.iterations(phase) for phase in graph.phases)
    return total / profile.bandwidth * 1e6
