"""The search: for every ring, the shortest path through all phases' candidates; of these finalists, with workers and hand-offs, the one
that the simulator predicts to be the fastest; and the proof."""

import dataclasses
import itertools

from mkdsl.graph import OpGraph
from mkdsl.proof import Rule, ScheduleError, verify_schedule
from mkdsl.schedule import FoldPlan, Handoff, PhasePlan, Profile, Schedule, profile
from mkdsl.search import _cache
from mkdsl.search._candidates import candidates, padded
from mkdsl.search._cost import Model, Ring
from mkdsl.search._draft import draft, rough, timed
from mkdsl.search._handoffs import with_handoffs
from mkdsl.search._path import shortest_path
from mkdsl.search._refine import refined
from mkdsl.search._rings import Choice, Prices, cheapest, numbered, rings

FINALISTS = 2  # depths of each ring
SIMULATED = 16  # of all rings' cheapest, for each launch
IDLE = 1.01  # a launch that leaves SMs idle must be predicted to be faster by this: such predictions were optimistic (docs/measurements.md)
CLOSEST = 3  # of each launch's finalists, by a simulation without drift, that are simulated with it
UNLIMITED = 1 << 40  # bytes


def search(graph: OpGraph, *, batch: int, target: str | Profile, handoff: Handoff = Handoff.SENTINEL, cache: bool = True) -> Schedule:
    """The best schedule by the cost model, verified.

    Args:
      graph: the decode step's phases.
      batch: sequences decoded together, 1 to 16.
      target: a GPU's name, a key of `PROFILES`; a file that `mkdsl probe` wrote, ending in .json; or a profile.
      handoff: how tensors cross phases: `Handoff.SENTINEL`, where the proof and the simulator have nothing better, or all of them by
        `Handoff.RELEASE_ACQUIRE`, to compare.
      cache: look on disk first, and keep the result there.

    Returns:
      The same schedule for the same arguments, always.

    Raises:
      ValueError: batch, target or handoff is none there is.
      ScheduleError: no schedule fits the GPU; the message names the phase that leaves no room.
    """
    gpu, handoff = target if isinstance(target, Profile) else profile(target), Handoff(handoff)
    padded(batch)
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


def find(graph: OpGraph, batch: int, gpu: Profile, handoff: Handoff) -> Schedule:
    """Searches, without a cache: of the finalists of all orders of phases the one that the simulator predicts to be the fastest."""
    found = (s for g in (graph, *graph.others) for s in _closest(g, batch, gpu, handoff))
    best = min(found, key=lambda s: s.predicted_us * (IDLE if s.workers < gpu.workers else 1.0))
    best = refined(graph.in_order(best.order), best, gpu, handoffs=handoff.self_validating)
    verify_schedule(graph, best, gpu)
    return best


def _closest(graph: OpGraph, batch: int, gpu: Profile, handoff: Handoff) -> list[Schedule]:
    """The few finalists of each launch that look fastest, with hand-offs that are safe: what those cost may decide."""
    ranked = sorted(finalists(graph, batch, gpu, handoff), key=lambda c: rough(graph, batch, handoff, c).us)
    launches = [[c for c in ranked if c.gpu == launch][:CLOSEST] for launch in gpu.launches]
    return [_safe(graph, batch, gpu, c, handoff) for c in itertools.chain(*launches)]


def _safe(graph: OpGraph, batch: int, gpu: Profile, choice: Choice, handoff: Handoff) -> Schedule:
    return timed(graph, with_handoffs(graph, draft(graph, batch, handoff, choice)), gpu)


def finalists(graph: OpGraph, batch: int, gpu: Profile, handoff: Handoff) -> list[Choice]:
    """Of every launch and ring the cheapest few (depth, candidates) by the cost model, and of a launch's again the cheapest.

    Raises:
      ScheduleError: under no ring does anything fit.
    """
    found = [choice for launch in gpu.launches for choice in _launched(graph, batch, gpu, launch, handoff)]
    if not found:
        raise ScheduleError(Rule.ROOM, _no_room(graph, batch, gpu))
    return found


def _launched(graph: OpGraph, batch: int, gpu: Profile, launch: Profile, handoff: Handoff) -> list[Choice]:
    """The finalists of one launch; none that leaves SMs idle for clusters that no phase uses."""
    found = [choice for ring in rings(graph) for choice in first(cheapest(graph, batch, launch, handoff, ring))]
    used = [c for c in found if launch.workers == gpu.workers or any(x.plan.cluster > 1 for x in c.found.candidates)]
    return sorted(used, key=lambda choice: choice.found.cost)[:SIMULATED]


def first(choices: list[Choice]) -> list[Choice]:
    """The cheapest few that split an attention, and as many that do not."""
    split = [any(c.plan.splits > 1 for c in choice.found.candidates) for choice in choices]
    return [c for c, s in zip(choices, split, strict=True) if s][:FINALISTS] + [c for c, s in zip(choices, split, strict=True) if not s][
        :FINALISTS
    ]


def without_k_split(graph: OpGraph, schedule: Schedule, gpu: Profile) -> tuple[Schedule, Profile]:
    """What a schedule would be without K-splitting: every resident whole, no fold split over workers, under the same ring, whatever shared
    memory that takes. Returns it with a profile of as much."""
    graph, lifted = graph.in_order(schedule.order), dataclasses.replace(gpu, smem_bytes=UNLIMITED)
    ring = Ring(schedule.stage_bytes, schedule.max_in_flight)
    all_of = numbered(graph, schedule.batch, gpu=lifted, ring=ring)
    choices = {name: [(i, c) for i, c in found if _unsplit(c.plan)] for name, found in all_of.items()}
    price = Prices(graph, Model(graph, schedule.batch, gpu, ring, released=False, padded_batch=schedule.padded_batch))
    best = shortest_path(graph, choices, price, ring.capacity(gpu, schedule.num_stages)) if all(choices.values()) else None
    if best is None:
        raise ScheduleError(Rule.ROOM, _no_room(graph, schedule.batch, lifted))
    whole = draft(graph, schedule.batch, Handoff.SENTINEL, Choice(lifted, ring, schedule.num_stages, best))
    whole = timed(graph, with_handoffs(graph, whole), lifted)
    return refined(graph, whole, lifted, handoffs=any(t.handoff.self_validating for t in schedule.tensors)), lifted


def _unsplit(plan: PhasePlan) -> bool:
    return plan.cluster == plan.splits == 1 and (not isinstance(plan, FoldPlan) or plan.k_stages == 1)


def _no_room(graph: OpGraph, batch: int, gpu: Profile) -> str:
    """Why no candidate fits, by the phase that needs most."""
    least: dict[str, int] = {}
    for phase in graph.phases:
        found = candidates(
            graph, phase, batch=batch, stage_bytes=max(r.stage_bytes for r in rings(graph)), workers=gpu.workers, smem_bytes=1 << 62
        )
        least[phase.name] = min((c.bytes for c in found), default=-1)
    untiled = [name for name, size in least.items() if size < 0]
    if untiled:
        return "no tile fits " + "; ".join(
            f"{n}: {graph.phase(n).kind}{graph.phase(n).streams}, rows={graph.phase(n).rows}" for n in untiled
        )
    name = max(least, key=lambda n: least[n])
    needs = f"{name} alone needs {least[name]} beside a ring of 2 stages"
    return f"batch {batch} does not fit {gpu.name}'s {gpu.smem_bytes} bytes of shared memory: {needs}"
