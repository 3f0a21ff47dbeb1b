"""The search: for every ring, the shortest path through all phases' candidates; of these finalists, with workers and hand-offs, the one
that the simulator predicts to be the fastest; and the proof."""

import dataclasses
from collections.abc import Iterator

from mkdsl.graph import OpGraph, Phase
from mkdsl.search import _cache
from mkdsl.search._assign import assign_all
from mkdsl.search._candidates import Candidate, candidates, padded
from mkdsl.search._cost import Cost, Model, Ring
from mkdsl.search._path import Found, Splits, compatible, shortest_path
from mkdsl.search._profile import KIB, Profile, profile
from mkdsl.search._protocol import tensor_plans, with_handoffs
from mkdsl.search._schedule import Schedule
from mkdsl.search._simulate import simulate
from mkdsl.search._smem import fixed_extents, shared_memory
from mkdsl.search._verify import ScheduleError, verify_schedule

# 48 to 72 KiB in flight: enough for full bandwidth, no more. Sizes that are no power of two suit widths like 576 or 3584.
RINGS = (Ring(32 * KIB, 2), Ring(16 * KIB, 3), Ring(16 * KIB, 4), Ring(24 * KIB, 2), Ring(28 * KIB, 2), Ring(36 * KIB, 2))
HANDOFFS = ("data", "counter")
UNLIMITED = 1 << 40  # bytes


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
    """Searches, without a cache: the finalist that the simulator predicts to be the fastest; of several the first."""
    schedules = [complete(graph, batch, gpu, handoff, choice) for choice in finalists(graph, batch, gpu, handoff)]
    schedule = min(schedules, key=lambda s: s.predicted_us)
    verify_schedule(graph, schedule, gpu)
    return schedule


def finalists(graph: OpGraph, batch: int, gpu: Profile, handoff: str) -> list[Choice]:
    """Of every ring the cheapest (depth, candidates) by the cost model.

    Raises:
      ScheduleError: under no ring does anything fit.
    """
    found = [best for ring in RINGS if (best := best_choice(graph, batch, gpu, handoff, ring)) is not None]
    if not found:
        raise ScheduleError(_no_room(graph, batch, gpu))
    return found


def best_choice(graph: OpGraph, batch: int, gpu: Profile, handoff: str, ring: Ring) -> Choice | None:
    """The cheapest depth and candidates under a ring; of equally cheap ones the deepest. None: nothing fits."""
    all_of = {
        p.name: candidates(graph, p, batch=batch, stage_bytes=ring.stage_bytes, workers=gpu.workers, smem_bytes=gpu.smem_bytes)
        for p in graph.phases
    }
    price = Prices(graph, Model(graph, batch, gpu, ring, released=handoff == "counter", padded_batch=padded(batch)))
    best: Choice | None = None
    for stages, choices in _depths(graph, batch, gpu, ring, all_of):
        found = shortest_path(graph, choices, price, ring.capacity(gpu, stages))
        if found is not None and (best is None or found.cost < best.found.cost):
            best = Choice(ring, stages, found)
    return best


def without_k_split(graph: OpGraph, schedule: Schedule, gpu: Profile) -> tuple[Schedule, Profile]:
    """What a schedule would be without K-splitting: every resident whole, no fold split over workers, under the same ring, whatever shared
    memory that takes. Returns it with a profile of as much."""
    lifted = dataclasses.replace(gpu, smem_bytes=UNLIMITED)
    ring, handoff = Ring(schedule.stage_bytes, schedule.window), "data"
    choices = {}
    for p in graph.phases:
        found = candidates(graph, p, batch=schedule.batch, stage_bytes=ring.stage_bytes, workers=gpu.workers, smem_bytes=lifted.smem_bytes)
        choices[p.name] = [(i, c) for i, c in enumerate(found) if c.plan.pieces == c.plan.splits == 1]
    price = Prices(graph, Model(graph, schedule.batch, gpu, ring, released=False, padded_batch=schedule.padded_batch))
    best = shortest_path(graph, choices, price, ring.capacity(gpu, schedule.stages)) if all(choices.values()) else None
    if best is None:
        raise ScheduleError(_no_room(graph, schedule.batch, lifted))
    return complete(graph, schedule.batch, lifted, handoff, Choice(ring, schedule.stages, best)), lifted


class Prices:
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


Choices = dict[str, list[tuple[int, Candidate]]]  # per phase, its candidates with their numbers


def _depths(graph: OpGraph, batch: int, gpu: Profile, ring: Ring, all_of: dict[str, list[Candidate]]) -> Iterator[tuple[int, Choices]]:
    """(stages, candidates for which that leaves room) worth a search: a shallower ring only if it admits more candidates."""
    room = gpu.smem_bytes - sum(e.total for e in fixed_extents(graph, padded(batch)))
    before = 0
    for stages in range(room // ring.stage_bytes, max(2, ring.window) - 1, -1):
        left = room - stages * ring.stage_bytes
        choices = {name: [(i, c) for i, c in enumerate(found) if c.bytes <= left] for name, found in all_of.items()}
        admitted = sum(map(len, choices.values()))
        if all(choices.values()) and admitted > before:
            before = admitted
            yield stages, choices


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
        predicted_us=0.0,
        us=(),
    )
    return timed(graph, with_handoffs(graph, schedule), gpu)


def timed(graph: OpGraph, schedule: Schedule, gpu: Profile) -> Schedule:
    """The schedule with the simulator's predictions."""
    timeline = simulate(graph, schedule, gpu)
    us = tuple((name, round(us, 3)) for name, us in timeline.phase_us)
    return dataclasses.replace(schedule, predicted_us=round(timeline.us, 3), us=us)


def _no_room(graph: OpGraph, batch: int, gpu: Profile) -> str:
    """Why no candidate fits, by the phase that needs most."""
    least: dict[str, int] = {}
    for phase in graph.phases:
        found = candidates(
            graph, phase, batch=batch, stage_bytes=max(r.stage_bytes for r in RINGS), workers=gpu.workers, smem_bytes=1 << 62
        )
        least[phase.name] = min((c.bytes for c in found), default=-1)
    untiled = [name for name, size in least.items() if size < 0]
    if untiled:
        return f"no tile fits {', '.join(untiled)}: k={[graph.phase(n).k for n in untiled]}, rows={[graph.phase(n).rows for n in untiled]}"
    name = max(least, key=lambda n: least[n])
    needs = f"{name} alone needs {least[name]} beside a ring of 2 stages"
    return f"batch {batch} does not fit {gpu.name}'s {gpu.smem_bytes} bytes of shared memory: {needs}"
