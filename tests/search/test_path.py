"""The shortest path equals trying every combination, whatever the costs."""

import itertools

import pytest
from brute_force import segment_us
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import LAW
from oracle.graphs import make_graph

from mkdsl.graph import AttentionPhase, MapPhase, OpGraph, Part, Phase, Tensor
from mkdsl.schedule import AttentionPlan, MapPlan
from mkdsl.search._candidates import Candidate
from mkdsl.search._cost import Cost
from mkdsl.search._path import shortest_path

SOME = Candidate(MapPlan(name="", rows=64, tasks=(), waits=()), (1,), (1,), 1)


def chain(phases: int, repeats: int) -> OpGraph:
    loop: list[Phase] = [MapPhase(name=f"p{i}", segment=0, parts=(), reads=(), row_reads=()) for i in range(phases)]
    return make_graph([(repeats, loop)], [])


@settings(LAW, max_examples=100)
@given(st.data(), st.integers(1, 4), st.integers(1, 4), st.floats(0.5, 12))
def test_equals_brute_force(data: st.DataObject, phases: int, repeats: int, capacity: float):
    """Costs that no model would give: late but far ahead against early but behind, where a label must not be dropped."""
    graph, cost = chain(phases, repeats), st.builds(Cost, st.floats(0, 4), st.floats(0, 9), st.floats(0, 9))
    costs = {p.name: data.draw(st.lists(cost, min_size=1, max_size=4)) for p in graph.phases}
    choices = {name: [(i, SOME) for i in range(len(of))] for name, of in costs.items()}
    found = shortest_path(graph, choices, lambda phase, number, *_: costs[phase.name][number], capacity)
    want = min(repeats * segment_us(c, repeats, capacity) for c in itertools.product(*costs.values()))
    assert found is not None and found.cost == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize(("stream", "cost", "which"), [(8.0, 5.0 + 3.0, 1), (0.5, 4.0 + 0.5, 0)])
def test_late_but_far_ahead_against_early_but_behind(stream: float, cost: float, which: int):
    """After 4 us and with an empty ring, or after 5 and with 5 us of stream in it: what is next decides."""
    costs = {"p0": [Cost(1.0, 4.0, 0.0), Cost(5.0, 0.0, 0.0)], "p1": [Cost(0.0, stream, 0.0)]}
    both = [Candidate(SOME.plan, (n,), (n,), 1) for n in (1, 2)]
    choices = {"p0": [*enumerate(both)], "p1": [(0, SOME)]}
    found = shortest_path(chain(2, 1), choices, lambda phase, number, *_: costs[phase.name][number], 8.0)
    assert found is not None
    assert found.cost == pytest.approx(cost) and found.candidates == (both[which], SOME)


def test_a_phase_without_candidates_leaves_no_path():
    assert shortest_path(chain(2, 1), {"p0": [(0, SOME)], "p1": []}, lambda *_: Cost(1.0, 0.0, 0.0), 8.0) is None


def test_prices_know_the_splits_of_what_a_phase_reads():
    """Splitting gains the attention a microsecond and costs its reader two; as long as somebody reads it later, both states are kept."""
    part = Part(weights=(), rows=64, writes=("a",))
    attention = AttentionPhase(
        name="attention", segment=0, parts=(part,), reads=(), row_reads=(), context=128, heads=1, kv_heads=1, head_dim=64
    )
    between, reader = (MapPhase(name=n, segment=0, parts=(), reads=r, row_reads=()) for n, r in (("between", ()), ("reader", ("a",))))
    graph = make_graph([(1, [attention, between, reader])], [Tensor(name="a", width=64, heads=1)])
    split, whole = (Candidate(AttentionPlan(name="attention", tasks=(), waits=(), block=64, splits=n), (1,), (1,), 1) for n in (2, 1))
    seen = set()

    def price(phase: Phase, number: int, candidate: Candidate, splits: tuple[tuple[str, int], ...]) -> Cost:
        seen.add((phase.name, splits))
        return Cost({"attention": 5.0 - candidate.plan.splits, "reader": 2.0 * dict(splits).get("a", 0)}.get(phase.name, 1.0), 0.0, 0.0)

    found = shortest_path(graph, {"attention": [(0, split), (1, whole)], "between": [(0, SOME)], "reader": [(0, SOME)]}, price, 8.0)
    assert found is not None
    assert (found.cost, found.candidates[0]) == (4.0 + 1.0 + 2.0, whole)
    assert {splits for name, splits in seen if name == "reader"} == {(("a", 1),), (("a", 2),)}
