"""The proof refuses schedules whose order of events lets a worker see a wrong value, and what it accepts survives an adversarial simulation."""

import dataclasses
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle.graphs import free_running, graphs, parallel, sandwich, tiny
from oracle.mutations import with_plan, with_tensor
from oracle.simulator import Hang, Race, simulate
from oracle.sources import H200, each_order, with_workers
from refusals import refused, schedule_of

from mkdsl.graph import OpGraph
from mkdsl.proof import Rule, ScheduleError, verify_schedule
from mkdsl.schedule import Handoff, Schedule
from mkdsl.search import with_handoffs


@pytest.fixture(scope="module")
def good() -> Schedule:
    return schedule_of(tiny())


@pytest.fixture(scope="module")
def released() -> Schedule:
    return schedule_of(tiny(), handoff=Handoff.RELEASE_ACQUIRE)


# Waits.


@pytest.mark.parametrize("waits", [(), ("wq+wk+wv",)])
def test_a_read_that_nothing_orders_after_the_write(released: Schedule, waits: tuple[str, ...]) -> None:
    message = refused(with_plan(released, "wo", waits=waits), Rule.BEFORE)
    written = r"unordered with the write in attention in iteration 0 on worker \d"
    assert re.fullmatch(rf"wo in iteration 0 reads attention \(instance 0\) on worker \d, {written}", message)


def test_what_sentinels_need_waits_for() -> None:
    """A reader finds the data by itself, but nothing holds back whoever clears it."""
    gpu = with_workers(6)
    schedule = schedule_of(tiny(), gpu=gpu)
    assert "may look at wq" in refused(with_plan(schedule, "attention", waits=()), Rule.FENCE, gpu=gpu)
    assert "clears x's slot of instance 0" in refused(with_plan(schedule, "wd", waits=()), Rule.CLEAR, gpu=gpu)


def test_a_worker_that_may_run_ahead_of_its_own_event() -> None:
    """Phases that depend on nothing are held back by nothing: two iterations of one worker count as one of two workers."""
    graph, gpu = free_running(), with_workers(3)
    schedule = schedule_of(graph, handoff=Handoff.RELEASE_ACQUIRE, gpu=gpu)
    two = with_plan(schedule, "free", tasks=(((0, 1), (1, 1), (2, 0)),))  # of one worker alone, the count would tell
    safe = with_handoffs(graph, two)
    assert safe.plan("free").waits
    refused(with_plan(safe, "free", waits=()), Rule.COUNT, graph, gpu)


# Fences.


def test_a_missing_fence(good: Schedule) -> None:
    (fence,) = (p.name for p in good.phases if p.fence)
    message = refused(with_plan(good, fence, fence=False), Rule.FENCE)
    assert re.fullmatch(r".* may look at \S+ \(instance \d\) on worker \d before worker \d's clear in .*: no fence", message)


def test_fences_that_some_worker_does_not_pass() -> None:
    schedule = schedule_of(tiny(), gpu=H200)
    fences = [p.name for p in schedule.phases if p.fence]
    assert len(fences) > 1
    for name in fences:
        refused(with_plan(schedule, name, fence=False), Rule.FENCE, gpu=H200)


# Slots.


def test_a_slot_that_is_written_while_it_is_read() -> None:
    """One is too few where the writer reads the state itself."""
    schedule = schedule_of(sandwich(), handoff=Handoff.RELEASE_ACQUIRE)
    message = refused(with_tensor(schedule, "x", incarnations=1), Rule.REUSE, sandwich())
    assert re.match(r"map\.2 in iteration 0 on worker \d writes to x's slot of instance 0, unordered with ", message)


def test_two_incarnations_where_three_are_needed() -> None:
    schedules = [schedule_of(graph) for graph in each_order(parallel())]
    assert {s.order[-2]: s.tensor("x").incarnations for s in schedules} == {"wo": 3, "wd": 2}  # who adds x last reads it as it writes it
    for schedule in (s for s in schedules if s.tensor("x").incarnations == 3):
        refused(with_tensor(schedule, "x", incarnations=2), Rule.CLEAR, parallel())


# What is accepted is safe.


def _mutated(draw: Any, schedule: Schedule) -> Schedule:
    """One random change to waits, fences, incarnations or hand-offs."""
    phase, tensor = draw(st.sampled_from(schedule.phases)), draw(st.sampled_from(schedule.tensors))
    match draw(st.sampled_from(["drop", "add", "fence", "incarnations", "handoff"])):
        case "drop":
            dropped = draw(st.sampled_from(phase.waits)) if phase.waits else None
            return with_plan(schedule, phase.name, waits=tuple(w for w in phase.waits if w != dropped))
        case "add":
            added = draw(st.sampled_from(schedule.phases)).name
            return with_plan(schedule, phase.name, waits=tuple(dict.fromkeys((*phase.waits, added))))
        case "fence":
            return with_plan(schedule, phase.name, fence=not phase.fence)
        case "incarnations":
            return with_tensor(schedule, tensor.name, incarnations=draw(st.integers(1, 3)))
    return with_tensor(schedule, tensor.name, handoff=tensor.handoff.other)


@pytest.mark.medium
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data(), graphs(), st.integers(1, 5), st.integers(1, 2), st.sampled_from(Handoff))
def test_accepted_schedules_neither_race_nor_hang(data: Any, graph: OpGraph, workers: int, batch: int, handoff: Handoff) -> None:
    gpu = with_workers(workers)
    schedule = schedule_of(graph, handoff=handoff, batch=batch, gpu=gpu)
    for _ in range(data.draw(st.integers(0, 3))):
        schedule = _mutated(data.draw, schedule)
    try:
        verify_schedule(graph, schedule, gpu)
    except ScheduleError:
        return
    simulate(graph, schedule, 4)


@pytest.mark.medium
@pytest.mark.parametrize("graph", [tiny, parallel, sandwich], ids=["tiny", "parallel", "sandwich"])
@pytest.mark.parametrize("handoff", Handoff)
def test_decoders_survive_simulation(graph: Any, handoff: Handoff) -> None:
    simulate(graph(), schedule_of(graph(), handoff=handoff, batch=2), 3)


def test_the_simulation_does_find_what_the_proof_refuses() -> None:
    """Or surviving it would mean nothing. A missing fence needs an unlucky store, so more runs."""
    counted, cleared = schedule_of(tiny(2), handoff=Handoff.RELEASE_ACQUIRE), schedule_of(tiny(3))
    with pytest.raises(Race):
        simulate(tiny(2), with_plan(counted, "wo", waits=()), 20)
    with pytest.raises((Race, Hang)):
        simulate(parallel(), with_tensor(schedule_of(each_order(parallel())[0]), "x", incarnations=2), 20)
    with pytest.raises((Race, Hang)):
        unfenced = dataclasses.replace(cleared, phases=tuple(dataclasses.replace(p, fence=False) for p in cleared.phases))
        simulate(tiny(3), unfenced, 60)
