"""Folds and attention shared by the workers of a thread-block cluster: where the search chooses that, and what the proof then refuses."""

import dataclasses
from typing import Any

import pytest
from found import found
from oracle.graphs import parallel, tiny
from oracle.mutations import with_plan
from oracle.sources import where_clusters_pay

from mkdsl.graph import OpGraph
from mkdsl.proof import Rule, ScheduleError, verify_schedule
from mkdsl.schedule import Profile, Schedule
from mkdsl.search._draft import with_memory

SLOW = where_clusters_pay(4)


def refused(graph: OpGraph, schedule: Schedule, rule: Rule, gpu: Profile = SLOW) -> str:
    """The message of the refusal, which must be by this rule."""
    with pytest.raises(ScheduleError) as error:
        verify_schedule(graph, schedule, gpu)
    assert error.value.rule is rule, str(error.value)
    return str(error.value)


def shared(schedule: Schedule) -> list[str]:
    return [p.name for p in schedule.phases if p.cluster > 1]


@pytest.fixture(scope="module")
def good() -> Schedule:
    schedule = found(tiny(), 8, SLOW)
    assert {"wq+wk+wv", "wg·wu"} <= set(shared(schedule))
    return schedule


# What is chosen.


def test_clusters_are_chosen_where_reading_is_slow_and_there_are_any(good: Schedule):
    verify_schedule(tiny(), good, SLOW)
    assert good.cluster == 2
    assert not shared(found(tiny(), 8, dataclasses.replace(SLOW, clusters=())))
    assert not shared(found(tiny(), 8, dataclasses.replace(SLOW, exchange_us=1000.0)))


@pytest.mark.medium
def test_fours_where_a_profile_has_them():
    """Of 8 SMs, two of which they leave idle: one cluster of 4, in a launch of its own; unless pairs are as good."""
    gpu = dataclasses.replace(SLOW, workers=8, clusters=((2, 0, 1.0), (4, 2, 1.0)))
    fours = dataclasses.replace(gpu, clusters=((4, 2, 1.0),), bandwidth=1e15)
    schedule = found(tiny(), 8, fours)
    assert (schedule.cluster, schedule.workers) in ((4, 4), (1, 8))
    assert {(s.cluster, s.workers) for s in (found(tiny(), 8, launch) for launch in fours.launches)} == {(1, 8), (4, 4)}
    best = found(tiny(), 8, gpu)
    verify_schedule(tiny(), best, gpu)
    assert best.predicted_us <= found(tiny(), 8, dataclasses.replace(gpu, clusters=((2, 0, 1.0),))).predicted_us


def test_no_cluster_shares_a_prologue_that_must_be_complete_first(good: Schedule):
    graph = tiny()
    phases = tuple(dataclasses.replace(p, separable=False) if p.name == "wg·wu" else p for p in graph.phases)
    whole = dataclasses.replace(graph, phases=phases)
    assert "wg·wu" not in shared(found(whole, 8, SLOW))
    assert refused(whole, good, Rule.TILE).startswith("wg·wu: ")


def test_phase_by_phase_nobody_shares(good: Schedule):
    alone = good.phased()
    assert alone.cluster == 1
    for name in ("wq+wk+wv", "wg·wu"):
        phase = tiny().phase(name)
        assert alone.plan(name).stage_k(phase) == good.plan(name).stage_k(phase)


# What is refused.


@pytest.mark.parametrize(
    ("name", "changes", "rule"),
    [
        ("wd", {"cluster": 0}, Rule.RESIDENT),
        ("wd", {"cluster": 4}, Rule.RESIDENT),
        ("wg·wu", {"k_stages": 2, "tile_k": 32}, Rule.TILE),
        ("wg·wu", {"tile_k": 128}, Rule.TILE),
        ("attention", {"cluster": 2, "splits": 1, "block": 128}, Rule.TILE),
    ],
)
def test_clusters_that_there_are_none_of(good: Schedule, name: str, changes: dict[str, Any], rule: Rule):
    """A cluster of none; of two sizes; K split in time and in space; pieces of K that are no whole tile_k; fewer cache blocks than workers."""
    base = with_plan(good, "wg·wu", split_k=1, tasks=tuple(tuple((w, 1) for w in range(4)) for _ in good.plan("wg·wu").tasks))
    message = refused(tiny(), with_plan(base, name, **changes), rule)
    assert ("clusters of [2, 4]" if changes.get("cluster") == 4 else "cluster") in message


def test_what_a_gpu_holds(good: Schedule):
    none, one = (dataclasses.replace(SLOW, clusters=c) for c in ((), ((2, 2, 1.0),)))
    assert "clusters of 2: h200 holds none such" in refused(tiny(), good, Rule.RESIDENT, none)
    assert "4 workers: h200 holds 2 in clusters of 2" in refused(tiny(), good, Rule.RESIDENT, one)
    three = tuple(dataclasses.replace(p, tasks=tuple(t[:3] for t in p.tasks)) for p in good.phases)
    assert "3 workers in clusters of 2" in refused(tiny(), dataclasses.replace(good, workers=3, phases=three), Rule.RESIDENT)


def test_sums_for_a_worker_that_is_still_in_another_phase():
    """Of a parallel block, wd need not wait for attention, whose buffers lie where wd's sums would go."""
    graph = parallel()
    schedule = found(graph, 8, SLOW)
    graph = graph.in_order(schedule.order)
    plan = schedule.plan("wd")
    assert schedule.order.index("attention") < schedule.order.index("wd") and "attention" not in plan.waits
    k = graph.phase("wd").k // plan.split_k // 2
    pair = with_memory(graph, with_plan(schedule, "wd", cluster=2, k_stages=1, tile_k=k))
    message = refused(graph, pair, Rule.EXCHANGE)
    assert message.startswith("wd in iteration 0") and "attention" in message
    waits = tuple(dict.fromkeys((*plan.waits, "wq+wk+wv+wu", "attention")))
    verify_schedule(graph, with_plan(pair, "wd", waits=waits), SLOW)


def test_who_read_only_its_columns_has_not_seen_all():
    """Found in review: a pair's worker was taken to have read all of x, and so to know that map's stores are there before it clears them."""
    gpu = where_clusters_pay(2)
    schedule = found(tiny(), 8, gpu)
    assert schedule.plan("wq+wk+wv").cluster == 2 and schedule.plan("wq+wk+wv").split_k == 1
    swapped = tuple((second, first) for first, second in schedule.plan("wd").tasks)
    late = dataclasses.replace(schedule, phases=tuple(dataclasses.replace(p, fence=p.name == "wd") for p in schedule.phases))
    message = refused(tiny(), with_plan(late, "wd", tasks=swapped), Rule.REUSE, gpu)
    assert "x's slot of instance 0" in message and "map" in message
