"""What one worker does in one execution of a phase, in microseconds."""

import dataclasses

import pytest
from oracle.graphs import llama_1b, sandwich

from mkdsl.graph import AttentionPhase, FoldPhase, OpGraph, Phase
from mkdsl.schedule import AttentionPlan, FoldPlan, MapPlan, PhasePlan, Profile, profile
from mkdsl.simulate import Work, Workload

H200 = profile("h200")
LLAMA = llama_1b()
WD = FoldPlan(name="wd", tasks=(), waits=(), split_k=8, tile_k=128)
ATTENTION = AttentionPlan(name="attention", tasks=(), waits=(), block=128)


def work(plan: PhasePlan, *counts: int, batch: int = 1, gpu: Profile = H200, graph: OpGraph = LLAMA, phase: Phase | None = None) -> Work:
    return Workload(graph, batch, batch, gpu).of(phase or graph.phase(plan.name), plan, counts, {})


# Folds.


def test_a_worker_streams_its_tiles():
    """2 tiles of 8 rows x 8192 features in units of 64 mma rows x 128."""
    found = work(WD, 2)
    assert (found.units, found.unit_bytes) == (2 * 8192 // 8 // 128, 64 * 128 * 2)
    assert found.streamed_bytes == found.unit_bytes


def test_two_matrices_of_a_part_are_streamed_both():
    plan = FoldPlan(name="wg·wu", tasks=(), waits=(), split_k=8, tile_k=128)
    assert work(plan, 3).units == 3 * 2 * 2048 // 8 // 128


def test_short_box_rows_take_longer_than_their_bytes():
    """128 bytes where the profile asks for 180."""
    found = work(dataclasses.replace(WD, tile_k=64), 2)
    assert found.streamed_bytes == pytest.approx(found.unit_bytes * 180 / 128)


def test_wgmma_is_slower_for_few_columns_and_quicker_for_many():
    unit_us = {
        (batch, name): work(dataclasses.replace(WD, instruction=name), 2, batch=batch).unit_us
        for batch in (1, 16)
        for name in ("mma", "wgmma")
    }
    assert unit_us[1, "mma"] < unit_us[1, "wgmma"] and unit_us[16, "mma"] > unit_us[16, "wgmma"]


def test_several_epilogues_and_k_stages_are_runs_with_a_pause_before_each():
    """5 tiles, 2 an epilogue, in 2 K stages: 6 runs, and a longer pause where another epilogue comes between."""
    found = work(dataclasses.replace(WD, epilogue_tiles=2, k_stages=2), 5)
    pauses, units = zip(*found.runs, strict=True)
    assert len(found.runs) == 6 and sum(units) == found.units == 5 * 8
    assert pauses[0] == 0 and pauses[1] == pauses[3] == pauses[5] == H200.k_stage_us
    assert pauses[2] == pauses[4] > H200.k_stage_us + H200.next_epilogue_us
    assert found.pauses == sum(pauses)


def test_the_last_epilogue_takes_as_long_as_it_has_tiles():
    """A thread adds up the 8 pieces of K of each of its values: of one sequence 4 tiles of 8 rows are less than one value for each of 128
    threads, of 16 sequences each tile is one."""
    one, several = (work(dataclasses.replace(WD, epilogue_tiles=n), 4).after for n in (1, 4))
    assert one - H200.epilogue_us == pytest.approx(8 * H200.value_us)
    assert several == pytest.approx(one)
    many = [work(dataclasses.replace(WD, epilogue_tiles=n), 4, batch=16).after - H200.epilogue_us for n in (1, 2, 4, 8)]
    assert many == pytest.approx([8 * n * H200.value_us for n in (1, 2, 4, 4)])


def test_what_pairs_share_is_read_in_halves():
    """Of a phase's K each worker of a pair reads and folds half, for the items of both, and each has the other's sums soon after."""
    alone = FoldPlan(name="wd", tasks=(), waits=(), split_k=1, tile_k=128)
    one, pair = work(alone, 1, batch=8), work(dataclasses.replace(alone, cluster=2), 2, batch=8)
    assert pair.units == one.units
    assert pair.read == pytest.approx(one.read / 2, rel=0.1)
    assert one.after < pair.after < one.after + 1


def test_a_hand_off_includes_reading_a_little():
    """8 KiB, as when it was measured: more than the 2048 features in bfloat16 that `wo` reads of one sequence."""
    plan = FoldPlan(name="wo", tasks=(), waits=(), split_k=8, tile_k=128)
    gpu = dataclasses.replace(H200, load_us=0.0)
    assert work(plan, 1, gpu=gpu).read == 0
    assert work(plan, 1, gpu=gpu, batch=8).read == pytest.approx((8 * 2048 * 2 - 8192) / H200.l2_rate * 1e6)


# Attention.


def test_attention_streams_keys_and_values_block_by_block():
    phase = LLAMA.phase("attention")
    assert isinstance(phase, AttentionPhase)
    found = work(ATTENTION, 3)
    assert found.runs[0] == (0.0, 2 * 512 // 128) and len(found.runs) == 3
    assert [pause for pause, _ in found.runs[1:]] == [H200.attention_us] * 2
    assert found.units * found.unit_bytes == 3 * 2 * 512 * 64 * 2


def test_splits_and_clusters_share_the_blocks():
    """Of 4: half each, and of 3 splits the longest."""
    units = [work(dataclasses.replace(ATTENTION, splits=s, cluster=c), 1).units for s, c in ((1, 1), (2, 1), (1, 2), (2, 2), (3, 1))]
    assert units == [8, 4, 4, 2, 4]


def test_a_sliding_window_is_all_that_is_streamed():
    phase = dataclasses.replace(LLAMA.phase("attention"), window=256)
    assert work(ATTENTION, 1, phase=phase).units == 2 * 256 // 128


# Maps, and what no phase can be.


def test_a_map_that_reduces_reads_as_long_as_a_prologue_does():
    """Of whole vectors, in the same rows."""
    graph, gpu = sandwich(), dataclasses.replace(H200, l2_rate=1e15)
    for batch in (1, 8, 16):
        reduced = work(MapPlan(name="map.2", tasks=(), waits=(), rows=64, split_k=8), 1, batch=batch, gpu=gpu, graph=graph)
        staged = work(FoldPlan(name="wg·wu", tasks=(), waits=(), split_k=8, tile_k=16), 1, batch=batch, gpu=gpu, graph=graph)
        assert reduced.read == pytest.approx(staged.read) and staged.read > 0


def test_a_map_streams_nothing():
    found = work(MapPlan(name="map", tasks=(), waits=(), rows=64), 3)
    assert (found.units, found.unit_bytes, found.read) == (0, 0, 0)
    assert found.pauses == 2 * H200.next_epilogue_us


def test_a_plan_of_another_kind():
    phase = LLAMA.phase("wd")
    assert isinstance(phase, FoldPhase)
    with pytest.raises(TypeError, match="wd: a MapPlan for a FoldPhase"):
        work(MapPlan(name="wd", tasks=(), waits=(), rows=64), 1, phase=phase)
