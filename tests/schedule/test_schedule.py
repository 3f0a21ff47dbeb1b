"""A whole schedule: frozen data that prints, goes through JSON and answers questions about its phases and tensors."""

import dataclasses
import json

import pytest
from oracle.graphs import tiny

from mkdsl.graph import Tensor
from mkdsl.schedule import AttentionPlan, FoldPlan, Handoff, MapPlan, Schedule, TensorPlan, narrowest

TASKS = (((0, 1), (1, 1)),)
PHASES = (
    MapPlan(name="map", tasks=TASKS, waits=(), rows=64),
    FoldPlan(name="wq", tasks=TASKS, waits=("map",), split_k=4, tile_k=32, cluster=2),
    AttentionPlan(name="attention", tasks=TASKS, waits=("wq",), fence=True, block=64, splits=2, cluster=2),
)
SCHEDULE = Schedule(
    target="h200", batch=3, padded_batch=4, workers=2, num_stages=6, stage_bytes=16384, max_in_flight=3, smem_bytes=123456, phases=PHASES,
    tensors=(
        TensorPlan(name="x"),
        TensorPlan(name="wq", handoff=Handoff.RELEASE_ACQUIRE, incarnations=1),
        TensorPlan(name="attention", splits=2),
    ),
    predicted_us=12.3, us=(("map", 0.5), ("wq", 2.25), ("attention", 3.0)),
)  # fmt: skip


def test_json_round_trip():
    found = Schedule.from_json(json.loads(json.dumps(SCHEDULE.to_json())))
    assert found == SCHEDULE
    assert [type(p) for p in found.phases] == [MapPlan, FoldPlan, AttentionPlan]
    assert [type(t.handoff) for t in found.tensors] == [Handoff] * 3


def test_a_hand_off_that_there_is_none_of():
    data = SCHEDULE.to_json()
    data["tensors"][0]["handoff"] = "epoch"
    with pytest.raises(ValueError, match="epoch"):
        Schedule.from_json(data)


def test_print():
    assert str(SCHEDULE).splitlines() == [
        "h200, batch 3, 2 workers: 12 us predicted",
        "  ring: 6 x 16384 bytes, 3 in flight; 123456 bytes of shared memory",
        "  map: 64 rows, 0.5 us",
        "  wq: 16 rows x split_k 4, tile_k 32, epilogue of 1, mma, cluster 2, 2.2 us",
        "  attention: blocks of 64, splits 2, cluster 2, 3.0 us",
    ]


def test_as_part_of_something_it_is_one_line():
    assert repr(SCHEDULE) == "<Schedule for h200: 3 phases, batch 3, 2 workers, 6 stages of 16384 bytes, 12 us predicted>"
    assert dataclasses.replace(SCHEDULE) == SCHEDULE and hash(SCHEDULE) == hash(dataclasses.replace(SCHEDULE))


def test_phases_and_tensors_by_name():
    assert SCHEDULE.plan("wq") is PHASES[1]
    assert SCHEDULE.tensor("attention").splits == 2
    assert SCHEDULE.order == ("map", "wq", "attention")
    assert SCHEDULE.cluster == 2


def test_phase_by_phase_everybody_folds_alone():
    alone = SCHEDULE.phased()
    assert alone.cluster == 1
    assert [p.alone() for p in SCHEDULE.phases] == list(alone.phases)
    assert dataclasses.replace(alone, phases=PHASES) == SCHEDULE


def test_older_rows_are_asked_for_ahead_of_time_only_if_they_prove_themselves():
    graph = tiny(3)
    wd = graph.phase("wd")
    assert wd.row_reads == ("wo",)
    for handoff in Handoff:
        schedule = dataclasses.replace(SCHEDULE, tensors=(TensorPlan(name="wo", handoff=handoff),))
        assert schedule.preloads(wd) == handoff.self_validating


# Tensors.


def test_hand_offs():
    assert [(h, h.self_validating, h.releases, h.other) for h in Handoff] == [
        ("sentinel", True, False, "release-acquire"),
        ("release-acquire", False, True, "sentinel"),
    ]


def test_a_tensor_crosses_in_bfloat16_only_where_all_round_to_it():
    rounded, exact = Tensor(name="a", width=64, rounds=True), Tensor(name="b", width=64)
    assert narrowest(rounded, 1) == "bfloat16"
    assert narrowest(rounded, 2) == narrowest(exact, 1) == "float32"  # partial results are merged before anybody rounds
    assert [TensorPlan(name="a", dtype=d).itemsize for d in ("bfloat16", "float32")] == [2, 4]
