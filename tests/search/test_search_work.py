"""How much work a search is, in counts that are the same on every machine: candidates, their costs, labels of paths, simulated events."""

import collections
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from oracle.graphs import llama, llama_8b, long_chain, tiny

from mkdsl.graph import OpGraph
from mkdsl.schedule import Handoff, Schedule, profile
from mkdsl.search import _draft, _handoffs, _path, _refine, _rings
from mkdsl.search._cost import Model
from mkdsl.search._search import find

H200 = profile("h200")


class Work(collections.Counter[str]):
    """candidates; costs computed; labels, each a candidate after a path; paths; simulations and their events; orders that the proof looks at."""

    def search(self, graph: OpGraph, batch: int = 1) -> Schedule:
        self.clear()
        return find(graph, batch, H200, Handoff.SENTINEL)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Iterator[Work]:
    """Counts what searches do."""
    counted = Work()

    def count(of: Any, name: str, what: Callable[[Any], dict[str, int]]) -> None:
        original = getattr(of, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            counted.update(what(result))
            return result

        monkeypatch.setattr(of, name, counting)

    count(_rings, "candidates", lambda found: {"candidates": len(found)})
    count(Model, "cost", lambda _: {"costs": 1})
    count(_path, "advance", lambda _: {"labels": 1})
    count(_rings, "shortest_path", lambda _: {"paths": 1})
    for module in (_draft, _refine):
        count(module, "simulate", lambda timeline: {"simulations": 1, "events": timeline.events})
    count(_handoffs, "Execution", lambda _: {"orders": 1})
    yield counted


def test_more_layers_are_no_more_work(work: Work):
    work.search(tiny(5))
    few, _ = work.copy(), work.search(tiny(80))
    events, more = few.pop("events"), work.pop("events")
    assert work == few and min(few.values()) > 0
    assert more == pytest.approx(events, rel=0.1)  # of other finalists, if the loop counts for more


@pytest.mark.medium
def test_a_longer_context_is_hardly_more_work(work: Work):
    """32 times the blocks of the cache: a few more ways to split them."""
    work.search(llama(context=512))
    short, _ = work.copy(), work.search(llama(context=16384))
    assert work["candidates"] <= 1.2 * short["candidates"]
    assert work["labels"] <= 3 * short["labels"]
    assert work["simulations"] <= 1.5 * short["simulations"]


def test_twice_the_phases_are_twice_the_candidates(work: Work):
    """Of a model without two phases alike. Each finalist takes events in proportion, and each tensor another simulation."""
    work.search(long_chain(10))
    once, _ = work.copy(), work.search(long_chain(20))
    for what in ("candidates", "costs", "labels"):
        assert work[what] == pytest.approx(2 * once[what], rel=0.15)
    assert (work["paths"], work["orders"]) == (once["paths"], once["orders"])
    assert work["simulations"] - once["simulations"] <= 10
    assert work["events"] <= 4 * once["events"]


@pytest.mark.medium
@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_large_models(work: Work, batch: int):
    """Llama-3.1-8B: at most half as much again as it takes today; and the ring has room."""
    schedule = work.search(llama_8b(), batch)
    most = {"candidates": 4000, "costs": 6500, "labels": 120_000, "paths": 90, "simulations": 45, "events": 2_300_000, "orders": 12}
    assert set(work) == set(most)
    assert all(work[what] <= n for what, n in most.items()), work
    assert schedule.num_stages >= 4
