"""Who is simulated together, and which events each step waits for."""

import dataclasses

import pytest
from found import found
from oracle.graphs import tiny
from oracle.sources import with_workers

from mkdsl.graph import OpGraph
from mkdsl.schedule import Schedule
from mkdsl.simulate._cohorts import Cohort, cohorts

LAYERS, WORKERS = 3, 6
GPU = with_workers(WORKERS)


@pytest.fixture(scope="module")
def graph() -> OpGraph:
    return tiny(LAYERS)


@pytest.fixture(scope="module")
def schedule(graph: OpGraph) -> Schedule:
    return found(graph, 1, GPU)


def everybody(graph: OpGraph, schedule: Schedule, paces: int = 1) -> list[Cohort]:
    return cohorts(graph, schedule, GPU, [s.repeats for s in graph.segments], paces)


def test_workers_with_the_same_items_are_one_cohort(graph: OpGraph, schedule: Schedule):
    alike: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for worker in range(WORKERS):
        alike.setdefault(tuple(p.folded(worker) for p in schedule.phases), []).append(worker)
    assert [list(c.workers) for c in everybody(graph, schedule)] == list(alike.values())


def test_a_cohort_is_dealt_out_to_all_paces(graph: OpGraph, schedule: Schedule):
    together, apart = (everybody(graph, schedule, paces) for paces in (1, 3))
    assert sorted(w for c in apart for w in c.workers) == list(range(WORKERS))
    assert len(apart) == sum(min(3, len(c.workers)) for c in together)
    assert [c.number for c in apart] == list(range(len(apart)))


def test_steps_come_in_program_order_and_only_where_there_are_items(graph: OpGraph, schedule: Schedule):
    program = [(name, i) for s in graph.segments for i in range(s.repeats) for name in s.phases]
    for cohort in everybody(graph, schedule):
        steps = [(step.phase.name, step.iteration) for step in cohort.steps]
        assert steps == [(name, i) for name, i in program if any(schedule.plan(name).folded(cohort.workers[0]))]


def test_which_events_a_step_waits_for(graph: OpGraph, schedule: Schedule):
    """`wq+wk+wv` waits for what comes before the loop in the first iteration, and for the end of the one before in each other."""
    waits = {"wq+wk+wv": ("map", "wd"), "attention": ("wq+wk+wv",), "embed": ("wd",)}
    phases = tuple(dataclasses.replace(p, waits=waits.get(p.name, ())) for p in schedule.phases)
    found = {(s.phase.name, s.iteration): s.waits for c in everybody(graph, dataclasses.replace(schedule, phases=phases)) for s in c.steps}
    assert [found["wq+wk+wv", i] for i in range(LAYERS)] == [(("map", 0),), (("wd", 0),), (("wd", 1),)]
    assert [found["attention", i] for i in range(LAYERS)] == [(("wq+wk+wv", i),) for i in range(LAYERS)]
    assert found["embed", 0] == (("wd", LAYERS - 1),)
