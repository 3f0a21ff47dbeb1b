"""Events of groups of tiles: which of a phase's events each worker signals, and which of another's it waits for.

Both follow from its items, and where a cluster shares those, from its mates' too.
"""

import functools

import numpy as np

from mkdsl.graph import OpGraph, Phase
from mkdsl.search._schedule import PhasePlan, Range, Schedule

Events = tuple[dict[str, np.ndarray], dict[tuple[str, str], np.ndarray]]


def all_events(graph: OpGraph, schedule: Schedule) -> Events:
    """(what is signalled by phase, what is awaited by phase and the phase before), of all phases and waits."""
    plans = [(p, schedule.plan(p.name)) for p in graph.phases]
    signals = {p.name: signalled(p, plan) for p, plan in plans}
    return signals, {(p.name, before): awaited(graph, schedule, p, graph.phase(before)) for p, plan in plans for before in plan.waits}


def signalled(phase: Phase, plan: PhasePlan) -> np.ndarray:
    """[worker, event]: what each worker signals."""
    parts = (met(plan, tasks, each, plan.events) for tasks, each in zip(plan.tasks, plan.items_each(phase), strict=True))
    return functools.reduce(np.logical_or, parts)


def signallers(phase: Phase, plan: PhasePlan) -> tuple[int, ...]:
    """By event: how many workers signal it."""
    return tuple(signalled(phase, plan).sum(axis=0).tolist())


def awaited(graph: OpGraph, schedule: Schedule, phase: Phase, before: Phase) -> np.ndarray:
    """[worker, event]: those of `before` that each worker of `phase` waits for, if the phase waits for it."""
    events, each = schedule.plan(before.name).events, schedule.items_awaiting(graph, phase, before)
    if each is None:
        return np.ones((schedule.workers, events), bool)
    plan = schedule.plan(phase.name)
    return met(plan, plan.tasks[0], each, events)


def heads_read(phase: Phase, plan: PhasePlan) -> np.ndarray:
    """[worker, kv head]: whose rows of queries, keys and values each worker of an attention reads."""
    return met(plan, plan.tasks[0], plan.splits, phase.kv_heads)


def met(plan: PhasePlan, tasks: tuple[Range, ...], each: int, groups: int) -> np.ndarray:
    """[worker, group]: those that a worker folds items of, where `each` consecutive items are of one group, and after the last comes the first."""
    first, count = np.array(tasks).T
    start, end = first // each, (first + count - 1) // each
    after = (np.arange(groups) - start[:, None]) % groups
    own = (count > 0)[:, None] & (after <= (end - start)[:, None])
    return own.reshape(-1, plan.cluster, groups).any(axis=1).repeat(plan.cluster, axis=0)
