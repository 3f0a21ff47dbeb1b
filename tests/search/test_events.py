"""Events of groups of tiles: who signals and waits for which, what the proof refuses and the search chooses."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from search_graphs import free_running, llama, parallel, tiny
from search_mutations import with_plan
from search_simulator import Race
from search_simulator import simulate as run
from search_sources import each_order, where_clusters_pay, with_workers

from mkdsl.graph import OpGraph
from mkdsl.search import PROFILES, PhasePlan, Profile, Schedule, ScheduleError, _groups, explain, signallers, simulate, verify_schedule
from mkdsl.search._groups import awaited, heads_read, met, signalled
from mkdsl.search._order import Execution
from mkdsl.search._protocol import made_safe, other_events
from mkdsl.search._races import owners
from mkdsl.search._search import find
from mkdsl.search._sooner import sooner

QKV = "wq+wk+wv"
EIGHT = with_workers(8)


def long_context() -> OpGraph:
    return llama(hidden=128, layers=3, heads=4, kv_heads=2, head_dim=64, inner=256, vocab=192, context=1024)


def refused(graph: OpGraph, schedule: Schedule, match: str, gpu: Profile = EIGHT) -> None:
    with pytest.raises(ScheduleError, match=match):
        verify_schedule(graph, schedule, gpu)


@pytest.fixture(scope="module")
def good() -> Schedule:
    """Of a kv head each, q, k and v's events."""
    return with_plan(find(tiny(), 2, EIGHT, "data"), QKV, events=2)


# Who signals and waits for what.


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 4), st.integers(1, 5))
def test_items_meet_groups_in_turn(counts, each, groups):
    """Also where they go around: more sequences than one."""
    ends = np.cumsum([0, *counts]).tolist()
    plan = PhasePlan(name="fold", rows=64, tasks=(tuple(zip(ends, counts, strict=False)),), waits=())
    found = met(plan, plan.tasks[0], each, groups)
    for worker, (first, n) in enumerate(plan.tasks[0]):
        assert set(np.flatnonzero(found[worker])) == {t // each % groups for t in range(first, first + n)}


def test_mates_take_part_in_each_others_events(good):
    plan = dataclasses.replace(good.plan("wo"), rows=16, cluster=2, events=2, tasks=(((0, 3), (3, 0), (3, 0), (3, 5)),))
    assert signalled(tiny().phase("wo"), plan).tolist() == [[True, False], [True, False], [True, True], [True, True]]
    assert signallers(tiny().phase("wo"), plan) == (4, 2)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("gpu", [with_workers(3), EIGHT, where_clusters_pay(8)])
def test_who_waits_for_its_heads_waits_for_all_that_write_them(gpu, batch):
    graph = long_context()
    schedule = with_plan(find(graph, batch, gpu, "data"), QKV, events=2)
    attention, before = graph.phase("attention"), graph.phase(QKV)
    reads, waits = heads_read(attention, schedule.plan("attention")), awaited(graph, schedule, attention, before)
    signals = signalled(before, schedule.plan(QKV))
    for part in range(3):
        by_head = owners(before, schedule.plan(QKV), part, batch).reshape(batch, 2, -1)
        for worker, head in np.argwhere(reads):
            assert all(signals[writer, waits[worker]].any() for writer in np.unique(by_head[:, head]))
    assert not waits[~reads.any(axis=1)].any()


def test_what_other_readers_wait_for(good):
    """All events, unless it reads nothing but heads, each in one event."""
    graph = tiny()
    items = {p.name: good.items_awaiting(graph, p, graph.phase(QKV)) for p in graph.phases}
    assert items == dict.fromkeys(graph.order) | {"attention": good.plan("attention").splits}
    assert with_plan(good, QKV, events=4).items_awaiting(graph, graph.phase("attention"), graph.phase(QKV)) is None
    assert good.items_awaiting(graph, graph.phase("attention"), graph.phase("wo")) is None


# The proof.


def test_events_are_proven_and_survive(good):
    verify_schedule(tiny(), good, EIGHT)
    run(tiny(), good, 8)
    assert len(Execution(tiny(), good).crews.size) > len(Execution(tiny(), with_plan(good, QKV, events=1)).crews.size)
    assert Schedule.from_json(json.loads(json.dumps(good.to_json()))) == good


@pytest.mark.parametrize(
    ("events", "match"),
    [
        (0, r"wq\+wk\+wv: 0 events: from 1 to 32, one for each lane that looks"),
        (64, r"wq\+wk\+wv: 64 events: from 1 to 32"),
        (3, r"wq\+wk\+wv: 3 events do not divide \[\d+, \d+, \d+\] items of \d+ rows"),
        (2.0, r"wq\+wk\+wv: events is 2.0"),
    ],
)
def test_how_many_events_there_may_be(good, events, match):
    refused(tiny(), with_plan(good, QKV, events=events), match)


def test_events_of_what_is_read_whole(good):
    """Harmless: readers wait for all."""
    more = dataclasses.replace(good, phases=tuple(dataclasses.replace(p, events=2) for p in good.phases))
    verify_schedule(tiny(), more, EIGHT)
    run(tiny(), more, 4)


def test_a_wait_for_one_group_is_not_enough(monkeypatch):
    """Of a parallel block, wd comes after attention on the same workers, and so need not wait for u, where attention waited for all."""
    graph = each_order(parallel())[0]
    before, schedule = "wq+wk+wv+wu", find(graph, 4, EIGHT, "counter")
    assert schedule.order[1:4] == (before, "attention", "wd") and schedule.plan("wd").waits == ()
    groups = with_plan(schedule, before, events=2)
    refused(graph, groups, r"wd in iteration 0 reads wu \(instance 0\) on worker \d, unordered with the write in wq\+wk\+wv\+wu in it")
    with monkeypatch.context() as patch:  # as if attention still waited for all
        patch.setattr(_groups, "awaited", lambda *args: np.ones_like(awaited(*args)))
        verify_schedule(graph, groups, EIGHT)
    with pytest.raises(Race):
        run(graph, groups, 20)
    waiting = made_safe(graph, groups)
    assert waiting is not None and waiting.plan("wd").waits == (before,) and waiting.plan("attention").waits == (before,)
    verify_schedule(graph, waiting, EIGHT)
    run(graph, waiting, 8)


def test_a_mate_that_may_still_fold_for_another_group():
    """Its sums of attention would be sent to where the mate has its rows of q, k and v."""
    graph, gpu = long_context(), where_clusters_pay(8)
    schedule = find(graph, 2, gpu, "data")
    assert schedule.plan("attention").cluster == 2
    groups = with_plan(schedule, QKV, events=2)
    refused(graph, groups, r"attention in iteration 0 on worker \d may write to shared memory that worker \d of its cluster still u", gpu)
    with pytest.raises(Race):
        run(graph, groups, 20)
    assert made_safe(graph, groups) is None


def test_an_event_counts_alone():
    """Of two workers with an item each neither may run ahead of an event that counts both; with one for each, another condition holds them back."""
    graph, gpu = free_running(), with_workers(2)
    free = with_plan(find(graph, 1, gpu, "counter"), "free", waits=())
    refused(graph, free, "free in iteration 1 on worker 1 may signal before free in iteration 0 on worker 0: their event counts both", gpu)
    refused(graph, with_plan(free, "free", events=2), "free in iteration 2 on worker 1 writes to t's slot of instance 0, unordered", gpu)


# The simulator and the search.


def l20(workers: int) -> Profile:
    return dataclasses.replace(PROFILES["l20"], workers=workers)


def uneven() -> OpGraph:
    return llama(hidden=1024, layers=4, heads=16, kv_heads=4, head_dim=64, inner=2048, vocab=512, context=512)


@pytest.fixture(scope="module")
def grouped() -> Schedule:
    return find(uneven(), 4, l20(20), "data")


def test_the_search_takes_events_where_workers_know_sooner(grouped):
    assert {p.name: p.events for p in grouped.phases if p.events > 1} == {QKV: 4}
    one = made_safe(uneven(), with_plan(grouped, QKV, events=1))
    assert one is not None and simulate(uneven(), one, l20(20)).us > grouped.predicted_us
    assert sooner(uneven(), one, grouped, simulate(uneven(), one, l20(20), drift=False)) > 0
    run(uneven(), grouped, 4)


def test_events_that_nobody_knows_sooner_change_no_prediction(good):
    """Each of all workers has rows of every group."""
    few = with_workers(1)
    schedule = find(tiny(), 2, few, "data")
    (other,) = (s for name, s in other_events(tiny(), schedule))
    timeline = simulate(tiny(), schedule, few)
    assert sooner(tiny(), schedule, other, timeline) == 0
    assert simulate(tiny(), other, few).us == timeline.us


def test_which_events_are_tried(good, grouped):
    """Divisors of attention's kv heads, of what only attention reads, by heads."""
    assert [(name, s.plan(name).events) for name, s in other_events(tiny(), good)] == [(QKV, 1)]
    assert [(name, s.plan(name).events) for name, s in other_events(uneven(), grouped)] == [(QKV, 1), (QKV, 2)]
    assert not [*other_events(parallel(), find(parallel(), 1, EIGHT, "data"))]


def test_explained(good):
    text = explain(tiny(), good, EIGHT)
    (row,) = (line for line in text.splitlines() if line.startswith(f"  {QKV} ") and " fold " in line)
    assert row.split()[-3 - row.count(", ") :][0] == "2" and "events" in text
    assert f"{QKV}  " in text and "events 1" in text
