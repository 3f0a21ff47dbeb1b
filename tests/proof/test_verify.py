"""The proof refuses every kind of broken schedule, by name, and what it accepts survives an adversarial simulation."""

import dataclasses
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle.graphs import free_running, graphs, make_graph, parallel, sandwich, tiny
from oracle.mutations import with_plan, with_tensor
from oracle.simulator import Hang, Race, simulate
from oracle.sources import each_order

from mkdsl.graph import OpGraph, Part, Phase, Tensor
from mkdsl.proof import ScheduleError, verify_schedule
from mkdsl.schedule import Schedule, profile
from mkdsl.search._search import find

H200 = profile("h200")
FEW = dataclasses.replace(H200, workers=4)  # fewer than tiles: every worker takes part in every phase


def schedule_of(graph: OpGraph, *, handoff: str = "data", batch: int = 1, gpu=FEW) -> Schedule:
    return find(graph, batch, gpu, handoff)


def refused(schedule: Schedule, match: str, graph: OpGraph | None = None, gpu=FEW) -> None:
    with pytest.raises(ScheduleError, match=match):
        verify_schedule(graph or tiny(), schedule, gpu)


@pytest.fixture(scope="module")
def good() -> Schedule:
    return schedule_of(tiny())


# Structure.


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rows": 24}, r"wo: 24 rows x \d parts: a tile has 64 mma rows"),
        ({"chunk": 48}, r"wo: \d parts x \d pieces x chunk 48 do not divide k=256"),
        ({"chunk": 0}, r"chunk 0 do not divide k=256"),
        ({"chunk": 8}, "wo: chunk 8 is no multiple of 16"),
        ({"pieces": 3}, "x 3 pieces x chunk"),
        ({"group": 0}, r"\(group 0\)"),
        ({"splits": 2}, "wo: 2 splits: a fold is not split over workers"),
    ],
)
def test_fold_structure(good, changes, match):
    refused(with_plan(good, "wo", **changes), match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"chunk": 96}, "attention: chunk 96 is no multiple of 64 that divides the context 128"),
        ({"splits": 3}, "attention: 3 splits of 2 cache blocks"),
        ({"rows": 64}, "attention: 64 rows: an item is all heads of one kv head"),
    ],
)
def test_attention_structure(good, changes, match):
    refused(with_plan(good, "attention", **({"chunk": 64, "splits": 1} | changes)), match)


def test_map_structure(good):
    refused(with_plan(good, "map", rows=32), r"map: 32 rows an item: no multiple of 64 that divides \[128\]")
    refused(with_plan(good, "map", splits=2), "map: 2 splits: a map has none")


def test_unit_too_large_for_a_stage(good):
    small = dataclasses.replace(good, stage_bytes=4096)
    refused(small, rf"wq\+wk\+wv: a unit of {128 * good.plan('wq+wk+wv').chunk} bytes does not fit a stage of 4096")
    refused(dataclasses.replace(good, stage_bytes=16384 + 1024), "a stage of 17408 bytes is no multiple of 8 rows of 256")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"stages": 1}, "a ring of 1 stages: at least 2"),
        ({"window": 0}, "window 0: from 1 to the ring's"),
        ({"window": 99}, "window 99: from 1 to the ring's"),
        ({"workers": 5}, "5 workers: h200 holds 4 at once"),
        ({"padded_batch": 3}, "batch 1 padded to 3: not to a power of two"),
        ({"batch": 2}, "batch 2 padded to 1"),
    ],
)
def test_ring_and_workers(good, changes, match):
    refused(dataclasses.replace(good, **changes), match)


def test_what_a_tensor_crosses_as(good):
    """bfloat16 only where that changes no bit: of what all readers round, and not of partial carries."""
    name, splits = "attention", good.tensor("attention").splits
    refused(with_tensor(good, "wo", dtype="bfloat16"), "wo: crosses as bfloat16 in 1 splits, but is read as float32")
    refused(with_tensor(good, "wg·wu", dtype="float16"), "wg·wu: crosses as float16")
    verify_schedule(tiny(), with_tensor(good, "wg·wu", dtype="float32"), FEW)
    assert (good.tensor(name).dtype == "bfloat16") == (splits == 1)
    if splits > 1:
        refused(with_tensor(good, name, dtype="bfloat16"), f"{name}: crosses as bfloat16 in {splits} splits")


def test_another_graphs_schedule(good):
    refused(good, r"the graph's phases are \['map', .*\], the schedule's", parallel())


def test_parts_of_a_fold_that_folds_whole_rows():
    graph = tiny()
    whole = tuple(dataclasses.replace(p, parallel=p.name != "wo") for p in graph.phases)
    refused(schedule_of(graph), r"wo: \d parts of a fold that folds whole rows", dataclasses.replace(graph, phases=whole))


def test_splits_for_readers_that_do_not_merge():
    x, a = Tensor(name="x", width=128, carried=True), Tensor(name="a", width=128, heads=2)
    attention = Phase(
        name="attn", kind="attention", segment=1, parts=(Part(weights=(), rows=128, writes=("a",)),), reads=("x",), row_reads=(), k=4096,
        heads=2, kv_heads=2, head_dim=64,
    )  # fmt: skip
    for kind, reads, row_reads in (("map", ("a",), ()), ("fold", ("x",), ("a",))):
        last = Phase(
            name="last",
            kind=kind,
            segment=1,
            parts=(Part(weights=("w",), rows=128, writes=("x",)),),
            reads=reads,
            row_reads=row_reads,
            k=128,
        )
        first = Phase(name="first", kind="map", segment=0, parts=(Part(weights=(), rows=128, writes=("x",)),), reads=(), row_reads=())
        graph = make_graph([(1, [first]), (3, [attention, last])], [x, a], 4096)
        schedule = schedule_of(graph)
        assert schedule.tensor("a").splits == 1
        plan = schedule.plan("attn")
        split = with_plan(schedule, "attn", splits=2, tasks=(tuple((2 * f, 2 * n) for f, n in plan.tasks[0]),))
        refused(with_tensor(split, "a", splits=2), "last: reads a, left in 2 splits; only a fold's resident merges splits", graph)
        refused(split, "a: 1 splits, its writer attn makes 2", graph)


def test_parts_that_a_tile_does_not_have(good):
    """Found by the corpus: 64 rows of the mma may be 4 x 16, but no sequence has 16 columns."""
    few = with_plan(good, "wo", rows=4, parts=16, chunk=16, pieces=1, tasks=(tuple((w * 8, 8) for w in range(4)),))
    refused(few, "wo: 16 parts: a tile has 1, 2, 4 or 8")


@pytest.mark.parametrize("parts", [0, 3, 16])
def test_parts_that_a_map_does_not_have(good, parts):
    """Found by the corpus: a map reduces what it reads in as many parts."""
    refused(with_plan(good, "map", parts=parts), f"map: {parts} parts do not divide")


def test_pieces_of_a_fold_that_folds_whole_rows():
    """Its carry would begin anew with each piece."""
    graph = tiny()
    whole = dataclasses.replace(graph, phases=tuple(dataclasses.replace(p, parallel=p.name != "wo") for p in graph.phases))
    schedule = schedule_of(whole)
    chunk = whole.phase("wo").k // 4
    refused(with_plan(schedule, "wo", chunk=chunk, pieces=4), "wo: 4 pieces of a fold whose carry goes from a row's first", whole)


@pytest.mark.parametrize("field", ["parts", "pieces", "group"])
def test_fields_that_attention_does_not_use(good, field):
    """Its parts alone would make room for reductions that shared memory does not have."""
    refused(with_plan(good, "attention", **{field: 1000}), "attention: .* an attention has none")


@pytest.mark.parametrize(("field", "value"), [("chunk", 64), ("pieces", 2), ("group", 2)])
def test_fields_that_a_map_does_not_use(good, field, value):
    refused(with_plan(good, "map", **{field: value}), "map: .* a map streams nothing")


@pytest.mark.parametrize(("phase", "instruction"), [("wo", "fma"), ("attention", "wgmma"), ("map", "wgmma")])
def test_instructions_that_a_phase_does_not_have(good, phase, instruction):
    refused(with_plan(good, phase, instruction=instruction), f"{phase}: instruction '{instruction}': h200 has mma")


def test_wgmma_on_a_gpu_without_it(good):
    by_wgmma = with_plan(good, "wo", instruction="wgmma")
    verify_schedule(tiny(), by_wgmma, FEW)
    with pytest.raises(ScheduleError, match="wo: instruction 'wgmma': h200 has mma for it"):
        verify_schedule(tiny(), by_wgmma, dataclasses.replace(FEW, capability=(8, 9)))


def test_more_sequences_than_a_kernel_decodes(good):
    refused(dataclasses.replace(good, batch=17, padded_batch=32), "batch 17 padded to 32: a kernel decodes 1 to 16 sequences")


def test_stages_of_no_bytes(good):
    refused(dataclasses.replace(good, stage_bytes=-16384), "a stage of -16384 bytes")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"predicted_us": float("nan")}, "predicted_us is nan, which is none"),
        ({"predicted_us": -1.0}, "predicted_us is -1.0"),
        ({"workers": 4.0}, "workers is 4.0"),
        ({"window": True}, "window is True"),
        ({"phases": []}, r"phases is \[\]"),
        ({"phases": None}, "phases is None"),
        ({"tensors": ("x",)}, r"tensors is \('x',\)"),
        ({"us": ()}, "the graph's timed phases are"),
    ],
)
def test_fields_of_another_type(good, changes, match):
    refused(dataclasses.replace(good, **changes), match)


def test_plans_of_another_type(good):
    tasks = good.plan("wo").tasks
    refused(with_plan(good, "wo", tasks=tuple(tuple((f, float(n)) for f, n in part) for part in tasks)), r"wo: tasks is \(\(\(0, \d\.0")
    refused(with_plan(good, "wo", tasks=[list(part) for part in tasks]), "wo: tasks is ")
    refused(with_plan(good, "wo", rows=8.0), "wo: rows is 8.0")
    refused(with_plan(good, "wo", waits="attention"), "wo: waits is attention")
    refused(with_plan(good, "wo", fence=1), "wo: fence is 1")
    refused(with_tensor(good, "wq", incarnations=2.0), "wq: incarnations is 2.0")


def test_a_phase_or_tensor_twice(good):
    refused(dataclasses.replace(good, phases=(*good.phases, good.phases[-1])), "the graph's phases are")
    refused(dataclasses.replace(good, tensors=(*good.tensors, good.tensors[-1])), "the graph's tensors are")


def test_the_order_in_which_a_schedule_lists_its_tensors_is_nothing(good):
    verify_schedule(tiny(), dataclasses.replace(good, tensors=good.tensors[::-1]), FEW)


def test_an_order_of_phases_that_the_graph_does_not_have(good):
    refused(dataclasses.replace(good, phases=good.phases[::-1]), r"the graph's phases are \['map', .*\], the schedule's \['embed'")


def test_every_order_that_the_graph_has():
    """And what is safe in one order need not be in another."""
    for graph in each_order(parallel()):
        schedule = schedule_of(graph)
        verify_schedule(parallel(), schedule, FEW)
        simulate(parallel(), schedule)
        assert schedule.order == tuple(graph.order)


# Coverage.


@pytest.mark.parametrize("items", [(-1, 0), (1 << 40, 0), (0, -1), (3, -3)])
def test_ranges_of_nothing(good, items):
    """The kernel reads them too: a table of int32 holds no 2**40."""
    refused(with_range(good, "map", 0, 3, lambda r: items), "map, part 0 .*: worker 3 has items")


def with_range(schedule: Schedule, name: str, part: int, worker: int, change: Any) -> Schedule:
    plan = schedule.plan(name)
    tasks = [list(p) for p in plan.tasks]
    tasks[part][worker] = change(tasks[part][worker])
    return with_plan(schedule, name, tasks=tuple(map(tuple, tasks)))


def test_coverage(good):
    tiles = 128 // good.plan("wo").rows
    assert tiles >= 4
    last = max(w for w, (_, n) in enumerate(good.plan("wo").tasks[0]) if n)
    of = re.escape("wo, part 0 (wo)")
    refused(with_range(good, "wo", 0, last, lambda r: (r[0], r[1] - 1)), f"{of}: nobody has items {tiles - 1} to {tiles - 1}")
    refused(with_range(good, "wo", 0, 0, lambda r: (r[0], r[1] - 1)), f"{of}: nobody has items .* worker 1 begins at")
    refused(with_range(good, "wo", 0, 0, lambda r: (r[0], r[1] + 1)), f"{of}: workers 0 and 1 both have item")
    refused(with_range(good, "wo", 0, last, lambda r: (r[0], r[1] + 1)), f"{of}: worker {last} has items .* of {tiles}")
    refused(with_range(good, "wo", 0, 0, lambda r: (r[0], -1)), f"{of}: worker 0 has items")
    refused(with_plan(good, "wo", tasks=(good.plan("wo").tasks[0][:-1],)), f"{of}: tasks for 3 workers of 4")
    refused(with_plan(good, "wo", tasks=()), "wo: tasks for 0 parts of 1")


# Waits, tensors, order.


def test_dropped_wait_with_counters():
    schedule = schedule_of(tiny(), handoff="counter")
    refused(with_plan(schedule, "wo", waits=()), r"wo in iteration 0 reads attention \(instance 0\) on worker \d, unordered with the write")


def test_dropped_waits_with_data():
    """A reader finds the data by itself, but nothing holds back whoever clears it."""
    gpu = dataclasses.replace(H200, workers=6)
    schedule = schedule_of(tiny(), gpu=gpu)
    refused(with_plan(schedule, "attention", waits=()), r"may look at wq \(instance 1\) on worker \d before worker \d's clear", gpu=gpu)
    refused(with_plan(schedule, "wd", waits=()), r"wd in iteration 0 on worker \d clears x's slot of instance 0, which wo", gpu=gpu)


def test_wrong_waits(good):
    refused(with_plan(good, "wo", waits=("embed",)), "wo: waits for embed of a later segment: it could never come")
    refused(with_plan(good, "wo", waits=("nothing",)), "wo: waits for nothing, which is no phase")
    schedule = schedule_of(tiny(), handoff="counter")
    refused(with_plan(schedule, "wo", waits=("wq+wk+wv",)), "wo in iteration 0 reads attention")


def test_wait_for_what_signals_nothing():
    graph = tiny()
    more = Phase(name="more", kind="map", segment=2, parts=(Part(weights=(), rows=128, writes=("more.out",)),), reads=("x",), row_reads=())
    segments = (*graph.segments[:2], dataclasses.replace(graph.segments[2], phases=("embed", "more")))
    tensors = graph.tensors | {"more.out": Tensor(name="more.out", width=128, output=True)}
    graph = dataclasses.replace(graph, phases=(*graph.phases, more), segments=segments, tensors=tensors)
    schedule = schedule_of(graph)
    refused(with_plan(schedule, "more", waits=("embed",)), "more: waits for embed, which signals nothing: it writes outputs only", graph)


def test_missing_fence(good):
    assert sum(p.fence for p in good.phases) == 1
    (fence,) = (p.name for p in good.phases if p.fence)
    refused(with_plan(good, fence, fence=False), r"may look at \w+ \(instance \d\) on worker \d before worker \d's clear in .*: no fence")


def test_fence_that_some_worker_does_not_pass():
    schedule = schedule_of(tiny(), gpu=H200)
    fences = [p.name for p in schedule.phases if p.fence]
    assert len(fences) > 1
    for name in fences:
        refused(with_plan(schedule, name, fence=False), "no fence", gpu=H200)


@pytest.mark.parametrize("tensor", ["x", "wq", "attention", "wo", "wg·wu"])
def test_one_incarnation_of_what_is_cleared(good, tensor):
    refused(with_tensor(good, tensor, incarnations=1), f"{tensor}: 1 incarnations of [56] instances: a cleared slot .* needs 2")


def test_an_output_has_one_slot(good):
    """Found by the corpus: with two, its writer would clear memory behind the output's end."""
    refused(with_tensor(good, "embed.out", incarnations=2), "embed.out: 2 incarnations of an output, which has one")


def test_an_output_of_every_layer_has_one_slot():
    """The search gave it two."""
    out, x = Tensor(name="out", width=128, output=True), Tensor(name="x", width=128, carried=True)
    parts = [Part(weights=("w",), rows=128, writes=(name,)) for name in ("x", "out")]
    first = Phase(name="first", kind="map", segment=0, parts=(Part(weights=(), rows=128, writes=("x",)),), reads=(), row_reads=())
    loop = Phase(name="loop", kind="fold", segment=1, parts=tuple(parts), reads=("x",), row_reads=(), k=128)
    graph = make_graph([(1, [first]), (4, [loop])], [x, out])
    schedule = schedule_of(graph)
    assert schedule.tensor("out").incarnations == 1
    simulate(graph, schedule, 4)


def test_incarnations_that_would_never_be_used(good):
    refused(with_tensor(good, "x", incarnations=9), "x: 9 incarnations of 6 instances: the rest would never be used")


def test_one_incarnation_behind_counters():
    """Enough where the readers are done before the next write, too few where the writer reads the state itself."""
    schedule = schedule_of(tiny(), handoff="counter")
    verify_schedule(tiny(), with_tensor(schedule, "wq", incarnations=1), FEW)
    side = schedule_of(sandwich(), handoff="counter")
    refused(with_tensor(side, "x", incarnations=1), r"map\.2 in iteration 0 on worker \d writes to x's slot of instance 0", sandwich())


def test_two_incarnations_where_three_are_needed():
    schedules = [schedule_of(graph) for graph in each_order(parallel())]
    assert {s.order[-2]: s.tensor("x").incarnations for s in schedules} == {"wo": 3, "wd": 2}  # who adds x last reads it as it writes it
    for schedule in (s for s in schedules if s.tensor("x").incarnations == 3):
        fewer = with_tensor(schedule, "x", incarnations=2)
        refused(fewer, r"wo in iteration 0 on worker \d clears x's slot of instance 0, which wo", parallel())


def test_a_worker_that_may_run_ahead_of_its_own_event():
    """Phases that depend on nothing are held back by nothing: two iterations of one worker count as one of two workers."""
    graph = free_running()
    gpu = dataclasses.replace(H200, workers=3)
    schedule = schedule_of(graph, handoff="counter", gpu=gpu)
    assert schedule.plan("free").waits
    refused(with_plan(schedule, "free", waits=()), "free in iteration 1 on worker . may signal before free in iteration 0", graph, gpu)


def test_what_tensors_are(good):
    refused(with_tensor(good, "wq", handoff="epoch"), "wq: handed over by 'epoch', neither data nor counter")
    graph = tiny()
    early = tuple(dataclasses.replace(p, reads=("wo",)) if p.name == "wq+wk+wv" else p for p in graph.phases)
    refused(good, r"wq\+wk\+wv: reads wo before wo writes it", dataclasses.replace(graph, phases=early))
    late = tuple(dataclasses.replace(p, reads=("x", "wq")) if p.name == "embed" else p for p in graph.phases)
    refused(good, "embed: reads wq after its loop: only the last of 5 is left", dataclasses.replace(graph, phases=late))
    twice = tuple(
        dataclasses.replace(p, parts=(dataclasses.replace(p.parts[0], writes=("wo", "x")),)) if p.name == "wo" else p for p in graph.phases
    )
    refused(good, r"x: written by \['map', 'wo', 'wd'\], more than once", dataclasses.replace(graph, phases=twice))


# Shared memory.


def test_shared_memory_must_be_as_the_model_says(good):
    refused(dataclasses.replace(good, smem_bytes=good.smem_bytes - 1024), f"the schedule says {good.smem_bytes - 1024} bytes, the model")


def test_shared_memory_over_the_limit(good):
    more = 10
    large = dataclasses.replace(good, stages=good.stages + more, smem_bytes=good.smem_bytes + more * good.stage_bytes)
    refused(large, f"shared memory: {large.smem_bytes} bytes of h200's 232448:\n  ring ")


# What is accepted is safe.


def _mutated(draw: Any, schedule: Schedule) -> Schedule:
    """One random change to waits, fences, incarnations or hand-offs."""
    phase, tensor = draw(st.sampled_from(schedule.phases)), draw(st.sampled_from(schedule.tensors))
    kind = draw(st.sampled_from(["drop", "add", "fence", "incarnations", "handoff"]))
    if kind == "drop":
        dropped = draw(st.sampled_from(phase.waits)) if phase.waits else None
        return with_plan(schedule, phase.name, waits=tuple(w for w in phase.waits if w != dropped))
    if kind == "add":
        added = draw(st.sampled_from(schedule.phases)).name
        return with_plan(schedule, phase.name, waits=tuple(dict.fromkeys((*phase.waits, added))))
    if kind == "fence":
        return with_plan(schedule, phase.name, fence=not phase.fence)
    if kind == "incarnations":
        return with_tensor(schedule, tensor.name, incarnations=draw(st.integers(1, 3)))
    return with_tensor(schedule, tensor.name, handoff="counter" if tensor.handoff == "data" else "data")


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data(), graphs(), st.integers(1, 5), st.integers(1, 2), st.sampled_from(["data", "counter"]))
def test_accepted_schedules_neither_race_nor_hang(data, graph, workers, batch, handoff):
    gpu = dataclasses.replace(H200, workers=workers)
    schedule = schedule_of(graph, handoff=handoff, batch=batch, gpu=gpu)
    for _ in range(data.draw(st.integers(0, 3))):
        schedule = _mutated(data.draw, schedule)
    try:
        verify_schedule(graph, schedule, gpu)
    except ScheduleError:
        return
    simulate(graph, schedule, 4)


@pytest.mark.parametrize("graph", [tiny, parallel, sandwich], ids=["tiny", "parallel", "sandwich"])
@pytest.mark.parametrize("handoff", ["data", "counter"])
def test_decoders_survive_simulation(graph, handoff):
    simulate(graph(), schedule_of(graph(), handoff=handoff, batch=2), 3)


def test_the_simulation_does_find_what_the_proof_refuses():
    """Or surviving it would mean nothing. A missing fence needs an unlucky store, so more runs."""
    counters, data = schedule_of(tiny(2), handoff="counter"), schedule_of(tiny(3))
    with pytest.raises(Race):
        simulate(tiny(2), with_plan(counters, "wo", waits=()), 20)
    with pytest.raises((Race, Hang)):
        simulate(parallel(), with_tensor(schedule_of(each_order(parallel())[0]), "x", incarnations=2), 20)
    with pytest.raises((Race, Hang)):
        unfenced = dataclasses.replace(data, phases=tuple(dataclasses.replace(p, fence=False) for p in data.phases))
        simulate(tiny(3), unfenced, 60)
