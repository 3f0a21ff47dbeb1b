"""What simulated workers share: events in order of time, and device memory that serves all of them at its bandwidth."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import LAW

from mkdsl.simulate._memory import EventQueue, Memory, Source


def landings(jobs: list[tuple[Source, float, float, float]], bandwidth: float = 100.0) -> list[float]:
    """When each (source, bytes, speed, latency), asked for at the start, has landed at every worker of its source."""
    queue, landed = EventQueue(), [0.0] * len(jobs)
    memory = Memory(queue, bandwidth)
    for number, (source, size, speed, latency) in enumerate(jobs):
        memory.fetch(source, size, speed, latency, lambda number=number: landed.__setitem__(number, queue.now))
    queue.run()
    assert memory.in_flight() == pytest.approx(0, abs=1e-6)
    return landed


def test_events_come_in_order_of_time_and_equal_ones_as_they_were_made():
    queue, seen = EventQueue(), []
    for time, name in ((2.0, "c"), (1.0, "a"), (2.0, "d"), (1.0, "b")):
        queue.at(time, lambda name=name: seen.append((queue.now, name)))
    queue.run()
    assert seen == [(1.0, "a"), (1.0, "b"), (2.0, "c"), (2.0, "d")]
    assert queue.count == 4


def test_nothing_happens_in_the_past():
    queue, seen = EventQueue(), []
    queue.at(3.0, lambda: queue.at(1.0, lambda: seen.append(queue.now)))
    queue.run()
    assert seen == [3.0]


def test_one_source_is_served_in_order():
    source = Source(2)
    assert landings([(source, 100, 1.0, 0.0), (source, 50, 1.0, 0.0)]) == pytest.approx([2.0, 3.0])


def test_sources_share_in_proportion_to_workers_and_speed():
    """2 workers at speed 1 and one at speed 2 get half each; the rest of the larger job then has all."""
    assert landings([(Source(2), 100, 1.0, 0.0), (Source(1), 100, 2.0, 0.0)]) == pytest.approx([3.0, 2.0])


def test_no_unit_lands_before_its_latency():
    assert landings([(Source(1), 100, 1.0, 7.0), (Source(1), 100, 1.0, 0.0)]) == pytest.approx([7.0, 2.0])


jobs = st.lists(st.tuples(st.integers(1, 5), st.floats(1, 1000), st.floats(0.5, 2)), min_size=1, max_size=8)


@settings(LAW, max_examples=100)
@given(jobs)
def test_memory_serves_at_its_bandwidth(jobs: list[tuple[int, float, float]]):
    """As long as somebody waits, no byte of it is lost."""
    landed = landings([(Source(workers), size, speed, 0.0) for workers, size, speed in jobs])
    assert max(landed) == pytest.approx(sum(workers * size for workers, size, _ in jobs) / 100)


@pytest.mark.parametrize("units", [50, 100, 200])
def test_events_grow_with_the_units_not_with_their_product(units: int):
    """One service a unit, which is its landing too, where latency is over."""
    queue = EventQueue()
    memory, sources = Memory(queue, 100.0), [Source(1) for _ in range(10)]
    for source in sources:
        for _ in range(units):
            memory.fetch(source, 10.0, 1.0, 0.0, lambda: None)
    queue.run()
    assert queue.count == 10 * units
