"""The candidates of one phase: which tiles there are, how much of them the busiest worker has, and that all of them are legal."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import LAW
from oracle.graphs import attention_only, graphs, llama_1b, make_graph
from oracle.sources import with_workers

from mkdsl.graph import AttentionPhase, FoldPhase, MapPhase, OpGraph, Part, Phase, Tensor
from mkdsl.proof._legality import check_plan
from mkdsl.schedule import KIB, AttentionPlan, FoldPlan, MapPlan, Profile, Schedule, TensorPlan, attention_extents, fold_extents, profile
from mkdsl.search import RINGS, rings
from mkdsl.search._assign import assign_all
from mkdsl.search._candidates import Candidate, busiest_counts, candidates, epilogue_tiles, may_split, padded, tiles_of

H200 = profile("h200")


def of(graph: OpGraph, phase: Phase, gpu: Profile, *, batch: int = 1, stage_bytes: int = 32768) -> list[Candidate]:
    return candidates(
        graph, phase, batch=batch, stage_bytes=stage_bytes, workers=gpu.workers, smem_bytes=gpu.smem_bytes, clusters=gpu.sizes,
        instructions=gpu.instructions,
    )  # fmt: skip


# Tiles.


@pytest.mark.parametrize(
    ("stage_k", "stage_bytes", "tiles"),
    [(256, 32768, [256]), (1024, 32768, [256]), (1024, 16384, [128]), (576, 32768, [64]), (576, 36864, [192]), (288, 24576, [96]),
     (144, 36864, [144]), (1792, 28672, [128, 224]), (448, 28672, [64, 224]), (48, 32768, [16]), (16, 32768, [16]), (8, 32768, [])],
)  # fmt: skip
def test_tiles_divide_a_k_stage_and_fill_a_stage_of_the_ring(stage_k: int, stage_bytes: int, tiles: list[int]):
    assert tiles_of(stage_k, stage_bytes) == tiles


def test_tiles_of_wider_weights_are_half_as_long():
    assert tiles_of(1024, 32768, itemsize=4) == [128]


@pytest.mark.parametrize(("batch", "columns"), [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (16, 16)])
def test_batches_are_padded_to_powers_of_two(batch: int, columns: int):
    assert padded(batch) == columns


def test_as_many_tiles_are_finished_together_as_there_is_room_for():
    """Of 8 tiles of 2 matrices for 16 sequences, 8 KiB of sums each: 2; and all, where a resident in K stages would be staged anew."""
    part = Part(weights=("gate", "up"), rows=64 * 16, writes=("u",))
    phase = FoldPhase(name="f", segment=0, parts=(part,), reads=(), row_reads=(), k=1024)
    plan = FoldPlan(name="f", tasks=(), waits=(), tile_k=128)
    assert epilogue_tiles(phase, plan, 16, 2) == [2]
    assert epilogue_tiles(phase, dataclasses.replace(plan, k_stages=2), 16, 2) == [8, 2]
    assert epilogue_tiles(phase, plan, 1, 2) == [8]


@pytest.mark.parametrize(("aligned", "split_ks"), [(8, {1, 2, 4, 8}), (4, {2, 4, 8}), (1, {8})])
def test_weights_are_taken_where_they_are(aligned: int, split_ks: set[int]):
    """What a copy engine cannot count in whole blocks would have to be copied in each step, such as 32,003 rows in less than 8 pieces."""
    part = Part(weights=("out",), rows=32_064, writes=("y",))
    phase = FoldPhase(name="f", segment=0, parts=(part,), reads=(), row_reads=(), k=2048, aligned=aligned)
    found = of(make_graph([(1, [phase])], [Tensor(name="y", width=32_064, output=True)]), phase, H200)
    assert {c.plan.split_k for c in found} == split_ks


def test_rows_that_must_be_copied_may_be_cut_in_any_way():
    part = Part(weights=("out",), rows=32_064, writes=("y",))
    phase = FoldPhase(name="f", segment=0, parts=(part,), reads=(), row_reads=(), k=320, aligned=1)
    found = of(make_graph([(1, [phase])], [Tensor(name="y", width=32_064, output=True)]), phase, H200, stage_bytes=30 * KIB)
    assert {c.plan.split_k for c in found} == {1, 2, 4}


def attention_of(context: int = 128, head_dim: int = 64) -> tuple[OpGraph, AttentionPhase]:
    graph = attention_only()
    changed = {"attention": dataclasses.replace(graph.phase("attention"), context=context, head_dim=head_dim)}
    graph = dataclasses.replace(graph, phases=tuple(changed.get(p.name, p) for p in graph.phases))
    phase = graph.phase("attention")
    assert isinstance(phase, AttentionPhase)
    return graph, phase


@pytest.mark.parametrize(("context", "blocks"), [(1024, {64, 128, 256}), (1000, {64, 128, 256}), (200, {64, 128, 256}), (192, {64, 192})])
def test_a_cache_need_not_end_with_a_whole_block(context: int, blocks: set[int]):
    graph, phase = attention_of(context=context)
    assert {c.plan.block for c in of(graph, phase, H200)} == blocks


def test_stages_are_whole_blocks_of_any_head():
    assert rings(llama_1b()) == RINGS
    odd, _ = attention_of(head_dim=80)
    assert {ring.stage_bytes % (16 * 80) for ring in rings(odd)} == {0}
    assert all(ring.stage_bytes % KIB == 0 for ring in rings(odd))


# All of a phase.


@settings(LAW, max_examples=40)
@given(graphs(), st.integers(1, 12), st.sampled_from([1, 3, 8, 16]), st.sampled_from([16384, 24576, 32768]))
def test_every_candidate_is_legal_and_no_two_are_alike(graph: OpGraph, workers: int, batch: int, stage_bytes: int):
    gpu = with_workers(workers)
    tensors = tuple(TensorPlan(name=name) for name in graph.tensors)
    schedule = Schedule(
        target="", batch=batch, padded_batch=padded(batch), workers=workers, num_stages=2, stage_bytes=stage_bytes, max_in_flight=2,
        smem_bytes=0, phases=(), tensors=tensors, predicted_us=0.0, us=(),
    )  # fmt: skip
    for phase in graph.phases:
        found = of(graph, phase, gpu, batch=batch, stage_bytes=stage_bytes)
        assert len({c.plan for c in found}) == len(found)
        for candidate in found:
            check_plan(graph, dataclasses.replace(schedule, phases=(candidate.plan,)), phase, gpu)


@settings(LAW, max_examples=40)
@given(graphs(), st.integers(4, 12), st.sampled_from([1, 3, 16]))
def test_candidates_know_their_tasks_before_these_are_assigned(graph: OpGraph, workers: int, batch: int):
    """Items of the busiest worker and cluster, and shared memory: never less than it turns out to be."""
    for phase in graph.phases:
        for c in of(graph, phase, with_workers(workers), batch=batch):
            alone = make_graph([(1, [dataclasses.replace(phase, segment=0)])], list(graph.tensors.values()))
            (plan,) = assign_all(alone, [c.plan], batch=batch, workers=workers)
            busiest = tuple(max(n for _, n in part) for part in plan.tasks)
            assert busiest == c.busiest
            if isinstance(plan, FoldPlan) and isinstance(phase, FoldPhase):
                extents = fold_extents(phase, plan, plan.slots(phase), plan.sets, padded(batch))
            elif isinstance(plan, AttentionPlan) and isinstance(phase, AttentionPhase):
                extents = attention_extents(phase, plan, plan.sets)
            else:
                extents = ()
            assert sum(e.total for e in extents) <= c.bytes


def test_only_what_leaves_room_for_two_stages():
    gpu = dataclasses.replace(H200, smem_bytes=90_000)
    every, few = (of(llama_1b(), llama_1b().phase("wd"), g, batch=16) for g in (H200, gpu))
    assert {c.plan for c in few} < {c.plan for c in every}
    assert all(c.bytes <= 90_000 - 2 * 32768 for c in few)


# Folds.


def test_the_resident_of_a_large_model_is_split():
    """For 8 sequences the 14336 features of a `wd` would take 224 KiB, which leaves no room for a ring."""
    phase = dataclasses.replace(llama_1b().phase("wd"), k=14336)
    assert 8 * phase.k * 2 == 224 * KIB
    found = [c.plan for c in of(llama_1b(), phase, H200, batch=8, stage_bytes=16384)]
    assert found and all(p.k_stages > 1 or p.cluster > 1 for p in found)


def test_a_users_fold_takes_whole_rows_without_tensor_cores():
    phase = dataclasses.replace(llama_1b().phase("wd"), parallel=False)
    found = {(c.plan.split_k, c.plan.k_stages, c.plan.cluster, c.plan.instruction) for c in of(llama_1b(), phase, H200)}
    assert found == {(1, 1, 1, "mma")}


def test_k_is_split_in_time_or_in_space():
    plans = [c.plan for c in of(llama_1b(), llama_1b().phase("wd"), H200)]
    assert {(p.k_stages > 1, p.cluster > 1) for p in plans} == {(False, False), (True, False), (False, True)}


def test_no_cluster_shares_a_prologue_that_must_be_complete_first():
    phase = dataclasses.replace(llama_1b().phase("wd"), separable=False)
    assert {c.plan.cluster for c in of(llama_1b(), phase, H200)} == {1}


def test_wgmma_is_a_choice_where_the_gpu_has_it():
    for name, instructions in (("h200", {"mma", "wgmma"}), ("l20", {"mma"}), ("b200", {"mma"})):
        assert {c.plan.instruction for c in of(llama_1b(), llama_1b().phase("wd"), profile(name), stage_bytes=16384)} == instructions


def test_no_clusters_after_a_phase_that_signals_nothing():
    """Nobody could wait until it is done with its shared memory."""
    x = Tensor(name="x", width=128)
    first = MapPhase(name="first", segment=0, parts=(Part(weights=(), rows=128, writes=("x",)),), reads=(), row_reads=())
    heads: list[Phase] = [
        FoldPhase(name=n, segment=1, parts=(Part(weights=("w",), rows=128, writes=(f"{n}.out",)),), reads=("x",), row_reads=(), k=128)
        for n in ("one", "two")
    ]
    graph = make_graph([(1, [first]), (1, heads)], [x, *(Tensor(name=f"{n}.out", width=128, output=True) for n in ("one", "two"))])
    assert [{c.plan.cluster for c in of(graph, p, with_workers(4), batch=8)} for p in heads] == [{1, 2}, {1}]


# Attention and maps.


def test_attention_is_split_by_powers_of_two_and_by_what_fills_the_workers():
    """512 positions in blocks of 64, of 8 kv heads on 44 workers: 8 x 5 items are as many as there are workers for, 8 x 11 more than blocks."""
    graph = llama_1b()
    plans = [c.plan for c in of(graph, graph.phase("attention"), with_workers(44))]
    assert {p.splits for p in plans if isinstance(p, AttentionPlan) and p.block == 64 and p.cluster == 1} == {1, 2, 4, 5, 8}
    assert all(512 % p.block == 0 and p.splits * p.cluster <= 512 // p.block for p in plans if isinstance(p, AttentionPlan))


def test_only_a_folds_resident_merges_splits():
    assert may_split(llama_1b(), "attention")
    graph = attention_only()  # a map adds its rows
    assert not may_split(graph, "attention")
    assert {c.plan.splits for c in of(graph, graph.phase("attention"), H200)} == {1}


def test_an_item_for_each_cluster_first():
    """4 items of attention on 4 workers: one for each, or of pairs two for each pair; 2 items: one for each pair."""
    phase = dataclasses.replace(llama_1b().phase("attention"), heads=4, kv_heads=2)
    for batch, splits, want in ((1, 1, (1, 1)), (1, 2, (1, 2)), (2, 2, (2, 4))):
        plan = AttentionPlan(name="attention", tasks=(), waits=(), block=64, splits=splits, cluster=2)
        assert (busiest_counts(phase, plan, batch, 4)[0], busiest_counts(phase, plan, batch, 4, 2)[0]) == want


def test_maps_have_items_of_64_rows_and_twice_that():
    graph = llama_1b()
    found = [c.plan for c in of(graph, graph.phase("map"), H200)]
    assert found == [MapPlan(name="map", tasks=(), waits=(), rows=64 << i, split_k=8) for i in range(6)]
