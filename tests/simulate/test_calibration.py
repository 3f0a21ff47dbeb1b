"""The simulator against what was measured on one H200: the hand-written prototype and generated kernels, all of Llama-3.2-1B at batch 1 and
context 512, by one set of constants (docs/simulator.md, docs/measurements.md)."""

import dataclasses
import functools

import pytest
from oracle.graphs import llama_1b

from mkdsl.schedule import KIB, Handoff, Profile, Schedule, profile
from mkdsl.search import RINGS, cheapest, draft, with_handoffs
from mkdsl.search._cost import Ring
from mkdsl.search._search import first
from mkdsl.simulate import Timeline, simulate

H200 = profile("h200")
NOTHING = ((0.0, 0.0),)
FREE = dataclasses.replace(H200, handoff=NOTHING, released=NOTHING, l2_rate=1e18)
INSTANT = dataclasses.replace(H200, bandwidth=1e18)


@functools.cache
def prototype(handoff: Handoff = Handoff.SENTINEL) -> Schedule:
    """The tiles and the ring of the hand-written kernel."""
    schedule = with_handoffs(llama_1b(), draft(llama_1b(), 1, handoff, cheapest(llama_1b(), 1, H200, handoff, RINGS[0])[0]))
    assert (schedule.num_stages, schedule.stage_bytes, schedule.max_in_flight) == (6, 32768, 2)
    return schedule


def without_waits(schedule: Schedule) -> Schedule:
    return dataclasses.replace(schedule, phases=tuple(dataclasses.replace(p, waits=()) for p in schedule.phases))


def with_ring(num_stages: int, max_in_flight: int, handoff: Handoff = Handoff.SENTINEL) -> Schedule:
    return dataclasses.replace(prototype(handoff), num_stages=num_stages, max_in_flight=max_in_flight)


ROWS = {
    "no hand-offs": (lambda: without_waits(prototype()), FREE, 567, 567),
    "6 stages, 2 in flight": (prototype, H200, 645, 656),
    "5 stages": (lambda: with_ring(5, 2), H200, 661, 667),
    "4 stages": (lambda: with_ring(4, 2), H200, 686, 686),
    "1 in flight": (lambda: with_ring(6, 1), H200, 709, 709),
    "3 in flight": (lambda: with_ring(6, 3), H200, 680, 680),
    **{f"released, {n} stages": (lambda n=n: with_ring(n, n, Handoff.RELEASE_ACQUIRE), H200, 731, 748) for n in (2, 3, 4, 5)},
}


@pytest.mark.parametrize(("schedule", "gpu", "low", "high"), ROWS.values(), ids=ROWS)
def test_the_prototypes_table_within_a_tenth(schedule, gpu: Profile, low: float, high: float):
    assert 0.9 * low <= simulate(llama_1b(), schedule(), gpu).us <= 1.1 * high


def test_the_head_alone():
    assert dict(simulate(llama_1b(), prototype(), H200).phase_us)["embed"] == pytest.approx(119, rel=0.1)


def test_a_layers_serial_path_without_a_stream():
    timeline = simulate(llama_1b(), prototype(), INSTANT)
    assert sum(us for name, us in timeline.phase_us if name not in ("map", "embed")) == pytest.approx(17.6, rel=0.1)


def last(timeline: Timeline, phase: str, iteration: int, what: str = "signalled") -> float:
    return max(getattr(s, what) for s in timeline.spans if (s.phase, s.iteration) == (phase, iteration))


CHAIN = {"wq+wk+wv": (6.2, 8.6), "attention": (9.9, 12.2), "wo": (14.0, 15.8), "wg·wu": (17.4, 31.8), "wd": (32.8, 38.7)}


def test_the_chain_of_a_layers_timeline():
    """From the last worker's `down` at 4.2 us: gate and up have their data at 17.4, and the layer ends 34.5 us after the one before. The
    single steps between are within a microsecond and a half."""
    timeline = simulate(llama_1b(), with_ring(5, 2), H200)
    start = last(timeline, "wd", 2)
    assert last(timeline, "wg·wu", 3, "read") - start == pytest.approx(17.4 - 4.2, rel=0.15)
    assert last(timeline, "wd", 3) - start == pytest.approx(38.7 - 4.2, rel=0.1)
    for phase, (read, signalled) in CHAIN.items():
        assert last(timeline, phase, 3, "read") - start == pytest.approx(read - 4.2, abs=1.5)
        assert last(timeline, phase, 3) - start == pytest.approx(signalled - 4.2, abs=1.5)


MEASURED = {(32, 2): 669.9, (16, 3): 658.4, (16, 4): 679.5, (24, 2): 724.7, (28, 2): 740.7, (36, 2): 701.7}


@pytest.mark.medium
def test_the_generated_kernels_candidates_are_ranked_as_measured():
    """The best of each (KiB of a stage, units in flight) that the search looks at."""

    def us(ring: Ring) -> float:
        choices = first(cheapest(llama_1b(), 1, H200, Handoff.SENTINEL, ring))
        return min(simulate(llama_1b(), draft(llama_1b(), 1, Handoff.SENTINEL, c), H200).us for c in choices)

    predicted = {ring: us(r) for r in RINGS if (ring := (r.stage_bytes // KIB, r.max_in_flight)) in MEASURED}
    assert min(predicted, key=lambda r: predicted[r]) == min(MEASURED, key=lambda r: MEASURED[r])
    assert predicted == pytest.approx(MEASURED, rel=0.1)
