"""The search: for every ring, the shortest path through all phases' candidates; then workers, hand-offs, and the proof."""

import dataclasses
import itertools
from collections.abc import Iterator

from mkdsl.graph import OpGraph, Phase
from mkdsl.search import _cache
from mkdsl.search._assign import assign_all
from mkdsl.search._candidates import Candidate, candidates, padded
from mkdsl.search._cost import Cost, Model, Ring, advance
from mkdsl.search._path import STARTS, Found, Splits, compatible, shortest_path
from mkdsl.search._profile import KIB, Profile, profile
from mkdsl.search._protocol import tensor_plans, with_handoffs
from mkdsl.search._schedule import Schedule
from mkdsl.search._smem import fixed_extents, shared_memory
from mkdsl.search._verify import ScheduleError, verify_schedule

# 48 to 72 KiB in flight: enough for full bandwidth, no more. Sizes that are no power of two suit widths like 576 or 3584.
RINGS = (Ring(32 * KIB, 2), Ring(16 * KIB, 3), Ring(16 * KIB, 4), Ring(24 * KIB, 2), Ring(28 * KIB, 2), Ring(36 * KIB, 2))
HANDOFFS = ("data", "counter")


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the search decided: the ring, its depth, and a candidate per phase."""

    ring: Ring
    stages: int
    found: Found


def search(graph: OpGraph, *, batch: int, target: str | Profile, handoff: str = "data", cache: bool = True) -> Schedule:
    """The best schedule by the cost model, verified.

    Args:
      graph: the decode step's phases.
      batch: sequences decoded together, 1 to 16.
      target: a GPU's name, a key of `PROFILES`; a file that `mkdsl probe` wrote, ending in .json; or a profile.
      handoff: how all tensors cross phases: "data" (self-validating words) or "counter" (release/acquire counters).
      cache: look on disk first, and keep the result there.

    Returns:
      The same schedule for the same arguments, always.

    Raises:
      ValueError: batch, target or handoff is none there is.
      ScheduleError: no schedule fits the GPU; the message names the phase that leaves no room.
    """
    gpu = target if isinstance(target, Profile) else profile(target)
    padded(batch)
    if handoff not in HANDOFFS:
        raise ValueError(f"handoff={handoff!r} is neither of {', '.join(HANDOFFS)}")
    if not cache:
        return find(graph, batch, gpu, handoff)
    key = _cache.key(graph, batch, gpu, handoff)
    kept = _cache.load(key)
    if kept is None:
        kept = find(graph, batch, gpu, handoff)
        _cache.store(key, kept)
    else:
        verify_schedule(graph, kept, gpu)
    return kept


def find(graph: OpGraph, batch: int, gpu: Profile, handoff: str) -> Schedule:
    """Searches, without a cache."""
    choice = best_choice(graph, batch, gpu, handoff)
    schedule = complete(graph, batch, gpu, handoff, choice)
    verify_schedule(graph, schedule, gpu)
    return schedule


def best_choice(graph: OpGraph, batch: int, gpu: Profile, handoff: str) -> Choice:
    """The cheapest (ring, depth, candidates). Of equally cheap ones the first found."""
    best: Choice | None = None
    for ring in RINGS:
        all_of = {
            p.name: candidates(graph, p, batch=batch, stage_bytes=ring.stage_bytes, workers=gpu.workers, smem_bytes=gpu.smem_bytes)
            for p in graph.phases
        }
        model = Model(graph, batch, gpu, ring, released=handoff == "counter", padded_batch=padded(batch))
        price = _Prices(graph, model)
        for stages, limits in _depths(graph, batch, gpu, ring, all_of):
            choices = {name: [(i, c) for i, c in enumerate(found) if _within(c, limits)] for name, found in all_of.items()}
            found = shortest_path(graph, choices, price, ring.capacity(gpu, stages)) if all(choices.values()) else None
            if found is not None and (best is None or found.cost < best.found.cost):
                best = Choice(ring, stages, found)
    if best is None:
        raise ScheduleError(_no_room(graph, batch, gpu))
    return best


class _Prices:
    """Costs of (phase, candidate number, splits of what it reads), each computed once."""

    def __init__(self, graph: OpGraph, model: Model) -> None:
        self.graph, self.model = graph, model
        self.known: dict[tuple[str, int, Splits], Cost | None] = {}

    def __call__(self, phase: Phase, number: int, candidate: Candidate, splits: Splits) -> Cost | None:
        key = phase.name, number, splits
        if key not in self.known:
            fits = compatible(self.graph, phase, candidate, splits)
            self.known[key] = self.model.cost(phase, candidate, dict(splits)) if fits else None
        return self.known[key]


Limits = tuple[int, ...]  # bytes: the most that a candidate may have of each of its extents


def _within(candidate: Candidate, limits: Limits) -> bool:
    return all(a <= b for a, b in zip(candidate.extents, limits, strict=True))


def _depths(graph: OpGraph, batch: int, gpu: Profile, ring: Ring, all_of: dict[str, list[Candidate]]) -> Iterator[tuple[int, Limits]]:
    """(stages, limits) worth a search: limits that cannot be widened at that depth, under which every phase has a candidate."""
    if not all(all_of.values()):
        return
    room = gpu.smem_bytes - sum(e.total for e in fixed_extents(graph, padded(batch)))
    levels = []
    for sizes in zip(*([list(axis) for axis in zip(*(c.extents for c in found), strict=True)] for found in all_of.values()), strict=True):
        least = max(map(min, sizes))  # some phase has no candidate with less
        levels.append({size for of_phase in sizes for size in of_phase if size >= least})
    by_stages: dict[int, list[Limits]] = {}
    for limits in itertools.product(*(sorted(level, reverse=True) for level in levels)):  # at equal cost, the widest: fewest pieces
        stages = (room - sum(limits)) // ring.stage_bytes
        if stages >= max(2, ring.window):
            by_stages.setdefault(stages, []).append(limits)
    for stages, found in sorted(by_stages.items(), reverse=True):
        for limits in found:
            if not any(other != limits and all(a <= b for a, b in zip(limits, other, strict=True)) for other in found):
                yield stages, limits


def complete(graph: OpGraph, batch: int, gpu: Profile, handoff: str, choice: Choice) -> Schedule:
    """The schedule of a choice: tasks, waits, incarnations and fences."""
    pad = padded(batch)
    plans = assign_all(graph, [c.plan for c in choice.found.candidates], batch=batch, workers=gpu.workers)
    memory = shared_memory(graph, plans, padded_batch=pad, stages=choice.stages, stage_bytes=choice.ring.stage_bytes)
    splits = {graph.phase(p.name).writes[0]: p.splits for p in plans if graph.phase(p.name).kind == "attention"}
    schedule = Schedule(
        target=gpu.name,
        batch=batch,
        padded_batch=pad,
        workers=gpu.workers,
        stages=choice.stages,
        stage_bytes=choice.ring.stage_bytes,
        window=choice.ring.window,
        smem_bytes=memory.total,
        phases=plans,
        tensors=tensor_plans(graph, handoff, splits),
        predicted_us=round(choice.found.cost, 3),
        us=_times(graph, batch, gpu, handoff, choice, splits),
    )
    return with_handoffs(graph, schedule)


def _times(graph: OpGraph, batch: int, gpu: Profile, handoff: str, choice: Choice, splits: dict[str, int]) -> tuple[tuple[str, float], ...]:
    """Microseconds of one execution of each phase, in the steady state of its loop."""
    model = Model(graph, batch, gpu, choice.ring, released=handoff == "counter", padded_batch=padded(batch))
    capacity = choice.ring.capacity(gpu, choice.stages)
    by_name = {c.plan.name: c for c in choice.found.candidates}
    out = []
    for segment in graph.segments:
        costs = [model.cost(graph.phase(name), by_name[name], splits) for name in segment.phases]
        out += zip(segment.phases, _steady(costs, capacity, segment.repeats), strict=True)
    return tuple((name, round(us, 3)) for name, us in out)


def _steady(costs: list[Cost], capacity: float, repeats: int) -> list[float]:
    """Durations of a loop's phases in its best steady state, as `shortest_path` counts them."""
    best, least = [0.0] * len(costs), float("inf")
    for start in STARTS if repeats > 1 else STARTS[:1]:
        ahead, times = start * capacity, []
        for cost in costs:
            took, ahead = advance(cost, ahead, capacity)
            times.append(took)
        wait = max(0.0, start * capacity - ahead)
        if sum(times) + wait < least:
            best, least = times, sum(times) + wait
    return best


def _no_room(graph: OpGraph, batch: int, gpu: Profile) -> str:
    """Why no candidate fits, by the phase that needs most."""
    least: dict[str, int] = {}
    for phase in graph.phases:
        found = candidates(
            graph, phase, batch=batch, stage_bytes=max(r.stage_bytes for r in RINGS), workers=gpu.workers, smem_bytes=1 << 62
        )
        least[phase.name] = min((sum(c.extents) for c in found), default=-1)
    untiled = [name for name, size in least.items() if size < 0]
    if untiled:
        return f"no tile fits {', '.join(untiled)}: k={[graph.phase(n).k for n in untiled]}, rows={[graph.phase(n).rows for n in untiled]}"
    name = max(least, key=lambda n: least[n])
    needs = f"{name} alone needs {least[name]} beside a ring of 2 stages"
    return f"batch {batch} does not fit {gpu.name}'s {gpu.smem_bytes} bytes of shared memory: {needs}"
