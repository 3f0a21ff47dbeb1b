"""The cost model: a prediction of where a step's time goes, calibrated on one machine. It ranks schedules; it promises nothing.

A phase has a latency (hand-off, staging, the dependent steps before and after its fold), a stream (what its busiest worker fetches, at that
worker's share of device memory) and a compute time. The ring couples phases: while compute waits, the loader runs ahead until every stage
is full, so a phase starts with up to `stages` units already there. `Ahead` carries that, in microseconds of stream.

Calibrated on the hand-written Llama-3.2-1B step (batch 1, context 512, H200): 645-656 us with 6 stages, 661-667 with 5, 686 with 4.
"""

import dataclasses
import math

from mkdsl.graph import OpGraph, Phase
from mkdsl.search._candidates import Candidate
from mkdsl.search._profile import KIB, Profile, interpolate
from mkdsl.search._smem import columns

OVERLAP = 0.02  # of what is hidden behind the stream, this much shows: finishes and staging that nothing needs are not free
UNIT = 32 * KIB  # bytes: what the profile's per-unit times are of


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
    """The loader's side: units of `stage_bytes`, `window` of them in flight."""

    stage_bytes: int
    window: int

    def bandwidth(self, profile: Profile) -> float:
        """Bytes per microsecond of one worker."""
        reached = interpolate(profile.stream, self.window * self.stage_bytes / KIB)
        return profile.bandwidth * reached / profile.workers * 1e-6

    def capacity(self, profile: Profile, stages: int) -> float:
        """Microseconds of stream that a full ring holds."""
        return stages * self.stage_bytes / self.bandwidth(profile)


def advance(cost: Cost, ahead: float, capacity: float) -> tuple[float, float]:
    """(duration, microseconds of stream ahead afterwards) of one phase that starts with `ahead` microseconds of stream in the ring."""
    room = max(capacity * cost.filled, capacity - cost.empty)
    there = min(ahead + cost.latency, room)
    folding = max(cost.stream - there, cost.compute)
    return cost.latency + folding, min(there + folding - cost.stream, capacity)


class Model:
    """Costs of one graph's phases on one GPU under one ring."""

    def __init__(self, graph: OpGraph, batch: int, profile: Profile, ring: Ring, *, released: bool, padded_batch: int) -> None:
        self.graph, self.batch, self.profile, self.ring = graph, batch, profile, ring
        self.padded_batch = padded_batch
        # A hand-off meets a ring that fills while it waits: on average half of the window is in flight.
        in_flight = ring.window * ring.stage_bytes / KIB / 2
        self.handoff = interpolate(profile.released if released else profile.handoff, in_flight)

    def cost(self, phase: Phase, candidate: Candidate, splits: dict[str, int]) -> Cost:
        """Of one execution; `splits` of the attention tensors it reads."""
        return {"fold": self._fold, "attention": self._attention, "map": self._map}[phase.kind](phase, candidate, splits)

    def _arrival(self, phase: Phase) -> float:
        return self.handoff if phase.reads or phase.row_reads else 0.0

    def _read_us(self, phase: Phase, splits: dict[str, int], share: float = 1.0) -> float:
        """Reading tensors whole from L2, beyond the 8 KiB that a hand-off's measured time includes."""
        tensors = [self.graph.tensors[name] for name in phase.reads]
        total = sum(self.batch * t.width * (2 if t.dtype == "bfloat16" else 4) * splits.get(t.name, 1) for t in tensors)
        return max(0.0, total * share - 8 * KIB) / self.profile.l2_rate * 1e6

    def _fold(self, phase: Phase, candidate: Candidate, splits: dict[str, int]) -> Cost:
        plan, p = candidate.plan, self.profile
        tiles = max(n * len(part.weights) for n, part in zip(candidate.busiest, phase.parts, strict=True))
        units = tiles * (phase.k // plan.parts // plan.chunk)
        unit_bytes = 64 * plan.chunk * phase.itemsize
        narrow = max(1.0, p.row_bytes / (plan.chunk * phase.itemsize))
        mma = p.mma_us + p.column_us * (columns(self.padded_batch, plan.parts) - 8)
        compute = units * (p.unit_us + mma * unit_bytes / UNIT)
        read = self._read_us(phase, splits)
        latency = self._arrival(phase) + read + p.fold_us
        return self._cost(latency, units, unit_bytes * narrow, compute + self._groups(candidate, read))

    def _groups(self, candidate: Candidate, read: float) -> float:
        """What more than one group or piece adds: finishes, and a resident in pieces that is staged anew for each group."""
        plan, p = candidate.plan, self.profile
        groups = -(-max(candidate.busiest) // plan.group)
        finishes = (groups - 1) * p.group_us * (1 + 0.1 * (self.padded_batch - 1))
        staged = (groups - 1) * read + (groups * plan.pieces - 1) * p.piece_us if plan.pieces > 1 else 0.0
        return finishes + staged

    def _cost(self, latency: float, units: int, unit_bytes: float, compute: float) -> Cost:
        """`unit_bytes`: at full bandwidth, in the time one unit takes."""
        unit_us = unit_bytes / self.ring.bandwidth(self.profile)
        drift = min(self.profile.drift * units * unit_us, self.profile.drift_us)
        filled = min(1.0, unit_bytes / self.ring.stage_bytes) if units else 1.0
        empty = units * (1.0 - filled) * self.ring.capacity(self.profile, 1)
        return Cost(latency + OVERLAP * compute, units * unit_us + drift, compute, filled, empty)

    def _attention(self, phase: Phase, candidate: Candidate, splits: dict[str, int]) -> Cost:
        plan, p = candidate.plan, self.profile
        positions = min(phase.k, phase.window or phase.k)
        blocks = math.ceil(positions / plan.chunk / plan.splits)
        block_bytes = 2 * plan.chunk * phase.head_dim * phase.itemsize
        n = max(candidate.busiest)
        latency = self._arrival(phase) + self._read_us(phase, splits, 1 / (self.batch * phase.kv_heads)) + p.attention_us
        compute = n * blocks * (p.block_us + p.mma_us * block_bytes / UNIT) + (n - 1) * p.attention_us
        return self._cost(latency, n * blocks, block_bytes, compute)

    def _map(self, phase: Phase, candidate: Candidate, splits: dict[str, int]) -> Cost:
        read = self._read_us(phase, splits)
        return self._cost(self._arrival(phase) + read + self.profile.map_us, 0, 0.0, (sum(candidate.busiest) - 1) * self.profile.group_us)


def floor_us(graph: OpGraph, batch: int, profile: Profile) -> float:
    """The time device memory needs for what one step streams."""
    total = sum(phase.streamed_bytes(batch) * graph.iterations(phase) for phase in graph.phases)
    return total / profile.bandwidth * 1e6
