"""What the search finds quickly, found by trying everything."""

import itertools
from collections.abc import Sequence

from mkdsl.graph import AttentionPhase, OpGraph
from mkdsl.schedule import Profile, fixed_bytes, shared_memory
from mkdsl.search._assign import assign_all
from mkdsl.search._candidates import Candidate, candidates, padded
from mkdsl.search._cost import Cost, Model, Ring, advance
from mkdsl.search._path import STARTS


def segment_us(costs: Sequence[Cost], repeats: int, capacity: float) -> float:
    """Of one iteration of a segment, in its best steady state."""
    times = []
    for start in STARTS if repeats > 1 else (0.0,):
        time, ahead = 0.0, start * capacity
        for cost in costs:
            took, ahead = advance(cost, ahead, capacity)
            time += took
        times.append(time + max(0.0, start * capacity - ahead))
    return min(times)


def least_cost(graph: OpGraph, batch: int, gpu: Profile, rings: Sequence[Ring]) -> float:
    """By trying every combination of candidates under every launch and ring; infinite if none fits."""
    best = float("inf")
    for launch, ring in itertools.product(gpu.launches, rings):
        model = Model(graph, batch, launch, ring, released=False, padded_batch=padded(batch))
        found = [
            candidates(
                graph, p, batch=batch, stage_bytes=ring.stage_bytes, workers=launch.workers, smem_bytes=launch.smem_bytes,
                clusters=launch.sizes, instructions=launch.instructions,
            )
            for p in graph.phases
        ]  # fmt: skip
        for combination in itertools.product(*found):
            best = min(best, _cost(graph, batch, launch, ring, model, combination))
    return best


def _cost(graph: OpGraph, batch: int, gpu: Profile, ring: Ring, model: Model, combination: tuple[Candidate, ...]) -> float:
    by_name = {c.plan.name: c for c in combination}
    splits = {p.writes[0]: by_name[p.name].plan.splits for p in graph.phases if isinstance(p, AttentionPhase)}
    num_stages = (gpu.smem_bytes - _beside_the_ring(graph, batch, gpu, combination)) // ring.stage_bytes
    if num_stages < max(2, ring.max_in_flight):
        return float("inf")
    total = 0.0
    for segment in graph.segments:
        costs = [model.cost(graph.phase(name), by_name[name], splits) for name in segment.phases]
        total += segment.repeats * segment_us(costs, segment.repeats, ring.capacity(gpu, num_stages))
    return total


def _beside_the_ring(graph: OpGraph, batch: int, gpu: Profile, combination: tuple[Candidate, ...]) -> int:
    """Bytes of shared memory that the phases need, and what is set aside for a launch's clusters, whoever uses them."""
    plans = assign_all(graph, [c.plan for c in combination], batch=batch, workers=gpu.workers)
    memory = shared_memory(graph, plans, padded_batch=padded(batch), num_stages=0, stage_bytes=0)
    of_phases = memory.total - sum(e.total for e in memory.by_phase[""])
    return of_phases + fixed_bytes(graph, padded(batch), max(gpu.sizes))
