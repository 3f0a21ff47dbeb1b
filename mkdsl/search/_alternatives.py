"""What else could have been chosen, and what it would cost: for each phase the next best candidate and numbers of events, for each tensor the
other hand-off, for values that may cross phases or not the other form."""

from collections.abc import Iterator
from typing import NamedTuple

from mkdsl.graph import OpGraph, neighbours
from mkdsl.search._cost import Model, Ring
from mkdsl.search._draft import timed
from mkdsl.search._path import Found, Price, shortest_path
from mkdsl.search._profile import Profile
from mkdsl.search._protocol import made_safe, other_events, other_handoffs
from mkdsl.search._rings import Choices, Prices, numbered
from mkdsl.search._schedule import PhasePlan, Schedule
from mkdsl.search._smem import fixed_bytes

DECISIONS = ("rows", "parts", "chunk", "pieces", "cluster", "splits", "group", "instruction")


class Alternative(NamedTuple):
    """us: of a whole step, more than what was chosen; for phases and forms by the cost model, for hand-offs and events by the simulator."""

    of: str
    what: str
    us: float


def next_best(graph: OpGraph, schedule: Schedule, gpu: Profile) -> Iterator[Alternative]:
    """Per phase, the best path under the same ring that does not take the chosen candidate there."""
    s, (choices, price, capacity) = schedule, _under_its_ring(graph, schedule, gpu)
    best = shortest_path(graph, choices, price, capacity)
    for p in graph.phases:
        others = [(i, c) for i, c in choices[p.name] if not _same(c.plan, s.plan(p.name))]
        found = shortest_path(graph, choices | {p.name: others}, price, capacity) if others else None
        if best is not None and found is not None:
            plan = found.candidates[graph.phases.index(p)].plan
            yield Alternative(p.name, _difference(s.plan(p.name), plan), found.cost - best.cost)


def next_forms(graph: OpGraph, schedule: Schedule, gpu: Profile) -> Iterator[Alternative]:
    """Per form that differs in one phase, the best path under the same ring."""

    def path(form: OpGraph) -> Found | None:
        choices, price, capacity = _under_its_ring(form, schedule, gpu)
        return shortest_path(form, choices, price, capacity) if all(choices.values()) else None

    best = path(graph)
    for form in neighbours(graph):
        found = path(form)
        if best is not None and found is not None:
            more, less = form.form.crossing - graph.form.crossing, graph.form.crossing - form.form.crossing
            names = sorted({form.tensor_of[i] for i in more} | {graph.tensor_of[i] for i in less})
            yield Alternative(", ".join(names), "crosses" if more else "does not cross", found.cost - best.cost)


def _under_its_ring(graph: OpGraph, schedule: Schedule, gpu: Profile) -> tuple[Choices, Price, float]:
    """The candidates for which a schedule's ring leaves room, their prices, and the microseconds of stream that the ring holds."""
    s, ring, gpu = schedule, Ring(schedule.stage_bytes, schedule.window), gpu.launched(schedule.cluster)
    left = gpu.smem_bytes - s.stages * s.stage_bytes - fixed_bytes(graph, s.padded_batch, max(gpu.sizes))
    all_of = numbered(graph, s.batch, gpu, ring)
    choices = {name: [(i, c) for i, c in found if c.bytes <= left] for name, found in all_of.items()}
    released = any(t.handoff == "counter" for t in s.tensors)
    price = Prices(graph, Model(graph, s.batch, gpu, ring, released=released, padded_batch=s.padded_batch))
    return choices, price, ring.capacity(gpu, s.stages)


def _same(a: PhasePlan, b: PhasePlan) -> bool:
    return all(getattr(a, d) == getattr(b, d) for d in DECISIONS)


def _difference(chosen: PhasePlan, other: PhasePlan) -> str:
    return ", ".join(f"{d} {getattr(other, d)}" for d in DECISIONS if getattr(other, d) != getattr(chosen, d))


def next_handoffs(graph: OpGraph, schedule: Schedule, gpu: Profile) -> Iterator[Alternative]:
    """Per tensor, the schedule with its other hand-off, where that can be made safe."""
    for tensor, changed in other_handoffs(graph, schedule):
        yield from _simulated(graph, schedule, changed, gpu, tensor, changed.tensor(tensor).handoff)


def next_events(graph: OpGraph, schedule: Schedule, gpu: Profile) -> Iterator[Alternative]:
    """Per phase, the schedule in which it has another number of events, where that can be made safe."""
    for phase, changed in other_events(graph, schedule):
        yield from _simulated(graph, schedule, changed, gpu, phase, f"events {changed.plan(phase).events}")


def _simulated(graph: OpGraph, schedule: Schedule, changed: Schedule, gpu: Profile, of: str, what: str) -> Iterator[Alternative]:
    safe = made_safe(graph, changed)
    if safe is not None:
        yield Alternative(of, what, timed(graph, safe, gpu).predicted_us - schedule.predicted_us)
