"""The cost model's laws: how a phase fares behind a ring that is partly full, and what memory alone needs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import LAW
from oracle.graphs import llama_1b

from mkdsl.schedule import KIB, FoldPlan, profile
from mkdsl.search import floor_us
from mkdsl.search._candidates import Candidate
from mkdsl.search._cost import Cost, Model, Ring, advance

H200 = profile("h200")
LLAMA = llama_1b()
RING = Ring(32 * KIB, 2)

times = st.floats(0, 50)


@settings(LAW, max_examples=200)
@given(st.builds(Cost, times, times, times), times, times, st.floats(1, 30))
def test_more_ahead_is_never_worse(cost: Cost, ahead: float, more: float, capacity: float):
    """What the shortest path relies on to drop labels."""
    ahead, more = min(ahead, capacity), min(ahead + more, capacity)
    took, after = advance(cost, ahead, capacity)
    took_more, after_more = advance(cost, more, capacity)
    assert took_more <= took + 1e-9 and after_more >= after - 1e-9
    waited = more - ahead
    assert waited + took_more >= took - 1e-9  # and waiting for it gains nothing


@pytest.mark.parametrize(
    ("cost", "ahead", "took", "after"),
    [
        (Cost(2.0, 5.0, 0.0), 0.0, 5.0, 0.0),  # while compute waits 2 us, 2 us of stream land
        (Cost(2.0, 5.0, 0.0), 4.0, 2.0, 1.0),  # what is there already is not waited for
        (Cost(9.0, 5.0, 0.0), 0.0, 9.0, 3.0),  # the ring holds 8 us, no more
        (Cost(0.0, 5.0, 7.0), 5.0, 7.0, 7.0),  # bound by compute, the loader runs ahead
        (Cost(0.0, 5.0, 20.0), 8.0, 20.0, 8.0),
        (Cost(9.0, 6.0, 0.0, filled=0.5, empty=2.0), 0.0, 9.0, 0.0),  # units that fill half of their stages
    ],
)
def test_one_phase_behind_a_ring_of_8_us(cost: Cost, ahead: float, took: float, after: float):
    assert advance(cost, ahead, 8.0) == pytest.approx((took, after))


def test_a_ring_holds_its_stages_at_the_rate_that_its_units_in_flight_reach():
    """64 KiB in flight reach 98.3 % of the bandwidth."""
    rate = 0.983 * 4.61e12 / 132 * 1e-6
    assert RING.bandwidth(H200) == pytest.approx(rate)
    assert RING.capacity(H200, 6) == pytest.approx(6 * 32 * KIB / rate)


def test_the_floor_is_what_memory_needs_for_the_bytes_of_a_step():
    """Llama-3.2-1B: 2.47 GB of weights, and the cache of 16 layers."""
    cache = 16 * 2 * 8 * 512 * 64 * 2
    assert floor_us(LLAMA, 1, H200) == pytest.approx((2.4716e9 + cache) / 4.61e12 * 1e6, rel=1e-3)
    assert floor_us(LLAMA, 9, H200) - floor_us(LLAMA, 1, H200) == pytest.approx(8 * cache / 4.61e12 * 1e6)


# Costs of phases.


def cost_of(plan: FoldPlan, *folded: int, released: bool = False) -> Cost:
    model = Model(LLAMA, 1, H200, RING, released=released, padded_batch=1)
    return model.cost(LLAMA.phase(plan.name), Candidate(plan, folded, folded, 1), {})


def test_a_released_hand_off_takes_longer_and_nothing_else_does():
    """With half of the ring's 64 KiB in flight: 1.6 us and 2.9."""
    plan = FoldPlan(name="wd", tasks=(), waits=(), split_k=8, tile_k=256)
    relaxed, released = (cost_of(plan, 2, released=r) for r in (False, True))
    assert released.latency - relaxed.latency == pytest.approx(2.9 - 1.6)
    assert (released.stream, released.compute) == (relaxed.stream, relaxed.compute)


def test_the_busiest_worker_decides():
    """Of wq's, wk's and wv's tiles, on workers of their own, whoever has most."""
    plan = FoldPlan(name="wq+wk+wv", tasks=(), waits=(), split_k=8, tile_k=256)
    assert cost_of(plan, 3, 2, 2) == cost_of(plan, 3, 0, 0)
    assert cost_of(plan, 1, 2, 1) == cost_of(plan, 0, 2, 0)


def test_units_that_fill_half_a_stage_leave_half_the_ring_empty():
    plan = FoldPlan(name="wd", tasks=(), waits=(), split_k=8, tile_k=128)
    found = cost_of(plan, 2)
    assert found.filled == 0.5
    assert found.empty == pytest.approx(2 * 8 * 0.5 * RING.capacity(H200, 1))
