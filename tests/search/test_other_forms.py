"""Which values cross phases, as something that is searched."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import random_decoders
from hypothesis import given, settings
from hypothesis import strategies as st
from search_graphs import sandwich, tiny
from search_sources import alone, with_workers

import mkdsl as mk
from mkdsl.graph import neighbours
from mkdsl.search import Schedule, ScheduleError, explain, profile, search, simulate, verify_schedule
from mkdsl.search._alternatives import next_forms
from mkdsl.search._cache import key
from mkdsl.search._draft import draft, rough, timed
from mkdsl.search._protocol import with_handoffs
from mkdsl.search._rings import RINGS, cheapest
from mkdsl.search._schedule import PhasePlan
from mkdsl.search._search import OTHER_FORM, find
from mkdsl.search._work import Workload

H200 = profile("h200")
SLOW_LOADS = dataclasses.replace(with_workers(8), load_us=2.0, clusters=())  # what needs no registers is cheap beside what does


def crossing(graph, schedule):
    """Tensors of a schedule that the step as it comes does not have."""
    return {t.name for t in schedule.tensors} - graph.tensors.keys()


def without_norms(*, short=False):
    """A finish can write what the next fold streams past, as bfloat16, and nobody needs a sum over it."""

    def layer(x, p, kv, pos):
        x = x if short else x + mk.linear(p["wo"], jnp.tanh(x))
        return x + mk.linear(p["wd"], jax.nn.relu(mk.linear(p["wu"], jnp.tanh(x)))), kv

    def step(params, kv, token, pos):
        x, _ = mk.layers(layer, mk.embed(params["embed"], token), params["layers"], None, pos)
        return mk.linear(params["embed"], x), kv

    leaf = random_decoders.leaf
    layers = {"wo": leaf(5, 512, 512), "wu": leaf(5, 1024, 512), "wd": leaf(5, 512, 1024)}
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    return mk.jit(step, target=SLOW_LOADS).trace({"embed": leaf(128, 512), "layers": layers}, (), scalar, scalar).graph


@pytest.fixture(scope="module")
def chosen():
    """(a step, its schedule in another form)."""
    graph = without_norms()
    return graph, find(graph, 4, SLOW_LOADS, "data")


def test_another_form_where_it_is_predicted_to_be_faster(chosen):
    graph, schedule = chosen
    assert crossing(graph, schedule) == {"wo.in", "wu.in"}
    assert schedule.order == ("map", "wo.in", "wo", "wu", "wd", "embed")
    assert schedule.form_of(graph).phase("wo").writes == ("wo", "wu.in")
    assert {t.name for t in schedule.tensors if t.dtype == "bfloat16"} == {"wo.in", "wu.in", "wu"}
    assert OTHER_FORM * schedule.predicted_us < find(alone(graph), 4, SLOW_LOADS, "data").predicted_us


def test_a_schedule_says_which_form_it_is_of(chosen):
    graph, schedule = chosen
    again = Schedule.from_json(schedule.to_json())
    verify_schedule(graph, again, SLOW_LOADS)
    form = again.form_of(graph)
    assert [p.name for p in form.phases] == list(schedule.order)
    assert simulate(graph, again, SLOW_LOADS).us == simulate(alone(form), again, SLOW_LOADS).us
    assert "wu.in" in explain(graph, schedule, SLOW_LOADS)


def test_a_schedule_of_no_form_is_refused(chosen):
    """Phases of one, tensors of another; and the step as it comes, where it may have no other form."""
    graph, schedule = chosen
    tensors = tuple(dataclasses.replace(t, name={"wo": "wo.raw"}.get(t.name, t.name)) for t in schedule.tensors)
    with pytest.raises(ScheduleError, match=r"the graph's phases are .*, the schedule's"):
        verify_schedule(graph, dataclasses.replace(schedule, tensors=tensors), SLOW_LOADS)
    with pytest.raises(ScheduleError, match=r"the graph's phases are .*, the schedule's"):
        verify_schedule(alone(graph), schedule, SLOW_LOADS)


def test_the_search_gives_the_same_with_and_without_its_cache(chosen, tmp_path, monkeypatch):
    graph, schedule = chosen
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert search(graph, batch=4, target=SLOW_LOADS) == search(graph, batch=4, target=SLOW_LOADS) == schedule


def test_what_may_cross_is_part_of_a_schedules_key():
    graph = tiny()
    assert key(graph, 1, H200, "data") != key(alone(graph), 1, H200, "data")
    assert key(graph, 1, H200, "data") != key(neighbours(graph)[0], 1, H200, "data")


def everything(graph):
    """All forms within reach, by names."""
    found, waiting = {}, [graph]
    while waiting:
        form = waiting.pop()
        if (name := (tuple(form.order), *sorted(form.tensors))) not in found:
            found[name] = form
            waiting += neighbours(form)
    return found.values()


def test_the_best_of_all_forms_is_found():
    """Brute force: every form searched by itself."""
    graph = without_norms(short=True)
    alternatives = [find(alone(form), 4, SLOW_LOADS, "data") for form in everything(graph)]
    best, schedule = min(alternatives, key=lambda s: s.predicted_us), find(graph, 4, SLOW_LOADS, "data")
    assert len(alternatives) > 8
    assert crossing(graph, schedule) == crossing(graph, best)
    assert schedule.predicted_us <= OTHER_FORM * best.predicted_us


def test_a_map_waits_for_the_writers_of_its_rows():
    """It has nothing else to do before, and would be simulated as if they were there."""
    form = next(form for form in neighbours(tiny()) if "wd.raw" in form.tensors)
    schedule = find(alone(form), 1, with_workers(8), "data")
    assert form.phase("map.2").reads == () and "wd" in schedule.plan("map.2").waits
    timeline = simulate(form, schedule, with_workers(8))
    done = {s.iteration: s.signalled for s in timeline.spans if s.phase == "wd"}
    assert all(s.read > done[s.iteration] for s in timeline.spans if s.phase == "map.2")


@settings(max_examples=6, deadline=None)
@given(random_decoders.steps(), st.integers(2, 8), st.sampled_from([1, 4]))
def test_no_neighbour_is_predicted_to_be_faster_under_the_same_ring(step, workers, batch):
    graph, gpu = random_decoders.traced(step), dataclasses.replace(SLOW_LOADS, workers=workers)
    schedule = find(graph, batch, gpu, "data")
    form, ring = schedule.form_of(graph), next(r for r in RINGS if (r.stage_bytes, r.window) == (schedule.stage_bytes, schedule.window))
    quick, cost = simulate(form, schedule, gpu, drift=False).us, cheapest(form, batch, gpu, "data", ring)[0].found.cost
    for other in neighbours(form):
        best = cheapest(other, batch, gpu, "data", ring)[0]
        if best.found.cost < cost and rough(other, batch, "data", best).us < quick:
            changed = timed(other, with_handoffs(other, draft(other, batch, "data", best)), gpu)
            assert changed.predicted_us * OTHER_FORM >= schedule.predicted_us


def test_a_step_that_stays_as_it_comes_has_the_schedule_that_it_has_without_other_forms():
    graph = sandwich()
    schedule = find(graph, 2, H200, "data")
    assert not crossing(graph, schedule)
    assert schedule == find(alone(graph), 2, H200, "data")


def test_what_else_could_cross_comes_with_its_price(chosen):
    graph, schedule = chosen
    found = {(a.of, a.what): a.us for a in next_forms(schedule.form_of(graph), schedule, SLOW_LOADS)}
    raw = {(f"{weight}.raw", "crosses") for weight in ("wo", "wu", "wd")}
    assert set(found) == {("wo.in", "does not cross"), ("wu.in", "does not cross"), *raw}
    assert found["wu.in", "does not cross"] > 0


def test_a_map_that_reduces_reads_as_long_as_a_prologue_does():
    """Of whole vectors, in the same rows."""
    graph = sandwich()
    map_phase, fold = graph.phase("map.2"), graph.phase("wg·wu")
    for batch in (1, 8, 16):
        work = Workload(graph, batch, batch, dataclasses.replace(H200, l2_rate=1e15))
        plan = PhasePlan(name="map.2", rows=64, parts=8, tasks=(), waits=())
        staged = PhasePlan(name="wg·wu", rows=8, parts=8, chunk=16, tasks=(), waits=())
        assert work.of(map_phase, plan, (1,), {}).read == work.of(fold, staged, (1,), {}).read > 0
