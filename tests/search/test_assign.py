"""Items over workers."""

import itertools

import numpy as np
from found import found
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import LAW
from oracle.graphs import llama_1b, tiny

from mkdsl.schedule import profile
from mkdsl.search._assign import shares

H200 = profile("h200")


@settings(LAW, max_examples=200)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 3)), min_size=1, max_size=3), st.integers(3, 9))
def test_shares_leave_the_busiest_worker_as_little_as_possible(parts: list[tuple[int, int]], workers: int):
    counts, costs = zip(*parts, strict=True)

    def busiest(given: tuple[int, ...]) -> int:
        return max(-(-n // g) * c for n, c, g in zip(counts, costs, given, strict=True))

    chosen = shares(counts, costs, workers)
    assert sum(chosen) <= workers and all(1 <= g <= n for g, n in zip(chosen, counts, strict=True))
    assert sum(chosen) == min(workers, sum(counts))  # nobody idles who could help
    options = itertools.product(*(range(1, workers + 1) for _ in counts))
    assert busiest(chosen) == min(busiest(o) for o in options if sum(o) <= workers)


def test_more_parts_than_workers():
    assert shares((5, 1, 3), (1, 1, 1), 2) == (2, 1, 2)


def test_counts_differ_by_at_most_one_within_a_part():
    for plan in found(llama_1b(), 1, H200).phases:
        for part in plan.tasks:
            counts = [n for _, n in part if n]
            assert max(counts) - min(counts) <= 1, plan.name


def test_parts_lie_side_by_side():
    plan = found(llama_1b(), 1, H200).plan("wq+wk+wv")
    shares_of = [[w for w, (_, n) in enumerate(part) if n] for part in plan.tasks]
    assert [len(s) for s in shares_of] == [88, 22, 22]
    assert sorted(w for s in shares_of for w in s) == list(range(132))
    for s in shares_of:
        gaps = sum(b - a > 1 for a, b in itertools.pairwise(s))
        assert gaps <= 1  # around the end


def test_small_phases_go_to_those_with_the_least_to_stream():
    """Of one layer: no worker could give an item away and be better off."""
    graph, schedule = llama_1b(), found(llama_1b(), 1, H200)
    load, coarsest = np.zeros(132), 0.0
    for phase in (graph.phase(name) for name in graph.segments[1].phases):
        plan = schedule.plan(phase.name)
        per_item = phase.streamed_bytes(1) / sum(plan.items(phase, 1))
        load += per_item * np.array([sum(plan.folded(w)) / plan.cluster for w in range(132)])
        coarsest = max(coarsest, per_item)
    assert load.max() - load.min() <= coarsest


def test_a_worker_for_every_tile_there_is():
    for plan in found(tiny(), 1, H200).phases:
        assert len(plan.participants) == min(132, sum(n for part in plan.tasks for _, n in part))
