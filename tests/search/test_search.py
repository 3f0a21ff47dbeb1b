"""The search as a whole: feasible everywhere, the fastest of its finalists, the same every time, and what it refuses."""

import dataclasses
import json
import re
from collections.abc import Callable

import pytest
from found import found
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import LAW
from oracle.graphs import graphs, llama, llama_1b, llama_8b, parallel, sandwich, tiny
from oracle.sources import with_workers

from mkdsl.graph import OpGraph
from mkdsl.proof import Rule, ScheduleError, verify_schedule
from mkdsl.schedule import KIB, PROFILES, AttentionPlan, FoldPlan, Handoff, MapPlan, PhasePlan, Schedule, profile
from mkdsl.search import draft, search, timed, without_k_split
from mkdsl.search._rings import RINGS
from mkdsl.search._search import finalists, find

H200 = profile("h200")


@pytest.mark.medium
@pytest.mark.parametrize("name", sorted(PROFILES))
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("model", [tiny, pytest.param(llama_1b, marks=pytest.mark.slow)])
def test_every_profile_has_a_feasible_schedule(model: Callable[[], OpGraph], batch: int, name: str):
    schedule = search(model(), batch=batch, target=name.upper())
    assert schedule.target == name and schedule.smem_bytes <= PROFILES[name].smem_bytes


@pytest.mark.medium
@pytest.mark.parametrize("model", [parallel, sandwich])
@pytest.mark.parametrize("handoff", Handoff)
def test_other_layer_shapes(model: Callable[[], OpGraph], handoff: Handoff):
    schedule = search(model(), batch=3, target=with_workers(4), handoff=handoff)
    assert {t.handoff for t in schedule.tensors} == {handoff}
    assert schedule.tensor("x").incarnations == 3  # the phase that writes it reads it too


@pytest.mark.medium
@settings(LAW, max_examples=40)
@given(graphs(), st.integers(1, 12), st.integers(1, 8), st.sampled_from(Handoff))
def test_random_graphs_get_schedules_that_are_proven(graph: OpGraph, workers: int, batch: int, handoff: Handoff):
    gpu = with_workers(workers)
    schedule = find(graph, batch, gpu, handoff)
    verify_schedule(graph, schedule, gpu)
    assert Schedule.from_json(json.loads(json.dumps(schedule.to_json()))) == schedule


@pytest.mark.medium
def test_same_arguments_same_schedule():
    first, second = (find(tiny(), 2, H200, Handoff.SENTINEL) for _ in range(2))
    assert first == second and str(first) == str(second)


# Which one is chosen.


def tiles(schedule: Schedule) -> list[PhasePlan]:
    return [dataclasses.replace(p, waits=(), fence=False) for p in schedule.phases]


@pytest.mark.medium
def test_the_finalist_that_is_predicted_to_be_the_fastest_wins():
    graph, schedule = llama_1b(), found(llama_1b(), 1, H200)
    drafts = [timed(graph, draft(graph, 1, Handoff.SENTINEL, c), H200) for c in finalists(graph, 1, H200, Handoff.SENTINEL)]
    best = min(drafts, key=lambda s: s.predicted_us)
    assert len(drafts) > len(RINGS)
    assert tiles(schedule) == tiles(best)
    assert schedule.predicted_us == pytest.approx(best.predicted_us, rel=0.02)  # more waits, no other difference


def test_a_step_takes_as_long_as_its_phases():
    graph, schedule = llama_1b(), found(llama_1b(), 1, H200)
    total = sum(us * graph.iterations(graph.phase(name)) for name, us in schedule.us)
    assert total == pytest.approx(schedule.predicted_us, rel=0.01)


@pytest.mark.medium
@pytest.mark.parametrize("batch", [1, 8])
def test_of_all_orders_the_one_that_is_predicted_to_be_the_fastest_wins(batch: int):
    graph = parallel()
    alone = {tuple(g.order): found(dataclasses.replace(g, others=()), batch, H200) for g in (graph, *graph.others)}
    best = found(graph, batch, H200)
    assert len(alone) == 3
    assert best == min(alone.values(), key=lambda s: s.predicted_us)
    assert best == alone[best.order]


@pytest.mark.medium
def test_folds_multiply_by_wgmma_where_columns_are_many():
    """Qwen3-0.6B: at batch 1 units past 8 columns are as quick by `mma`."""
    graph = llama(hidden=1024, layers=28, heads=16, kv_heads=8, head_dim=128, inner=3072, vocab=151936, context=512)
    for batch, instructions in ((1, {"mma"}), (16, {"mma", "wgmma"})):
        plans = found(graph, batch, H200).phases
        assert {p.instruction for p in plans if isinstance(p, FoldPlan)} == instructions, batch


def test_splits_of_heads_that_no_tile_divides():
    """Regression: SmolLM2's 9 heads left its attention to 3 workers."""
    graph = llama(hidden=576, layers=2, heads=9, kv_heads=3, head_dim=64, inner=1536, vocab=1024, context=512)
    schedule = found(graph, 1, dataclasses.replace(H200, clusters=()))
    assert schedule.tensor("attention").splits > 1
    assert 9 % schedule.plan("wo").split_k


# Without K-splitting.


@pytest.mark.medium
@pytest.mark.parametrize(("model", "batch"), [(tiny, 1), (llama_1b, 16)])
def test_without_k_splitting_every_resident_is_whole(model: Callable[[], OpGraph], batch: int):
    gpu = PROFILES["l20"]
    schedule = found(model(), batch, gpu)
    whole, lifted = without_k_split(model(), schedule, gpu)
    verify_schedule(model(), whole, lifted)
    decisions = {(p.splits, p.cluster, p.k_stages if isinstance(p, FoldPlan) else 1) for p in whole.phases}
    assert decisions == {(1, 1, 1)}
    assert {type(p) for p in whole.phases} == {FoldPlan, AttentionPlan, MapPlan}
    ring = whole.num_stages, whole.stage_bytes, whole.max_in_flight
    assert ring == (schedule.num_stages, schedule.stage_bytes, schedule.max_in_flight)
    if batch == 16:
        assert whole.smem_bytes > gpu.smem_bytes


# Refusals.


def test_unknown_target():
    with pytest.raises(ValueError, match=re.escape("no GPU profile 'tpu'; there are a100, b200, h100, h200, l20, l40s")):
        search(tiny(), batch=1, target="tpu")


@pytest.mark.parametrize("batch", [0, 17])
def test_batch_out_of_range(batch: int):
    with pytest.raises(ValueError, match=f"batch={batch} is out of range: a kernel decodes 1 to 16 sequences"):
        search(tiny(), batch=batch, target="h200")


def test_unknown_handoff():
    with pytest.raises(ValueError, match="'epoch' is not a valid Handoff"):
        search(tiny(), batch=1, target="h200", handoff="epoch")


def test_nothing_fits():
    small = dataclasses.replace(H200, name="small", smem_bytes=48 * KIB)
    with pytest.raises(ScheduleError, match=r"batch 16 does not fit small's 49152 bytes .* wg·wu alone needs \d+ beside a ring") as error:
        find(llama_8b(), 16, small, Handoff.SENTINEL)
    assert error.value.rule is Rule.ROOM


def test_no_tile_fits():
    """No 16 divide the 120 features that a head reads."""
    graph = tiny()
    odd = dataclasses.replace(graph, phases=tuple(dataclasses.replace(p, k=120) if p.name == "embed" else p for p in graph.phases))
    with pytest.raises(ScheduleError, match="no tile fits embed: fold k=120, rows=192") as error:
        find(odd, 1, H200, Handoff.SENTINEL)
    assert error.value.rule is Rule.ROOM
