"""From the cost model's choices to schedules that the simulator can judge, and better ones near by."""

import dataclasses
from collections.abc import Iterator

from mkdsl.graph import OpGraph, Phase
from mkdsl.search._assign import assign_all
from mkdsl.search._candidates import Candidate, candidates, padded
from mkdsl.search._cost import Model
from mkdsl.search._path import Found, compatible
from mkdsl.search._profile import Profile
from mkdsl.search._protocol import tensor_plans, with_producers
from mkdsl.search._rings import Choice, Prices
from mkdsl.search._schedule import Schedule
from mkdsl.search._simulate import Timeline, simulate
from mkdsl.search._smem import fixed_extents, shared_memory

REFINED = 8  # phases that a refinement looks at, those that take most of a step
TRIED = 3  # candidates of each that it simulates
GAIN = 1e-3  # of a step: what a refinement must gain, more than the simulator's grain


def draft(graph: OpGraph, batch: int, gpu: Profile, handoff: str, choice: Choice) -> Schedule:
    """The schedule of a choice with its tasks, and with as few waits as reads suggest: fit to be simulated, not yet to be run."""
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
    return with_producers(graph, schedule)


def timed(graph: OpGraph, schedule: Schedule, gpu: Profile) -> Schedule:
    """The schedule with the simulator's predictions."""
    timeline = simulate(graph, schedule, gpu)
    us = tuple((name, round(us, 3)) for name, us in timeline.phase_us)
    return dataclasses.replace(schedule, predicted_us=round(timeline.us, 3), us=us)


def rough(graph: OpGraph, batch: int, gpu: Profile, handoff: str, choice: Choice) -> Timeline:
    """The simulator's prediction for a choice, quick enough to rank many."""
    return simulate(graph, draft(graph, batch, gpu, handoff, choice), gpu, drift=False)


def refined(graph: OpGraph, batch: int, gpu: Profile, handoff: str, choice: Choice) -> Choice:
    """The choice after one round over the phases that take most of a step, each of which takes the candidate under which the simulator
    predicts the fastest step.

    The cost model adds phases up; what a candidate does to the ring and to its neighbours only the simulator sees.
    """
    timeline = rough(graph, batch, gpu, handoff, choice)
    best, us = timeline.us, dict(timeline.phase_us)
    for phase in sorted(graph.phases, key=lambda p: -us[p.name] * graph.iterations(p))[:REFINED]:
        index = graph.phases.index(phase)
        for candidate in _near(graph, batch, gpu, handoff, choice, phase):
            chosen = (*choice.found.candidates[:index], candidate, *choice.found.candidates[index + 1 :])
            other = dataclasses.replace(choice, found=Found(choice.found.cost, chosen))
            predicted = rough(graph, batch, gpu, handoff, other).us
            if predicted < best * (1 - GAIN):
                best, choice = predicted, other
    return choice


def _near(graph: OpGraph, batch: int, gpu: Profile, handoff: str, choice: Choice, phase: Phase) -> Iterator[Candidate]:
    """The cheapest other candidates of a phase that fit beside the ring and go with what is chosen for the other phases."""
    ring = choice.ring
    left = gpu.smem_bytes - choice.stages * ring.stage_bytes - sum(e.total for e in fixed_extents(graph, padded(batch)))
    price = Prices(graph, Model(graph, batch, gpu, ring, released=handoff == "counter", padded_batch=padded(batch)))
    chosen = {p.name: c for p, c in zip(graph.phases, choice.found.candidates, strict=True)}
    found = candidates(graph, phase, batch=batch, stage_bytes=ring.stage_bytes, workers=gpu.workers, smem_bytes=gpu.smem_bytes)
    priced = []
    for number, candidate in enumerate(found):
        others = chosen | {phase.name: candidate}
        splits = tuple((p.writes[0], others[p.name].plan.splits) for p in graph.phases if p.kind == "attention")
        fits = candidate.bytes <= left and all(compatible(graph, p, others[p.name], splits) for p in graph.phases)
        if fits and candidate != chosen[phase.name] and (cost := price(phase, number, candidate, splits)) is not None:
            priced.append((cost.latency + max(cost.stream, cost.compute), number, candidate))
    yield from (candidate for _, _, candidate in sorted(priced, key=lambda p: p[:2])[:TRIED])
