"""From the cost model's choices to schedules that the simulator can judge."""

import dataclasses

from mkdsl.graph import OpGraph
from mkdsl.schedule import AttentionPlan, Handoff, Profile, Schedule, shared_memory
from mkdsl.search._assign import assign_all
from mkdsl.search._candidates import padded
from mkdsl.search._handoffs import tensor_plans, with_producers
from mkdsl.search._rings import Choice
from mkdsl.simulate import Timeline, simulate


def draft(graph: OpGraph, batch: int, handoff: Handoff, choice: Choice) -> Schedule:
    """The schedule of a choice with its tasks, and with as few waits as reads suggest: fit to be simulated, not yet to be run."""
    pad, gpu = padded(batch), choice.gpu
    plans = assign_all(graph, [c.plan for c in choice.found.candidates], batch=batch, workers=gpu.workers)
    splits = {graph.phase(p.name).writes[0]: p.splits for p in plans if isinstance(p, AttentionPlan)}
    schedule = Schedule(
        target=gpu.name,
        batch=batch,
        padded_batch=pad,
        workers=gpu.workers,
        num_stages=choice.num_stages,
        stage_bytes=choice.ring.stage_bytes,
        max_in_flight=choice.ring.max_in_flight,
        smem_bytes=0,
        phases=plans,
        tensors=tensor_plans(graph, handoff, splits),
        predicted_us=0.0,
        us=(),
    )
    return with_producers(graph, with_memory(graph, schedule))


def with_memory(graph: OpGraph, schedule: Schedule) -> Schedule:
    """The schedule with the shared memory that it takes."""
    s = schedule
    memory = shared_memory(graph, s.phases, padded_batch=s.padded_batch, num_stages=s.num_stages, stage_bytes=s.stage_bytes)
    return dataclasses.replace(s, smem_bytes=memory.total)


def timed(graph: OpGraph, schedule: Schedule, gpu: Profile) -> Schedule:
    """The schedule with the simulator's predictions."""
    timeline = simulate(graph, schedule, gpu)
    us = tuple((name, round(us, 3)) for name, us in timeline.phase_us)
    return dataclasses.replace(schedule, predicted_us=round(timeline.us, 3), us=us)


def rough(graph: OpGraph, batch: int, handoff: Handoff, choice: Choice) -> Timeline:
    """The simulator's prediction for a choice, quick enough to rank many."""
    return simulate(graph, draft(graph, batch, handoff, choice), choice.gpu, drift=False)
