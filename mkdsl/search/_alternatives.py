"""What else could have been chosen, and what it would cost: for each phase the next best candidate, for each tensor the other hand-off."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from mkdsl.graph import OpGraph
from mkdsl.schedule import PhasePlan, Profile, Schedule, fixed_bytes
from mkdsl.search._cost import Model, Ring
from mkdsl.search._draft import timed
from mkdsl.search._handoffs import made_safe, other_handoffs
from mkdsl.search._path import Price, shortest_path
from mkdsl.search._rings import Choices, Prices, numbered

DECIDED_LATER = ("tasks", "waits", "fence")


class Alternative(NamedTuple):
    """us: of a whole step, more than what was chosen; for phases by the cost model, for hand-offs by the simulator."""

    of: str
    what: str
    us: float


def next_best(graph: OpGraph, schedule: Schedule, gpu: Profile) -> Iterator[Alternative]:
    """Per phase, the best path under the same ring that does not take the chosen candidate there."""
    s, (choices, price, capacity) = schedule, _under_its_ring(graph, schedule, gpu)
    best = shortest_path(graph, choices, price, capacity)
    for p in graph.phases:
        others = [(i, c) for i, c in choices[p.name] if _difference(c.plan, s.plan(p.name))]
        found = shortest_path(graph, choices | {p.name: others}, price, capacity) if others else None
        if best is not None and found is not None:
            plan = found.candidates[graph.phases.index(p)].plan
            yield Alternative(p.name, _difference(s.plan(p.name), plan), found.cost - best.cost)


def _under_its_ring(graph: OpGraph, schedule: Schedule, gpu: Profile) -> tuple[Choices, Price, float]:
    """The candidates for which a schedule's ring leaves room, their prices, and the microseconds of stream that the ring holds."""
    s, ring, gpu = schedule, Ring(schedule.stage_bytes, schedule.max_in_flight), gpu.launched(schedule.cluster)
    left = gpu.smem_bytes - s.num_stages * s.stage_bytes - fixed_bytes(graph, s.padded_batch, max(gpu.sizes))
    all_of = numbered(graph, s.batch, gpu, ring)
    choices = {name: [(i, c) for i, c in found if c.bytes <= left] for name, found in all_of.items()}
    released = any(t.handoff.releases for t in s.tensors)
    price = Prices(graph, Model(graph, s.batch, gpu, ring, released=released, padded_batch=s.padded_batch))
    return choices, price, ring.capacity(gpu, s.num_stages)


def _decisions(plan: PhasePlan) -> dict[str, Any]:
    return {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan) if f.name not in DECIDED_LATER}


def _difference(chosen: PhasePlan, other: PhasePlan) -> str:
    before = _decisions(chosen)
    return ", ".join(f"{name} {value}" for name, value in _decisions(other).items() if value != before[name])


def next_handoffs(graph: OpGraph, schedule: Schedule, gpu: Profile) -> Iterator[Alternative]:
    """Per tensor, the schedule with its other hand-off, where that can be made safe."""
    for tensor, changed in other_handoffs(graph, schedule):
        safe = made_safe(graph, changed)
        if safe is not None:
            yield Alternative(tensor, safe.tensor(tensor).handoff, timed(graph, safe, gpu).predicted_us - schedule.predicted_us)
