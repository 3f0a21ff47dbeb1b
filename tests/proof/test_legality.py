"""Tiles that a phase cannot have are refused, each kind of phase by its own rules."""

import dataclasses
from typing import Any

import pytest
from oracle.graphs import make_graph, map_of, tiny
from oracle.mutations import with_plan, with_tensor
from refusals import FEW, refused, schedule_of, with_phase

from mkdsl.graph import AttentionPhase, FoldPhase, OpGraph, Part, Phase, Tensor
from mkdsl.proof import Rule, verify_schedule
from mkdsl.schedule import MapPlan, Schedule


@pytest.fixture(scope="module")
def good() -> Schedule:
    return schedule_of(tiny())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("split_k", 3),
        ("split_k", 16),  # found by the corpus: 64 rows of the mma may be 4 x 16, but no sequence has 16 columns
        ("split_k", 0),
        ("tile_k", 48),  # does not divide k
        ("tile_k", 0),
        ("tile_k", -64),
        ("tile_k", 8),  # half an mma step
        ("k_stages", 3),
        ("k_stages", 0),
        ("epilogue_tiles", 0),
    ],
)
def test_folds(good: Schedule, field: str, value: int) -> None:
    message = refused(with_plan(good, "wo", **{field: value}), Rule.TILE)
    assert message.startswith("wo: ")
    assert f"{field}={value}" in message


@pytest.mark.parametrize(("field", "value"), [("block", 96), ("block", 0), ("splits", 3), ("splits", 0)])
def test_attentions(good: Schedule, field: str, value: int) -> None:
    message = refused(with_plan(good, "attention", **{"block": 64, "splits": 1, field: value}), Rule.TILE)
    assert message.startswith("attention: ")
    assert f"{field}={value}" in message


@pytest.mark.parametrize(("field", "value"), [("rows", 32), ("rows", 0), ("rows", 192), ("split_k", 0), ("split_k", 3), ("split_k", 16)])
def test_maps(good: Schedule, field: str, value: int) -> None:
    """Its split_k was found by the corpus: a map reduces what it reads in as many pieces."""
    message = refused(with_plan(good, "map", **{field: value}), Rule.TILE)
    assert message.startswith("map: ")
    assert f"{field}={value}" in message


def test_the_message_says_what_a_phase_has_and_what_it_may(good: Schedule) -> None:
    split_k = good.plan("wo").split_k
    assert refused(with_plan(good, "wo", split_k=3), Rule.TILE) == "wo: split_k=3: a tile has 1, 2, 4, 8"
    assert refused(with_plan(good, "wo", split_k=split_k, tile_k=48, k_stages=1), Rule.TILE) == (
        f"wo: split_k={split_k} x cluster=1 x k_stages=1 x tile_k=48 do not divide k=256"
    )
    assert refused(with_plan(good, "attention", block=96), Rule.TILE) == "attention: block=96 is no multiple of 64"


@pytest.mark.parametrize("name", ["map", "wo", "attention"])
def test_a_plan_of_another_kind(good: Schedule, name: str) -> None:
    plan = good.plan(name)
    source = good.plan("wo" if name != "wo" else "map")
    other = dataclasses.replace(source, name=name, tasks=plan.tasks, waits=plan.waits, fence=plan.fence)
    schedule = dataclasses.replace(good, phases=tuple(other if p is plan else p for p in good.phases))
    assert refused(schedule, Rule.TILE) == f"{name}: has the plan of a {other.kind}, but is a {plan.kind}"


def test_a_unit_must_fit_a_stage(good: Schedule) -> None:
    unit = 128 * good.plan("wq+wk+wv").tile_k
    message = refused(dataclasses.replace(good, stage_bytes=4096), Rule.STAGE)
    assert message == f"wq+wk+wv: a unit of {unit} bytes does not fit a stage of 4096"
    refused(dataclasses.replace(good, stage_bytes=16384 + 1024), Rule.STAGE)  # no whole blocks of 8 rows


# Folds that take whole rows.


@pytest.fixture(scope="module")
def whole() -> OpGraph:
    """A carry of wo's that goes from a row's first to its last element."""
    return with_phase(tiny(), "wo", parallel=False)


def test_whole_rows_are_not_split(whole: OpGraph) -> None:
    assert schedule_of(tiny()).plan("wo").split_k > 1
    refused(schedule_of(tiny()), Rule.TILE, whole)


@pytest.mark.parametrize("changes", [{"k_stages": 4}, {"cluster": 2}, {"split_k": 2}])
def test_whole_rows_are_not_folded_in_pieces(whole: OpGraph, changes: dict[str, int]) -> None:
    """The carry would begin anew with each of them."""
    assert "of a fold that takes whole rows" in refused(with_plan(schedule_of(whole), "wo", tile_k=64, **changes), Rule.TILE, whole)


# Instructions.


def test_instructions_that_there_are_not(good: Schedule) -> None:
    message = refused(with_plan(good, "wo", instruction="fma"), Rule.INSTRUCTION)
    assert message == "wo: instruction 'fma': h200 has mma, wgmma for it"


def test_wgmma_on_a_gpu_without_it(good: Schedule) -> None:
    by_wgmma = with_plan(good, "wo", instruction="wgmma")
    verify_schedule(tiny(), by_wgmma, FEW)
    refused(by_wgmma, Rule.INSTRUCTION, gpu=dataclasses.replace(FEW, capability=(8, 9)))


def test_wgmma_for_a_fold_that_no_tensor_core_computes(whole: OpGraph) -> None:
    refused(with_plan(schedule_of(whole), "wo", instruction="wgmma"), Rule.INSTRUCTION, whole)


# Splits of an attention.


def test_splits_that_their_writer_does_not_make(good: Schedule) -> None:
    splits = good.tensor("attention").splits
    refused(with_tensor(good, "attention", splits=splits + 1, dtype="float32"), Rule.SPLITS)


@pytest.mark.parametrize("kind", ["map", "fold"])
def test_splits_for_readers_that_do_not_merge(kind: str) -> None:
    graph = _read_after_attention(kind)
    schedule = schedule_of(graph)
    plan = schedule.plan("attn")
    assert plan.splits == 1
    split = with_plan(schedule, "attn", splits=2, tasks=(tuple((2 * f, 2 * n) for f, n in plan.tasks[0]),))
    message = refused(with_tensor(split, "a", splits=2), Rule.SPLITS, graph)
    assert message == "last: reads a, left in 2 splits; only a fold's resident merges splits"


def _read_after_attention(kind: str) -> OpGraph:
    """An attention whose result a map reads, or a fold adds."""
    x, a = Tensor(name="x", width=128, carried=True), Tensor(name="a", width=128, heads=2)
    attention = AttentionPhase(
        name="attn", segment=1, parts=(Part(weights=(), rows=128, writes=("a",)),), reads=("x",), row_reads=(), context=4096, heads=2,
        kv_heads=2, head_dim=64,
    )  # fmt: skip
    folded: dict[str, Any] = {"name": "last", "segment": 1, "parts": (Part(weights=("w",), rows=128, writes=("x",)),)}
    fold = FoldPhase(**folded, reads=("x",), row_reads=("a",), k=128)
    last: Phase = map_of("last", x, segment=1, reads=("a",)) if kind == "map" else fold
    return make_graph([(1, [map_of("first", x)]), (3, [attention, last])], [x, a], 4096)


def test_a_map_has_no_plan_of_a_fold() -> None:
    """What a kind has no use for cannot be said of it."""
    with pytest.raises(TypeError, match="tile_k"):
        MapPlan(name="map", rows=64, tasks=(), waits=(), tile_k=64)  # pyright: ignore[reportCallIssue]
