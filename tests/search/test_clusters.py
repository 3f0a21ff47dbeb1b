"""Folds and attention shared by the workers of a thread-block cluster: what the search may choose, what the proof refuses."""

import dataclasses

import pytest
from oracle.graphs import make_graph, parallel, tiny
from oracle.mutations import with_plan
from oracle.sources import where_clusters_pay, with_workers

from mkdsl.graph import OpGraph, Part, Phase, Tensor
from mkdsl.proof import ScheduleError, verify_schedule
from mkdsl.schedule import Profile, Schedule
from mkdsl.search._assign import items
from mkdsl.search._candidates import busiest_counts, candidates
from mkdsl.search._draft import with_memory
from mkdsl.search._search import find

FEW = with_workers(4)
SLOW = where_clusters_pay(4)


def refused(graph: OpGraph, schedule: Schedule, match: str, gpu: Profile = FEW) -> None:
    with pytest.raises(ScheduleError, match=match):
        verify_schedule(graph, schedule, gpu)


def shared(schedule: Schedule) -> list[str]:
    return [p.name for p in schedule.phases if p.cluster > 1]


@pytest.fixture(scope="module")
def good() -> Schedule:
    schedule = find(tiny(), 8, SLOW, "data")
    assert {"wq+wk+wv", "wg·wu"} <= set(shared(schedule))
    return schedule


def test_clusters_are_chosen_where_reading_is_slow_and_there_are_any(good):
    verify_schedule(tiny(), good, SLOW)
    assert good.cluster == 2 and not shared(find(tiny(), 8, dataclasses.replace(SLOW, clusters=()), "data"))
    assert not shared(find(tiny(), 8, dataclasses.replace(SLOW, exchange_us=1000.0), "data"))


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("wd", {"cluster": 0}, "a cluster of 0 workers"),
        ("wd", {"cluster": 4}, r"clusters of \[2, 4\]: a launch has one size"),
        ("wg·wu", {"pieces": 2, "chunk": 32}, "wg·wu: 2 pieces in a cluster of 2: K is split in time or over a cluster"),
        ("wg·wu", {"chunk": 128}, "wg·wu: 1 parts x 2 workers' pieces x chunk 128 do not divide k=128"),
        ("map", {"cluster": 2}, "map: 1 pieces, cluster 2, .*: a map streams nothing"),
        ("attention", {"cluster": 2, "splits": 1, "chunk": 128}, "attention: 1 splits x 2 workers of 1 cache blocks"),
    ],
)
def test_structure(good, name, changes, match):
    base = with_plan(good, "wg·wu", rows=64, parts=1, tasks=tuple(tuple((w, 1) for w in range(4)) for _ in good.plan("wg·wu").tasks))
    refused(tiny(), with_plan(base, name, **changes), match, SLOW)


def test_fours_where_a_profile_has_them():
    """Of 8 SMs, two of which they leave idle: one cluster of 4, in a launch of its own; unless pairs are as good."""
    gpu = dataclasses.replace(SLOW, workers=8, clusters=((2, 0, 1.0), (4, 2, 1.0)))
    fours = dataclasses.replace(gpu, clusters=((4, 2, 1.0),), bandwidth=1e15)
    schedule = find(tiny(), 8, fours, "data")
    assert (schedule.cluster, schedule.workers) in ((4, 4), (1, 8))
    assert {(s.cluster, s.workers) for s in (find(tiny(), 8, g, "data") for g in fours.launches)} == {(1, 8), (4, 4)}
    best = find(tiny(), 8, gpu, "data")
    verify_schedule(tiny(), best, gpu)
    pairs = find(tiny(), 8, dataclasses.replace(gpu, clusters=((2, 0, 1.0),)), "data")
    assert best.predicted_us <= pairs.predicted_us


def test_what_a_gpu_holds(good):
    refused(tiny(), good, r"clusters of 2: h200 holds none such, but \[\] with 4 SMs", dataclasses.replace(SLOW, clusters=()))
    refused(tiny(), good, "4 workers: h200 holds 2 in clusters of 2", dataclasses.replace(SLOW, clusters=((2, 2, 1.0),)))
    odd = dataclasses.replace(
        good, workers=3, phases=tuple(dataclasses.replace(p, tasks=tuple(t[:3] for t in p.tasks)) for p in good.phases)
    )
    refused(tiny(), odd, "3 workers in clusters of 2", SLOW)


def test_prologues_that_must_be_complete_first(good):
    graph = tiny()
    whole = dataclasses.replace(graph, phases=tuple(dataclasses.replace(p, separable=p.name != "wg·wu") for p in graph.phases))
    refused(whole, good, "wg·wu: a cluster of 2 for a fold that needs its whole prologue, or whole rows, at once", SLOW)
    assert "wg·wu" not in shared(find(whole, 8, SLOW, "data"))


def test_sums_for_a_worker_that_is_still_in_another_phase():
    """Of a parallel block, wd need not wait for attention, whose buffers lie where wd's sums would go."""
    graph = parallel()
    schedule = find(graph, 8, SLOW, "data")
    plan = schedule.plan("wd")
    assert schedule.order.index("attention") < schedule.order.index("wd") and "attention" not in plan.waits
    pair = with_memory(graph, with_plan(schedule, "wd", cluster=2, pieces=1, chunk=graph.phase("wd").k // plan.parts // 2))
    refused(graph, pair, r"wd in iteration 0 on worker \d may write to shared memory that worker \d of its cluster still uses in att", SLOW)
    waits = tuple(dict.fromkeys((*plan.waits, "wq+wk+wv+wu", "attention")))
    verify_schedule(graph, with_plan(pair, "wd", waits=waits), SLOW)


def test_no_clusters_after_a_phase_that_signals_nothing():
    """Nobody could wait until it is done with its shared memory."""
    part = Part(weights=("w",), rows=128, writes=("y.out",))
    first = Phase(name="first", kind="map", segment=0, parts=(Part(weights=(), rows=128, writes=("x",)),), reads=(), row_reads=())
    heads = [
        Phase(name=n, kind="fold", segment=1, parts=(dataclasses.replace(part, writes=(f"{n}.out",)),), reads=("x",), row_reads=(), k=128)
        for n in ("one", "two")
    ]
    tensors = [Tensor(name="x", width=128), *(Tensor(name=f"{n}.out", width=128, output=True) for n in ("one", "two"))]
    graph = make_graph([(1, [first]), (1, heads)], tensors)
    options = {"batch": 8, "stage_bytes": 32768, "workers": 4, "smem_bytes": FEW.smem_bytes, "clusters": (1, 2)}
    assert [{c.plan.cluster for c in candidates(graph, p, **options)} for p in heads] == [{1, 2}, {1}]


def test_an_item_for_each_cluster_first(good):
    """4 items of attention on 4 workers: one for each, or of pairs two for each pair; 2 items: one for each pair."""
    graph = tiny()
    attention = graph.phase("attention")
    for batch, splits, want in ((1, 1, (1, 1)), (1, 2, (1, 2)), (2, 2, (2, 4))):
        plan = dataclasses.replace(good.plan("attention"), splits=splits, cluster=2)
        assert items(attention, plan, batch) == (2 * splits * batch,)
        assert (busiest_counts(attention, plan, batch, 4)[0], busiest_counts(attention, plan, batch, 4, 2)[0]) == want


def test_who_folds_and_takes_part(good):
    plan = dataclasses.replace(good.plan("wo"), cluster=2, group=1, tasks=(((0, 0), (0, 3), (3, 0), (3, 0)),))
    assert [plan.folded(w) for w in range(4)] == [(3,), (3,), (0,), (0,)]
    assert plan.participants == (0, 1) and list(plan.peers(1)) == [0, 1]
    assert plan.grouped and plan.rounds(0) == 3 and plan.sets == 4
    alone = good.phased()
    assert alone.cluster == 1
    assert [p.pieces for p in alone.phases] == [p.pieces * p.cluster for p in good.phases]


def test_who_read_only_its_columns_has_not_seen_all():
    """Found in review: a pair's worker was taken to have read all of x, and so to know that map's stores are there before it clears them."""
    gpu = where_clusters_pay(2)
    schedule = find(tiny(), 8, gpu, "data")
    assert schedule.plan("wq+wk+wv").cluster == 2 and schedule.plan("wq+wk+wv").parts == 1
    swapped = tuple((second, first) for first, second in schedule.plan("wd").tasks)
    late = dataclasses.replace(schedule, phases=tuple(dataclasses.replace(p, fence=p.name == "wd") for p in schedule.phases))
    refused(tiny(), with_plan(late, "wd", tasks=swapped), "writes to x's slot of instance 0, unordered with map", gpu)
