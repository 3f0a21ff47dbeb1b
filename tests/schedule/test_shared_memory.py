"""The shared-memory model: every buffer's size by hand, and where the peak is."""

import dataclasses
import itertools
from collections.abc import Callable

import pytest
from found import found
from oracle.graphs import llama_1b, make_graph, tiny

from mkdsl.graph import AttentionPhase, FoldPhase, MapPhase, OpGraph, Part
from mkdsl.schedule import (
    KIB,
    AttentionPlan,
    Extent,
    FoldPlan,
    MapPlan,
    Schedule,
    SharedMemory,
    attention_extents,
    columns,
    fixed_bytes,
    fold_extents,
    profile,
    shared_memory,
)
from mkdsl.schedule._shared_memory import fixed_extents

FOLD = FoldPhase(
    name="wd", segment=0, parts=(Part(weights=("wd",), rows=2048, writes=("x",)),), reads=("u",), row_reads=("wo",), k=8192, reductions=1
)
GATED = dataclasses.replace(FOLD, name="wg·wu", parts=(Part(weights=("wg", "wu"), rows=512, writes=("u",)),), row_reads=(), k=2048)
ATTENTION = AttentionPhase(
    name="attention", segment=0, parts=(Part(weights=(), rows=2048, writes=("a",)),), reads=("q",), row_reads=(), context=512, heads=32,
    kv_heads=8, head_dim=64,
)  # fmt: skip
MAP = MapPhase(name="map", segment=0, parts=(Part(weights=(), rows=64, writes=("m",)),), reads=(), row_reads=())
TILES = FoldPlan(name="wd", tasks=(((0, 2),),), waits=(), split_k=8, tile_k=128, epilogue_tiles=2)


def sizes(extents: tuple[Extent, ...]) -> dict[str, int]:
    assert all(e.depth == 1 and e.bytes % 1024 == 0 for e in extents)
    return {e.name: e.bytes for e in extents}


def memory_of(graph: OpGraph, schedule: Schedule) -> SharedMemory:
    s = schedule
    return shared_memory(graph, s.phases, padded_batch=s.padded_batch, num_stages=s.num_stages, stage_bytes=s.stage_bytes)


# Extents of one phase.


def test_columns():
    """(sequence, piece of K) pairs; the smallest right-hand side of an mma has 8."""
    assert [columns(batch, split_k) for batch, split_k in ((1, 1), (1, 8), (2, 4), (2, 8), (16, 8))] == [8, 8, 8, 16, 128]


def test_a_fold_for_one_sequence():
    """8 columns of 1024 features in bfloat16; 2 tiles of 64 rows of sums and 2 x 8 older rows in float32, rounded up to 1024 bytes."""
    assert sizes(fold_extents(FOLD, TILES, 2, 1, 1)) == {"resident": 8 * 1024 * 2, "sums": 1024, "added": 1024}


def test_a_fold_for_sixteen_sequences_cut_in_time_and_in_space():
    """64 columns of 2048 features: all of them 256 KiB, in 8 K stages 32 KiB, and half of it each for a pair."""
    whole = dataclasses.replace(TILES, split_k=4)
    late, shared = dataclasses.replace(whole, k_stages=8), dataclasses.replace(whole, cluster=2)
    found = [sizes(fold_extents(FOLD, plan, 2, plan.cluster, 16)) for plan in (whole, late, shared)]
    assert [f["resident"] // KIB for f in found] == [256, 32, 128]
    assert [f["sums"] // KIB for f in found] == [8, 8, 16]  # 2 tiles x 16 sequences x 64 rows, and from each of the pair
    assert [f["added"] // KIB for f in found] == [2, 2, 2]  # 16 sequences x 2 tiles x 16 rows


def test_a_fold_that_adds_no_rows():
    assert set(sizes(fold_extents(GATED, TILES, 4, 1, 1))) == {"resident", "sums"}


def test_attention():
    """8 columns, 4 of them of queries: in bfloat16 queries of 64 features and 128 probabilities, in float32 the result and scores."""
    plan = AttentionPlan(name="attention", tasks=(), waits=(), block=128)
    alone = {"queries": 1024, "probabilities": 2048, "result": 2048, "scores": 1024, "new k, v": 1024}
    assert sizes(attention_extents(ATTENTION, plan, 1)) == alone
    shared = dataclasses.replace(plan, cluster=2)
    assert sizes(attention_extents(ATTENTION, shared, 2)) == alone | {"received": 5 * 1024}  # 2 x 65 x 8 x 4, rounded up


def test_a_map_needs_nothing_of_its_own():
    graph = make_graph([(1, [MAP])], [])
    plan = MapPlan(name="map", tasks=(((0, 1),),), waits=(), rows=64)
    assert all(e.phase == "" for e in shared_memory(graph, [plan], padded_batch=1, num_stages=2, stage_bytes=KIB).extents)


# What lives for the whole kernel.


def test_the_ring_and_what_is_fixed():
    """Statistics: of one reduction 8 rows, and as much from each of a pair. Tasks: of two workers for both roles. Barriers: full and empty."""
    graph = make_graph([(1, [FOLD])], [])
    plan = dataclasses.replace(TILES, cluster=2, tasks=(((0, 2), (2, 2)),))
    memory = shared_memory(graph, [plan], padded_batch=1, num_stages=12, stage_bytes=16 * KIB)
    fixed = {e.name: (e.bytes, e.depth) for e in memory.by_phase[""] if e.name != "reserve"}
    assert fixed == {
        "ring": (16384, 12), "statistics": (2048, 1), "tasks": (2048, 1), "exchange": (1024, 1), "scratch": (2048, 1),
        "barriers": (2 * 12 * 8, 1),
    }  # fmt: skip


@pytest.mark.parametrize("reductions", [0, 1, 3])
def test_enough_is_set_aside_before_tiles_and_depth_are_known(reductions: int):
    graph = make_graph([(1, [dataclasses.replace(FOLD, reductions=reductions)])], [])
    for batch, cluster, split_k in itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8), (1, 2, 4, 8)):
        extents = fixed_extents(graph, [dataclasses.replace(TILES, cluster=cluster, split_k=split_k)], batch, 16)
        assert all(e.bytes > 0 for e in extents)
        assert sum(e.total for e in extents) == fixed_bytes(graph, batch, cluster)


# The peak.


def test_the_peak_is_the_phase_with_the_most_of_its_own():
    memory = SharedMemory(
        (Extent("ring", 100, 3), Extent("reserve", 7), Extent("a", 5, phase="p"), Extent("b", 6, 2, phase="q")), ("p", "q")
    )
    assert (memory.bytes_in("p"), memory.bytes_in("q")) == (312, 319)
    assert (memory.peak, memory.total, memory.allocated) == ("q", 319, 312)
    assert [e.name for e in memory.live("p")] == ["ring", "reserve", "a"]
    lines = str(memory).splitlines()
    assert "in p: 312 bytes" in lines[2] and not lines[2].endswith("peak") and lines[4] == "  in q: 319 bytes, the peak"
    assert lines[-1].split() == ["b", "6", "x", "2", "=", "12", "bytes"]


def test_of_equal_peaks_the_first():
    assert SharedMemory((Extent("a", 5, phase="p"), Extent("a", 5, phase="q")), ("p", "q")).peak == "p"


@pytest.mark.medium
@pytest.mark.parametrize(("model", "batch", "name"), [(tiny, 1, "h200"), (llama_1b, 1, "h200"), (tiny, 16, "l20")])
def test_of_schedules_that_are_found(model: Callable[[], OpGraph], batch: int, name: str):
    graph, gpu = model(), profile(name)
    schedule = found(graph, batch, gpu)
    memory = memory_of(graph, schedule)
    alone = {p.name: memory_of(graph, dataclasses.replace(schedule, phases=(p,))) for p in schedule.phases}
    for name, of_one in alone.items():
        assert [e for e in of_one.extents if e.phase] == memory.by_phase[name]
    most = max(schedule.order, key=lambda name: sum(e.total for e in memory.by_phase[name]))
    assert (memory.peak, memory.total) == (most, schedule.smem_bytes)
    assert memory.allocated < memory.total <= gpu.smem_bytes
