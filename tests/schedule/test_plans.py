"""The plan of one phase, kind by kind: its items, its units, who takes part, and its way through JSON and into print."""

import dataclasses
import json

import pytest

from mkdsl.graph import AttentionPhase, FoldPhase, MapPhase, Part
from mkdsl.schedule import AttentionPlan, FoldPlan, MapPlan, PhasePlan
from mkdsl.schedule._phase_plans import plan_from_json

GATE_UP = Part(weights=("gate", "up"), rows=192, writes=("u",))
BIAS = Part(weights=("bias",), rows=64, writes=("b",))
FOLD = FoldPhase(name="fold", segment=0, parts=(GATE_UP, BIAS), reads=("x",), row_reads=(), k=512)
ATTENTION = AttentionPhase(
    name="attention", segment=0, parts=(Part(weights=(), rows=512, writes=("a",)),), reads=("q",), row_reads=(), context=256,
    heads=8, kv_heads=2, head_dim=64,
)  # fmt: skip
MAP = MapPhase(name="map", segment=0, parts=(Part(weights=(), rows=192, writes=("m",)),), reads=(), row_reads=("x",))

TASKS = (((0, 4), (4, 2), (6, 0), (6, 0)), ((0, 0), (0, 0), (0, 1), (1, 1)))
FOLD_PLAN = FoldPlan(name="fold", tasks=TASKS, waits=("map",), fence=True, split_k=2, tile_k=64, k_stages=2, epilogue_tiles=3)
ATTENTION_PLAN = AttentionPlan(name="attention", tasks=(((0, 6), (6, 6)),), waits=("fold",), block=64, splits=2, cluster=2)
MAP_PLAN = MapPlan(name="map", tasks=(((0, 3), (3, 3)),), waits=(), rows=64, split_k=8)
PLANS = [FOLD_PLAN, ATTENTION_PLAN, MAP_PLAN]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.kind)
def test_json_round_trip(plan: PhasePlan):
    text = json.dumps(plan.to_json())
    assert json.loads(text)["kind"] == plan.kind
    assert plan_from_json(json.loads(text)) == plan


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.kind)
def test_json_holds_only_what_is_decided_of_a_kind(plan: PhasePlan):
    assert set(plan.to_json()) == {"kind"} | {f.name for f in dataclasses.fields(plan)}
    assert ("tile_k" in plan.to_json(), "block" in plan.to_json()) == (plan.kind == "fold", plan.kind == "attention")


def test_decisions_that_a_kind_does_not_have():
    assert (MAP_PLAN.cluster, MAP_PLAN.splits, MAP_PLAN.epilogue_tiles) == (1, 1, 1)
    assert (FOLD_PLAN.splits, ATTENTION_PLAN.split_k, ATTENTION_PLAN.epilogue_tiles) == (1, 1, 1)
    with pytest.raises(TypeError, match="tile_k"):
        MapPlan(name="map", tasks=(), waits=(), rows=64, tile_k=64)  # pyright: ignore[reportCallIssue]


def test_how_a_phase_is_cut_in_print():
    assert FOLD_PLAN.tiling == "32 rows x 2, tile_k 64, k_stages 2, cluster 1, epilogue of 3, mma"
    assert ATTENTION_PLAN.tiling == "blocks of 64, splits 2, cluster 2"
    assert MAP_PLAN.tiling == "64 rows"


# Items and units.


def test_items_of_a_fold_are_tiles_for_all_sequences_together():
    assert FOLD_PLAN.rows == 32
    assert FOLD_PLAN.items(FOLD, 1) == FOLD_PLAN.items(FOLD, 8) == (6, 2)


def test_items_of_attention_are_sequences_times_kv_heads_times_splits():
    assert [ATTENTION_PLAN.items(ATTENTION, batch) for batch in (1, 3)] == [(4,), (12,)]
    assert dataclasses.replace(ATTENTION_PLAN, splits=1).items(ATTENTION, 3) == (6,)


def test_items_of_a_map_are_rows_of_each_sequence():
    assert [MAP_PLAN.items(MAP, batch) for batch in (1, 2)] == [(3,), (6,)]
    assert dataclasses.replace(MAP_PLAN, rows=192).items(MAP, 2) == (2,)


def test_a_unit_is_64_mma_rows_of_a_fold_or_a_block_of_keys_or_values():
    assert FOLD_PLAN.unit_bytes(FOLD) == 64 * 64 * 2
    assert FOLD_PLAN.unit_bytes(dataclasses.replace(FOLD, dtype="float32")) == 64 * 64 * 4
    assert ATTENTION_PLAN.unit_bytes(ATTENTION) == 64 * 64 * 2
    assert MAP_PLAN.unit_bytes(MAP) == 0


def test_k_is_split_within_a_tile_in_time_and_in_space():
    """512 elements: 2 pieces that lie under each other in a tile, then 2 K stages, or 2 workers of a cluster, each of 128 elements."""
    assert FOLD_PLAN.stage_k(FOLD) == 128
    assert dataclasses.replace(FOLD_PLAN, k_stages=1).stage_k(FOLD) == 256
    assert dataclasses.replace(FOLD_PLAN, k_stages=1, cluster=2).stage_k(FOLD) == 128


# Who takes part.


def test_workers_without_items_take_no_part():
    assert [FOLD_PLAN.count(0, worker) for worker in range(4)] == [4, 2, 0, 0]
    assert [FOLD_PLAN.folded(worker) for worker in range(4)] == [(4, 0), (2, 0), (0, 1), (0, 1)]
    idle = dataclasses.replace(FOLD_PLAN, tasks=(((0, 6), (6, 0), (6, 0)), ((0, 0), (0, 0), (0, 2))))
    assert idle.participants == (0, 2)


def test_a_cluster_folds_the_items_of_all_its_workers():
    plan = dataclasses.replace(FOLD_PLAN, k_stages=1, cluster=2, epilogue_tiles=1, tasks=(((0, 0), (0, 3), (3, 0), (3, 0)),))
    assert [plan.folded(worker) for worker in range(4)] == [(3,), (3,), (0,), (0,)]
    assert plan.participants == (0, 1)
    assert [list(plan.peers(worker)) for worker in range(4)] == [[0, 1], [0, 1], [2, 3], [2, 3]]


@pytest.mark.parametrize(
    ("tiles", "cluster", "several", "epilogues", "sets"),
    [(4, 1, False, 1, 1), (3, 1, True, 2, 1), (1, 1, True, 4, 1), (4, 2, False, 1, 2), (1, 2, True, 4, 4)],
)
def test_tiles_are_finished_in_epilogues(tiles: int, cluster: int, several: bool, epilogues: int, sets: int):
    """A worker has 4 tiles at most. Of a cluster each worker's sums are held; two epilogues in turn, if there are several."""
    plan = dataclasses.replace(FOLD_PLAN, epilogue_tiles=tiles, cluster=cluster)
    assert (plan.several_epilogues, plan.epilogues(0), plan.epilogues(1), plan.sets) == (several, epilogues, 1, sets)


def test_sums_that_one_worker_holds():
    """Of gate and up two matrices' for each tile; of several epilogues those of one."""
    assert dataclasses.replace(FOLD_PLAN, epilogue_tiles=4).slots(FOLD) == 8
    assert FOLD_PLAN.slots(FOLD) == 6
    both = dataclasses.replace(FOLD_PLAN, epilogue_tiles=4, tasks=(((0, 3), (3, 3)), ((0, 1), (1, 1))))
    assert both.slots(FOLD) == 3 * 2 + 1


def test_alone_a_worker_folds_in_time_what_its_cluster_shared():
    shared = dataclasses.replace(FOLD_PLAN, cluster=2, k_stages=1)
    assert (shared.alone().cluster, shared.alone().k_stages) == (1, 2)
    assert shared.alone().stage_k(FOLD) == shared.stage_k(FOLD)
    assert (ATTENTION_PLAN.alone().cluster, ATTENTION_PLAN.alone().splits) == (1, 2)
    assert MAP_PLAN.alone() == MAP_PLAN
