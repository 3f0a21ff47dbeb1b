"""What is decided last, of one schedule: its hand-offs, and which workers a phase shares with another one. One thing is changed after the other, while the
simulator says that the step gets faster; tiles and ring stay."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

from mkdsl.graph import OpGraph
from mkdsl.schedule import KIB, Handoff, PhasePlan, Profile, Schedule, interpolate
from mkdsl.search._draft import timed, with_memory
from mkdsl.search._handoffs import handed_over, made_safe
from mkdsl.simulate import simulate

PROMISING = 3  # changes that gain most by a simulation without drift are simulated with it
WORTH = 0.998  # of a step's time before: a change that leaves more is not worth it

Change = Callable[[Schedule], Schedule]


def refined(graph: OpGraph, schedule: Schedule, gpu: Profile, *, handoffs: bool) -> Schedule:
    """Makes those changes that are worth it, the most promising first. handoffs: whether those may change too."""
    changes = [*_others_workers(graph, schedule), *(_quicker_handoffs(graph, schedule, gpu) if handoffs else ())]
    now, *quick = (simulate(graph, s, gpu, drift=False).us for s in (schedule, *(change(schedule) for change in changes)))
    promising = sorted((us, i) for i, us in enumerate(quick) if us < now)[:PROMISING]
    for change in (changes[i] for _, i in promising):
        changed = made_safe(graph, change(schedule))
        if changed is not None and changed.smem_bytes <= gpu.smem_bytes:
            changed = timed(graph, changed, gpu)
            schedule = changed if changed.predicted_us < WORTH * schedule.predicted_us else schedule
    return schedule


def _others_workers(graph: OpGraph, schedule: Schedule) -> Iterator[Change]:
    """Each phase on the workers of another one of its segment, if their items go into each other: who has n there has a multiple of n here."""
    alone = [p for p in schedule.phases if len(p.tasks) == 1]
    for plan, other in itertools.permutations(alone, 2):
        times, rest = divmod(*(sum(n for _, n in p.tasks[0]) for p in (plan, other)))
        tasks = (tuple((first * times, n * times) for first, n in other.tasks[0]),)
        if graph.phase(plan.name).segment == graph.phase(other.name).segment and not rest and tasks != plan.tasks:
            yield functools.partial(_with_tasks, graph, dataclasses.replace(plan, tasks=tasks))


def _with_tasks(graph: OpGraph, plan: PhasePlan, schedule: Schedule) -> Schedule:
    phases = (dataclasses.replace(p, tasks=plan.tasks) if p.name == plan.name else p for p in schedule.phases)
    return with_memory(graph, dataclasses.replace(schedule, phases=tuple(phases)))


def _quicker_handoffs(graph: OpGraph, schedule: Schedule, gpu: Profile) -> Iterator[Change]:
    """Each tensor handed over the other way, where that ever takes less time with as many bytes in flight as may be."""
    most, curves = (
        schedule.max_in_flight * schedule.stage_bytes / KIB,
        {Handoff.SENTINEL: gpu.handoff, Handoff.RELEASE_ACQUIRE: gpu.released},
    )
    for tensor in (t for t in schedule.tensors if not graph.tensors[t.name].output):
        before, after = curves[tensor.handoff], curves[tensor.handoff.other]
        if any(interpolate(after, x) < interpolate(before, x) for x in (most, *(x for x, _ in before + after if x < most))):
            yield functools.partial(handed_over, name=tensor.name, handoff=tensor.handoff.other)
