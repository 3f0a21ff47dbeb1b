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
from mkdsl.search._refine import PROMISING, WORTH
from mkdsl.search._rings import Choices, Prices, numbered

DECIDED_LATER = ("tasks", "waits", "fence")


class Alternative(NamedTuple):
    """us: of a whole step, more than what was chosen; for phases by the cost model, for hand-offs by the simulator. why: that was not chosen although
    `shown_us` is below zero."""

    of: str
    what: str
    us: float
    why: str = ""

    @property
    def shown_us(self) -> float:
        """To a tenth, and no negative zero."""
        return round(self.us, 1) + 0.0


def runners_up(graph: OpGraph, schedule: Schedule, gpu: Profile) -> Iterator[Alternative]:
    """Per phase and tensor, what came second. Whatever seems to be faster than what was chosen says why it was not."""
    overruled = "by the cost model; the simulator, which decides, preferred the chosen"
    yield from (a._replace(why=overruled) if a.shown_us < 0 else a for a in next_best(graph, schedule, gpu))
    yield from (_told(a, schedule) for a in next_handoffs(graph, schedule, gpu))


def _told(alternative: Alternative, schedule: Schedule) -> Alternative:
    """A hand-off with the reason why it was not chosen, if it needs one."""
    if alternative.shown_us >= 0:
        return alternative
    small = -alternative.us <= (1 - WORTH) * schedule.predicted_us
    less, untried = f"not worth it: less than {1 - WORTH:.1%} of a step", f"not tried: the search tries {PROMISING} such changes at most"
    return alternative._replace(why=less if small else untried)


def next_best(graph: OpGraph, schedule: Schedule, gpu: Profile) -> Iterator[Alternative]:
    """Per phase, the best other candidate under the same ring, all other phases as they were chosen."""
    s, (choices, price, capacity) = schedule, _under_its_ring(graph, schedule, gpu)
    alike = {name: [(i, c) for i, c in found if not _difference(c.plan, s.plan(name))] for name, found in choices.items()}
    chosen = shortest_path(graph, alike, price, capacity)
    for p in graph.phases:
        others = [pair for pair in choices[p.name] if pair not in alike[p.name]]
        found = shortest_path(graph, alike | {p.name: others}, price, capacity)
        if chosen is not None and found is not None:
            plan = found.candidates[graph.phases.index(p)].plan
            yield Alternative(p.name, _difference(s.plan(p.name), plan), found.cost - chosen.cost)


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
