"""What is to be said of a schedule, as numbers: where a step's time goes, what bounds it, and how much shared memory it takes."""

import dataclasses
from collections.abc import Sequence

from mkdsl.graph import OpGraph, Phase
from mkdsl.schedule import Profile, Schedule, SharedMemory, shared_memory
from mkdsl.search._cost import floor_us
from mkdsl.simulate import Timeline, Workload

BOUNDS = ("bytes", "compute", "hand-off")
HIDDEN = 0.15  # of a phase's time: less than this between it and what bounds it is hidden


@dataclasses.dataclass(frozen=True)
class Account:
    """One run of a phase in the steady state of its loop, microseconds.

    runs: in a step. streamed: bytes. us: from the last signal of all phases before to its own last. bytes_us: what device memory alone needs for
    what is streamed. compute_us: arithmetic and pauses of the busiest worker. parts: what the median worker does ("wait", "read", "fold", "epilogue").
    """

    phase: str
    runs: int
    streamed: int
    us: float
    bytes_us: float
    compute_us: float
    parts: dict[str, float]

    @property
    def bound(self) -> str:
        """One of BOUNDS. A phase near the time of its bytes is bound by them (below it, its first units were in the ring already), one near that
        of its arithmetic by compute, any other by the latency of its hand-off and its short dependent steps."""
        if self.bytes_us >= (1 - HIDDEN) * self.us:
            return "bytes"
        return "compute" if self.compute_us >= (1 - HIDDEN) * self.us else "hand-off"

    @property
    def exposed_us(self) -> float:
        """What neither bytes nor compute explain: the latency that shows."""
        return max(0.0, self.us - max(self.bytes_us, self.compute_us))

    def explained_us(self, bound: str) -> float:
        """The part of us that bytes explain, or compute if that is more; of the hand-off what is left."""
        if bound == "hand-off":
            return self.exposed_us
        larger = "bytes" if self.bytes_us >= self.compute_us else "compute"
        return self.us - self.exposed_us if bound == larger else 0.0


@dataclasses.dataclass(frozen=True)
class Summary:
    """A schedule in a few numbers. floor_us: what device memory needs for `streamed` bytes of a step, at `bandwidth` bytes a second. memory: of one worker,
    of which the GPU has smem_limit bytes. bounds: for each of BOUNDS that there is, the microseconds of a step that it explains, and the phases that it bounds."""

    target: str
    batch: int
    padded_batch: int
    context: int
    workers: int
    us: float
    floor_us: float
    streamed: int
    bandwidth: float
    memory: SharedMemory
    smem_limit: int
    bounds: dict[str, tuple[float, tuple[str, ...]]]


def accounts(graph: OpGraph, schedule: Schedule, profile: Profile, timeline: Timeline) -> tuple[Account, ...]:
    """Of all phases, in program order; the times are the timeline's."""
    us = dict(timeline.phase_us)
    workload = Workload(graph, schedule.batch, schedule.padded_batch, profile)

    def account(phase: Phase) -> Account:
        streamed = phase.streamed_bytes(schedule.batch)
        bytes_us, compute_us = streamed / profile.bandwidth * 1e6, _compute_us(workload, schedule, phase)
        return Account(phase.name, graph.iterations(phase), streamed, us[phase.name], bytes_us, compute_us, timeline.parts_us(phase.name))

    return tuple(map(account, graph.in_order(schedule.order).phases))


def _compute_us(workload: Workload, schedule: Schedule, phase: Phase) -> float:
    splits, plan = {t.name: t.splits for t in schedule.tensors}, schedule.plan(phase.name)
    works = [workload.of(phase, plan, counts, splits) for counts in {plan.folded(w) for w in plan.participants}]
    return max(w.units * w.unit_us + w.pauses for w in works)


def memory_of(graph: OpGraph, schedule: Schedule) -> SharedMemory:
    """The shared memory of one worker."""
    s = schedule
    return shared_memory(graph, s.phases, padded_batch=s.padded_batch, num_stages=s.num_stages, stage_bytes=s.stage_bytes)


def summary(graph: OpGraph, schedule: Schedule, profile: Profile, found: Sequence[Account]) -> Summary:
    """A schedule in a few numbers. found: the accounts of its phases."""
    bounds = {b: (sum(a.runs * a.explained_us(b) for a in found), tuple(a.phase for a in found if a.bound == b)) for b in BOUNDS}
    return Summary(
        target=schedule.target,
        batch=schedule.batch,
        padded_batch=schedule.padded_batch,
        context=graph.context,
        workers=schedule.workers,
        us=schedule.predicted_us,
        floor_us=floor_us(graph, schedule.batch, profile),
        streamed=sum(a.runs * a.streamed for a in found),
        bandwidth=profile.bandwidth,
        memory=memory_of(graph, schedule),
        smem_limit=profile.smem_bytes,
        bounds={b: (us, of) for b, (us, of) in bounds.items() if us or of},
    )
