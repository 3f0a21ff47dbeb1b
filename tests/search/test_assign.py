"""Items over workers."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle.graphs import llama_1b, tiny

from mkdsl.schedule import profile
from mkdsl.search._assign import shares
from mkdsl.search._search import find


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 3)), min_size=1, max_size=3), st.integers(3, 9))
def test_shares_leave_the_busiest_worker_as_little_as_possible(parts, workers):
    counts, costs = zip(*parts, strict=True)

    def busiest(given):
        return max(-(-n // g) * c for n, c, g in zip(counts, costs, given, strict=True))

    found = shares(counts, costs, workers)
    assert sum(found) <= workers and all(1 <= g <= n for g, n in zip(found, counts, strict=True))
    assert sum(found) == min(workers, sum(counts))  # nobody idles who could help
    options = itertools.product(*(range(1, workers + 1) for _ in counts))
    assert busiest(found) == min(busiest(o) for o in options if sum(o) <= workers)


def test_more_parts_than_workers():
    assert shares((5, 1, 3), (1, 1, 1), 2) == (2, 1, 2)


def test_counts_differ_by_at_most_one_within_a_part():
    schedule = find(llama_1b(), 1, profile("h200"), "data")
    for plan in schedule.phases:
        for part in plan.tasks:
            counts = [n for _, n in part if n]
            assert max(counts) - min(counts) <= 1, plan.name


def test_parts_lie_side_by_side():
    plan = find(llama_1b(), 1, profile("h200"), "data").plan("wq+wk+wv")
    shares_of = [[w for w, (_, n) in enumerate(part) if n] for part in plan.tasks]
    assert [len(s) for s in shares_of] == [88, 22, 22]
    assert sorted(w for s in shares_of for w in s) == list(range(132))
    for s in shares_of:
        gaps = sum(b - a > 1 for a, b in itertools.pairwise(s))
        assert gaps <= 1  # around the end


def test_small_phases_go_to_those_with_the_least_to_stream():
    schedule = find(llama_1b(), 1, profile("h200"), "data")
    cache = 512 // schedule.plan("attention").splits * 64 * 2 * 2 / 32768
    units = {"wq+wk+wv": 1, "attention": cache, "wo": 1, "wg·wu": 2, "wd": 4}  # of 32 KiB, per item
    folded = {p.name: [sum(p.folded(w)) / p.cluster for w in range(132)] for p in schedule.phases}
    load = sum(np.array(folded[name]) * u for name, u in units.items())
    assert load.max() - load.min() <= 4  # the coarsest item: no worker could give one away and be better off


def test_a_worker_for_every_tile_there_is():
    schedule = find(tiny(), 1, profile("h200"), "data")
    for plan in schedule.phases:
        assert len(plan.participants) == min(132, sum(n for part in plan.tasks for _, n in part))
