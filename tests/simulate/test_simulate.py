"""What must hold of every simulation, whatever the constants: all steps end, after what they wait for; and how many events it takes."""

import dataclasses
from collections.abc import Callable

import pytest
from found import found
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from laws import LAW
from oracle.graphs import attention_only, graphs, llama, llama_1b, long_chain, tiny
from oracle.sources import with_workers

from mkdsl.graph import OpGraph
from mkdsl.schedule import Handoff, profile
from mkdsl.search._search import find
from mkdsl.simulate import _loader, simulate
from mkdsl.simulate._cohorts import cohorts
from mkdsl.simulate._simulate import PACES, STEADY

H200 = profile("h200")
FEW = with_workers(8)


@pytest.mark.medium
@settings(LAW, max_examples=40)
@given(graphs(), st.integers(1, 8), st.integers(1, 4), st.sampled_from(Handoff))
def test_every_step_of_every_worker_ends_after_what_it_waits_for(graph: OpGraph, workers: int, batch: int, handoff: Handoff):
    """And nothing is faster than its bytes."""
    gpu = with_workers(workers)
    schedule = find(graph, batch, gpu, handoff)
    timeline = simulate(graph, schedule, gpu, whole=True)
    assert sorted(w for cohort in timeline.cohorts for w in cohort) == list(range(schedule.workers))
    steps = sum(len(p.participants) * graph.iterations(graph.phase(p.name)) for p in schedule.phases)
    assert sum(len(timeline.cohorts[s.cohort]) for s in timeline.spans) == steps
    assert all(s.arrived <= s.known <= s.read <= s.folded <= s.signalled for s in timeline.spans)
    streamed = sum(p.streamed_bytes(batch) * graph.iterations(p) for p in graph.phases)
    assert timeline.us >= streamed / gpu.bandwidth * 1e6 * 0.999


def test_the_same_every_time():
    first, second = (simulate(tiny(), found(tiny(), 1, H200), H200) for _ in range(2))
    assert first == second


def test_workers_that_wait_for_ever_are_an_error():
    schedule = dataclasses.replace(found(tiny(), 1, H200), max_in_flight=0)
    with pytest.raises(ValueError, match="workers wait for ever"):
        simulate(tiny(), schedule, H200)


def test_tiny_decoders_are_all_latency():
    """Their bytes take a tenth of a microsecond a layer, their four hand-offs more than one each."""
    assert simulate(tiny(), found(tiny(), 1, H200), H200).us > 20


def test_a_map_waits_for_the_writers_of_its_rows():
    """It has nothing else to do before, and would be simulated as if they were there."""
    graph = attention_only()
    schedule = found(graph, 1, FEW)
    assert (graph.phase("map.2").reads, graph.phase("map.2").row_reads) == ((), ("attention", "x"))
    assert "attention" in schedule.plan("map.2").waits
    timeline = simulate(graph, schedule, FEW)
    ends = {i: [s.signalled for s in timeline.spans if (s.phase, s.iteration) == ("attention", i)] for i in range(STEADY)}
    assert all(s.read > max(ends[s.iteration]) for s in timeline.spans if s.phase == "map.2")


# The ring.


def test_more_in_flight_than_the_ring_has_stages_changes_nothing():
    schedule = found(tiny(), 1, FEW)
    deep = dataclasses.replace(schedule, num_stages=3, max_in_flight=3)
    assert simulate(tiny(), dataclasses.replace(deep, max_in_flight=9), FEW) == simulate(tiny(), deep, FEW)


def test_a_slower_memory_never_makes_a_step_faster():
    schedule = found(tiny(), 1, FEW)
    times = [simulate(tiny(), schedule, dataclasses.replace(FEW, bandwidth=FEW.bandwidth / n), drift=False).us for n in (1, 2, 4, 8, 16)]
    assert times == sorted(times)


# Work: events, which are the same on every machine.


def layers(n: int) -> OpGraph:
    """Llama-3.2-1B with so many layers: what is decided of one layer does not depend on how many there are."""
    return llama(hidden=2048, layers=n, heads=32, kv_heads=8, head_dim=64, inner=8192, vocab=128256, context=512)


def test_what_is_skipped_counts_like_what_is_simulated():
    skipped, whole = (simulate(llama_1b(), found(llama_1b(), 1, H200), H200, whole=w) for w in (False, True))
    assert skipped.us == pytest.approx(whole.us, rel=0.01)
    assert whole.events > 2 * skipped.events


def test_more_layers_take_no_more_events():
    schedule = found(llama_1b(), 1, H200)
    assert len({simulate(layers(n), schedule, H200).events for n in (STEADY, 16, 64)}) == 1


def test_all_layers_take_events_in_proportion():
    schedule = found(llama_1b(), 1, H200)
    few, more, most = (simulate(layers(n), schedule, H200, whole=True).events for n in (8, 16, 24))
    assert most - more == pytest.approx(more - few, rel=0.02)


def test_more_workers_with_equal_work_take_no_more_events():
    """Four times the workers, rows and bandwidth: as many cohorts."""
    few, many = (dataclasses.replace(with_workers(n), bandwidth=H200.bandwidth * n / 132) for n in (33, 132))
    played = [simulate(g, found(g, 1, gpu), gpu) for gpu in (few, many) for g in [long_chain(6, rows=32 * gpu.workers, repeats=4)]]
    assert [len(p.cohorts) for p in played] == [len(PACES)] * 2
    assert played[1].events == pytest.approx(played[0].events, rel=0.05)


def test_without_drift_a_third_of_the_cohorts():
    schedule = found(llama_1b(), 1, H200)
    drifting, together = (simulate(llama_1b(), schedule, H200, drift=drift) for drift in (True, False))
    assert len(drifting.cohorts) == pytest.approx(3 * len(together.cohorts), abs=6)  # some have fewer than three workers
    assert drifting.events > together.events


@pytest.mark.medium
@pytest.mark.parametrize(("model", "batch"), [(llama_1b, 1), (llama_1b, 8), (tiny, 1)])
def test_events_of_a_unit_and_of_a_step(model: Callable[[], OpGraph], batch: int):
    """At most, where no stretch can be foreseen: a unit is served, lands, and its stage is free. A step waits, knows, reads, begins, pauses and
    signals."""
    graph = model()
    schedule = found(graph, batch, H200)
    repeats = [min(s.repeats, STEADY) for s in graph.segments]
    everybody = cohorts(graph.in_order(schedule.order), schedule, H200.launched(schedule.cluster), repeats, len(PACES))
    units = sum(step.work.units for c in everybody for step in c.steps)
    steps = sum(4 + len(step.waits) + len(step.work.runs) for c in everybody for step in c.steps)
    assert simulate(graph, schedule, H200).events <= 3 * units + steps


@pytest.mark.medium
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("card", ["h200", "l20"])
def test_a_stretch_is_what_its_units_would_have_been(card: str, batch: int, monkeypatch: pytest.MonkeyPatch):
    """And takes fewer events."""
    gpu = profile(card)
    schedule = found(llama_1b(), batch, gpu)
    together = simulate(llama_1b(), schedule, gpu, whole=True)
    monkeypatch.setattr(_loader, "LONG", 1_000_000)
    apart = simulate(llama_1b(), schedule, gpu, whole=True)
    assert together.events < apart.events
    for one, other in zip(together.spans, apart.spans, strict=True):
        assert one[:2] == other[:2]
        assert one.signalled == pytest.approx(other.signalled, abs=1e-3)


@pytest.mark.medium
@settings(LAW, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(graphs(), st.integers(1, 8), st.integers(1, 4))
def test_stretches_of_any_graph(monkeypatch: pytest.MonkeyPatch, graph: OpGraph, workers: int, batch: int):
    gpu = with_workers(workers)
    schedule = find(graph, batch, gpu, Handoff.SENTINEL)
    with monkeypatch.context() as patch:
        patch.setattr(_loader, "LONG", 1_000_000)
        apart = simulate(graph, schedule, gpu, whole=True)
    assert simulate(graph, schedule, gpu, whole=True).us == pytest.approx(apart.us, rel=1e-6)
