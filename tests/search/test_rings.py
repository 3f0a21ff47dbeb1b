"""Under each ring the best candidates of all phases: as good as trying everything."""

import dataclasses

import pytest
from brute_force import least_cost
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import LAW
from oracle.graphs import graphs, llama_1b, tiny
from oracle.sources import where_clusters_pay, with_workers

from mkdsl.graph import FoldPhase, OpGraph
from mkdsl.proof import Rule, ScheduleError
from mkdsl.schedule import KIB, Handoff, Profile, fixed_bytes, profile
from mkdsl.search import _candidates as candidates_module
from mkdsl.search import _rings as rings_module
from mkdsl.search._candidates import padded
from mkdsl.search._cost import Model
from mkdsl.search._path import shortest_path
from mkdsl.search._rings import RINGS, Choice, Prices, best_instruction, cheapest, numbered
from mkdsl.search._search import FINALISTS, SIMULATED, finalists, first

H200 = profile("h200")
ALONE = dataclasses.replace(H200, clusters=())


def is_split(choice: Choice) -> bool:
    return any(c.plan.splits > 1 for c in choice.found.candidates)


# Brute force.


def check_against_brute_force(graph: OpGraph, batch: int, gpu: Profile) -> None:
    """Two rings, one instruction (a law of its own has both) and few splits of K, or everything would be too much to try."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates_module, "SPLIT_K", (8, 2))
        patch.setattr(candidates_module, "K_STAGES", (1, 4))
        patch.setattr(Profile, "instructions", ("mma",))
        patch.setattr(rings_module, "RINGS", RINGS[:2])
        want = least_cost(graph, batch, gpu, RINGS[:2])
        if want == float("inf"):
            with pytest.raises(ScheduleError) as error:
                finalists(graph, batch, gpu, Handoff.SENTINEL)
            assert error.value.rule is Rule.ROOM
        else:
            assert min(c.found.cost for c in finalists(graph, batch, gpu, Handoff.SENTINEL)) == pytest.approx(want, rel=1e-9)


even = st.integers(2, 20).map(lambda n: 2 * n)  # pairs leave no worker idle, as on any GPU


@pytest.mark.medium
@settings(LAW, max_examples=15)
@given(graphs(max_phases=2, scale=16), even, st.sampled_from([1, 4]), st.integers(70, 160))
def test_equals_brute_force(graph: OpGraph, workers: int, batch: int, kib: int):
    check_against_brute_force(graph, batch, dataclasses.replace(with_workers(workers), smem_bytes=kib * KIB))


@pytest.mark.slow
@settings(LAW, max_examples=300)
@given(graphs(max_phases=2, scale=16), even, st.sampled_from([1, 4, 16]), st.integers(50, 227))
def test_equals_brute_force_of_many_graphs(graph: OpGraph, workers: int, batch: int, kib: int):
    check_against_brute_force(graph, batch, dataclasses.replace(with_workers(workers), smem_bytes=kib * KIB))


@settings(LAW, max_examples=20)
@given(graphs(max_phases=2, scale=16), st.integers(4, 40), st.sampled_from([1, 8, 16]))
def test_the_slower_of_two_instructions_is_never_needed(graph: OpGraph, workers: int, batch: int):
    gpu, ring = with_workers(workers), RINGS[1]
    price = Prices(graph, Model(graph, batch, gpu, ring, released=False, padded_batch=padded(batch)))
    every = numbered(graph, batch, gpu, ring)
    quicker = {p.name: best_instruction(p, every[p.name], price) for p in graph.phases}
    assert all(len(quicker[p.name]) * 2 == len(every[p.name]) for p in graph.phases if isinstance(p, FoldPhase) and p.parallel)
    if all(every.values()):
        found = [shortest_path(graph, choices, price, ring.capacity(gpu, 4)) for choices in (every, quicker)]
        assert found[0] is not None and found[1] is not None
        assert found[0].cost == pytest.approx(found[1].cost, rel=1e-9)


# Depths.


def test_the_cheapest_depth_of_a_ring_comes_first():
    for ring in RINGS:
        costs = [c.found.cost for c in cheapest(llama_1b(), 1, H200, Handoff.SENTINEL, ring)]
        assert costs and costs == sorted(costs)


def test_every_choice_fits_beside_its_ring():
    fixed = fixed_bytes(llama_1b(), 16, 2)
    for ring in RINGS:
        for choice in cheapest(llama_1b(), 16, H200, Handoff.SENTINEL, ring):
            most = max(c.bytes for c in choice.found.candidates)
            assert choice.num_stages * ring.stage_bytes + fixed + most <= H200.smem_bytes
            assert choice.num_stages >= ring.max_in_flight


def test_where_the_best_splits_an_attention_the_best_that_does_not_comes_along():
    for ring in RINGS:
        choices = cheapest(llama_1b(), 1, ALONE, Handoff.SENTINEL, ring)
        split = {c.num_stages for c in choices if is_split(c)}
        assert split and split <= {c.num_stages for c in choices if not is_split(c)}


# Finalists.


def test_the_cheapest_finalists_are_simulated():
    found = finalists(llama_1b(), 1, H200, Handoff.SENTINEL)
    assert len(found) == SIMULATED
    assert [c.found.cost for c in found] == sorted(c.found.cost for c in found)


def test_the_finalists_split_attention_and_do_not():
    for ring in RINGS:
        split = [is_split(c) for c in first(cheapest(llama_1b(), 1, ALONE, Handoff.SENTINEL, ring))]
        assert 1 <= split.count(True) <= FINALISTS and 1 <= split.count(False) <= FINALISTS


def test_launches_that_leave_workers_idle_use_clusters():
    """Of 8 SMs fours hold 4 workers: without a shared phase that is never better than all 8 alone."""
    gpu = dataclasses.replace(where_clusters_pay(8), clusters=((4, 4, 1.0),), bandwidth=1e15)
    found = finalists(tiny(), 8, gpu, Handoff.SENTINEL)
    assert {c.gpu.workers for c in found} == {4, 8}
    assert all(any(x.plan.cluster > 1 for x in c.found.candidates) for c in found if c.gpu.workers == 4)
