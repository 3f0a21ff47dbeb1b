"""The rules of execution that search, proof, simulator and kernel share, of a decoder of three layers.

Its state x is first written by `map`, then by `wd` in each iteration of the loop, and read by `wq+wk+wv`, `wo` (by rows) and after the loop by
`embed`, whose only result is an output.
"""

import dataclasses

import pytest
from oracle.graphs import tiny

from mkdsl.graph import OpGraph
from mkdsl.schedule import (
    Awaited,
    Handoff,
    Schedule,
    TensorPlan,
    awaited,
    clears,
    home,
    read_instance,
    releases,
    signals,
    written_instance,
)

LAYERS = 3


@pytest.fixture(scope="module")
def graph() -> OpGraph:
    return tiny(LAYERS)


def handed_over(graph: OpGraph, handoff: Handoff = Handoff.SENTINEL, **incarnations: int) -> Schedule:
    """A schedule of which these rules ask for its tensors only."""
    tensors = tuple(TensorPlan(name=name, handoff=handoff, incarnations=incarnations.get(name, 2)) for name in graph.tensors)
    return Schedule(
        target="", batch=1, padded_batch=1, workers=1, num_stages=2, stage_bytes=1, max_in_flight=1, smem_bytes=0, phases=(),
        tensors=tensors, predicted_us=0.0, us=(),
    )  # fmt: skip


# Instances.


def test_home_is_the_last_segment_that_writes(graph: OpGraph):
    assert [p.name for p in graph.writers["x"]] == ["map", "wd"]
    assert {name: home(graph, name) for name in ("x", "wo", "embed.out")} == {"x": 1, "wo": 1, "embed.out": 2}


def test_loop_state_is_written_for_the_next_iteration(graph: OpGraph):
    """Instance 0 before the loop, then 1 to 3."""
    assert written_instance(graph, "x", graph.phase("map"), 0) == 0
    assert [written_instance(graph, "x", graph.phase("wd"), i) for i in range(LAYERS)] == [1, 2, 3]


def test_what_stays_within_an_iteration_has_its_number(graph: OpGraph):
    assert [written_instance(graph, "wo", graph.phase("wo"), i) for i in range(LAYERS)] == [0, 1, 2]
    assert [read_instance(graph, "wo", graph.phase("wd"), i) for i in range(LAYERS)] == [0, 1, 2]


def test_every_read_is_of_the_instance_written_last(graph: OpGraph):
    assert [read_instance(graph, "x", graph.phase("wq+wk+wv"), i) for i in range(LAYERS)] == [0, 1, 2]
    assert read_instance(graph, "x", graph.phase("embed"), 0) == LAYERS


def test_the_last_instance_of_a_loop_that_is_cut_short(graph: OpGraph):
    assert read_instance(graph, "x", graph.phase("embed"), 0, repeats=2) == 2
    assert read_instance(graph, "x", graph.phase("wo"), 1, repeats=2) == 1


def test_what_is_read_is_what_was_written_last(graph: OpGraph):
    """Played step by step."""
    latest: dict[str, int] = {}
    for segment in graph.segments:
        for iteration in range(segment.repeats):
            for phase in map(graph.phase, segment.phases):
                assert all(read_instance(graph, t, phase, iteration) == latest[t] for t in (*phase.reads, *phase.row_reads))
                latest.update({t: written_instance(graph, t, phase, iteration) for t in phase.writes})


# Clears.


def test_sentinels_are_cleared_by_whoever_writes_next(graph: OpGraph):
    schedule = handed_over(graph)
    assert clears(graph, schedule, "x", graph.phase("wd"))
    assert not clears(graph, schedule, "x", graph.phase("map"))  # its one iteration is not the loop's


def test_nothing_to_clear_behind_a_release_or_in_a_single_slot(graph: OpGraph):
    assert not clears(graph, handed_over(graph, Handoff.RELEASE_ACQUIRE), "x", graph.phase("wd"))
    assert not clears(graph, handed_over(graph, x=1), "x", graph.phase("wd"))


# Events.


def test_phases_that_write_outputs_only_signal_nothing(graph: OpGraph):
    assert [p.name for p in graph.phases if not signals(graph, p)] == ["embed"]


def test_an_event_releases_if_one_tensor_needs_that(graph: OpGraph):
    """Of three that `wq+wk+wv` writes one suffices; outputs, which nobody in the kernel reads, never do."""
    schedule, released = handed_over(graph), handed_over(graph, Handoff.RELEASE_ACQUIRE)
    one = dataclasses.replace(
        schedule, tensors=tuple(dataclasses.replace(t, handoff=Handoff.RELEASE_ACQUIRE) if t.name == "wk" else t for t in schedule.tensors)
    )
    assert [p.name for p in graph.phases if releases(graph, one, p)] == ["wq+wk+wv"]
    assert not any(releases(graph, schedule, p) for p in graph.phases)
    assert [p.name for p in graph.phases if not releases(graph, released, p)] == ["embed"]


@pytest.mark.parametrize(
    ("phase", "before", "which"),
    [
        ("attention", "wq+wk+wv", Awaited.SAME),
        ("wd", "wo", Awaited.SAME),
        ("wq+wk+wv", "wd", Awaited.PREVIOUS),
        ("wd", "wd", Awaited.PREVIOUS),
        ("wq+wk+wv", "map", Awaited.LAST),
        ("embed", "wd", Awaited.LAST),
    ],
)
def test_which_iteration_is_waited_for(graph: OpGraph, phase: str, before: str, which: Awaited):
    assert awaited(graph, graph.phase(phase), graph.phase(before)) is which
