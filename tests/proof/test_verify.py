"""The proof refuses schedules whose structure, coverage, waits, tensors or memory are wrong, by the rule that they break."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from oracle.graphs import make_graph, map_of, parallel, tiny
from oracle.mutations import with_plan, with_tensor
from oracle.simulator import simulate
from oracle.sources import each_order
from refusals import FEW, refused, schedule_of, with_phase

from mkdsl.graph import FoldPhase, Part, Tensor
from mkdsl.proof import Rule, verify_schedule
from mkdsl.schedule import Handoff, Range, Schedule


@pytest.fixture(scope="module")
def good() -> Schedule:
    return schedule_of(tiny())


# Types and names: a schedule may come from a file.


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("predicted_us", float("nan")),
        ("predicted_us", -1.0),
        ("workers", 4.0),
        ("max_in_flight", True),
        ("phases", []),
        ("phases", None),
        ("tensors", ("x",)),
    ],
)
def test_fields_of_another_type(good: Schedule, field: str, value: object) -> None:
    assert refused(dataclasses.replace(good, **{field: value}), Rule.TYPE).startswith(f"{field} is {value}")


@pytest.mark.parametrize(
    ("phase", "field", "value"),
    [
        ("wo", "tasks", [[(0, 1)]]),
        ("wo", "tasks", (((0, 1.0),),)),
        ("wo", "tile_k", 64.0),
        ("wo", "instruction", None),
        ("wo", "waits", "attention"),
        ("wo", "fence", 1),
        ("attention", "block", True),
        ("map", "rows", "64"),
    ],
)
def test_plans_of_another_type(good: Schedule, phase: str, field: str, value: object) -> None:
    message = refused(with_plan(good, phase, **{field: value}), Rule.TYPE)
    assert message == f"{phase}: {field} is {value}, which is none that a schedule has"


@pytest.mark.parametrize(("field", "value"), [("incarnations", 2.0), ("handoff", "epoch"), ("handoff", "sentinel")])
def test_tensors_of_another_type(good: Schedule, field: str, value: object) -> None:
    refused(with_tensor(good, "wq", **{field: value}), Rule.TYPE)


def test_another_graphs_schedule(good: Schedule) -> None:
    refused(good, Rule.NAMES, parallel())


def test_a_phase_or_tensor_twice_or_never(good: Schedule) -> None:
    refused(dataclasses.replace(good, phases=(*good.phases, good.phases[-1])), Rule.NAMES)
    refused(dataclasses.replace(good, tensors=(*good.tensors, good.tensors[-1])), Rule.NAMES)
    refused(dataclasses.replace(good, tensors=good.tensors[1:]), Rule.NAMES)
    refused(dataclasses.replace(good, us=()), Rule.NAMES)


def test_the_order_in_which_a_schedule_lists_its_tensors_is_nothing(good: Schedule) -> None:
    verify_schedule(tiny(), dataclasses.replace(good, tensors=good.tensors[::-1]), FEW)


def test_an_order_of_phases_that_the_graph_does_not_have(good: Schedule) -> None:
    message = refused(dataclasses.replace(good, phases=good.phases[::-1]), Rule.NAMES)
    assert message == f"the graph's phases are {list(good.order)}, the schedule's {list(good.order[::-1])}"


def test_every_order_that_the_graph_has() -> None:
    """And what is safe in one order need not be in another."""
    for graph in each_order(parallel()):
        schedule = schedule_of(graph)
        verify_schedule(parallel(), schedule, FEW)
        simulate(parallel(), schedule)
        assert schedule.order == tuple(graph.order)


# The ring and the workers.


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"num_stages": 1}, Rule.RING),
        ({"max_in_flight": 0}, Rule.RING),
        ({"max_in_flight": 99}, Rule.RING),
        ({"stage_bytes": -16384}, Rule.RING),
        ({"workers": 5}, Rule.RESIDENT),
        ({"workers": 0}, Rule.RESIDENT),
        ({"padded_batch": 3}, Rule.BATCH),
        ({"batch": 0}, Rule.BATCH),
        ({"batch": 2}, Rule.BATCH),
        ({"batch": 17, "padded_batch": 32}, Rule.BATCH),
    ],
)
def test_ring_and_workers(good: Schedule, changes: dict[str, int], rule: Rule) -> None:
    message = refused(dataclasses.replace(good, **changes), rule)
    assert all(str(value) in message for value in changes.values())


# Coverage.


def with_range(schedule: Schedule, name: str, worker: int, change: Callable[[Range], Range]) -> Schedule:
    """With another range of a phase's first part."""
    first, *others = schedule.plan(name).tasks
    tasks = (*first[:worker], change(first[worker]), *first[worker + 1 :])
    return with_plan(schedule, name, tasks=(tasks, *others))


@pytest.mark.parametrize("items", [(-1, 0), (1 << 40, 0), (0, -1), (3, -3)])
def test_ranges_of_nothing(good: Schedule, items: Range) -> None:
    """The kernel reads them too: a table of int32 holds no 2**40."""
    refused(with_range(good, "map", 3, lambda _: items), Rule.COVERAGE)


def test_coverage(good: Schedule) -> None:
    tasks, tiles = good.plan("wo").tasks[0], good.plan("wo").split_k * 2
    assert sum(n for _, n in tasks) == tiles >= 4
    last = max(w for w, (_, n) in enumerate(tasks) if n)
    of, (begin, n), end = "wo, part 0 (wo): ", tasks[last], tasks[1][0]

    def message(worker: int, change: Callable[[Range], Range]) -> str:
        return refused(with_range(good, "wo", worker, change), Rule.COVERAGE)

    assert message(last, lambda r: (r[0], r[1] - 1)) == f"{of}nobody has items {tiles - 1} to {tiles - 1}"
    assert message(0, lambda r: (r[0], r[1] - 1)) == f"{of}nobody has items {end - 1} to {end - 1}; worker 1 begins at {end}"
    assert message(0, lambda r: (r[0], r[1] + 1)) == f"{of}workers 0 and 1 both have item {end}"
    assert message(last, lambda r: (r[0], r[1] + 1)) == f"{of}worker {last} has items {begin} to {begin + n} of {tiles}"
    message(0, lambda r: (r[0], -1))


def test_tasks_for_another_number_of_workers_or_parts(good: Schedule) -> None:
    refused(with_plan(good, "wo", tasks=(good.plan("wo").tasks[0][:-1],)), Rule.COVERAGE)
    refused(with_plan(good, "wo", tasks=()), Rule.COVERAGE)


# Waits.


@pytest.mark.parametrize("name", ["embed", "nothing"])
def test_waits_for_what_never_comes(good: Schedule, name: str) -> None:
    """A phase of a later segment, and none."""
    assert refused(with_plan(good, "wo", waits=(name,)), Rule.WAIT).startswith(f"wo: waits for {name}")


def test_a_wait_for_what_signals_nothing() -> None:
    graph, out = tiny(), Tensor(name="more.out", width=128, output=True)
    segments = (*graph.segments[:2], dataclasses.replace(graph.segments[2], phases=("embed", "more")))
    phases = (*graph.phases, map_of("more", out, segment=2, reads=("x",)))
    graph = dataclasses.replace(graph, phases=phases, segments=segments, tensors=graph.tensors | {out.name: out})
    message = refused(with_plan(schedule_of(graph), "more", waits=("embed",)), Rule.WAIT, graph)
    assert message == "more: waits for embed, which signals nothing: it writes outputs only"


# Tensors.


def test_what_a_tensor_crosses_as(good: Schedule) -> None:
    """bfloat16 only where that changes no bit: of what all readers round, and not of partial carries."""
    refused(with_tensor(good, "wo", dtype="bfloat16"), Rule.DTYPE)
    refused(with_tensor(good, "wg·wu", dtype="float16"), Rule.DTYPE)
    verify_schedule(tiny(), with_tensor(good, "wg·wu", dtype="float32"), FEW)
    assert good.tensor("attention").dtype == "bfloat16"
    message = refused(with_tensor(good, "attention", splits=2), Rule.DTYPE)
    assert message == "attention: crosses as bfloat16 in 2 splits, but is read as float32"


@pytest.mark.parametrize("tensor", ["x", "wq", "attention", "wo", "wg·wu"])
def test_one_incarnation_of_what_is_cleared(good: Schedule, tensor: str) -> None:
    refused(with_tensor(good, tensor, incarnations=1), Rule.INCARNATIONS)


def test_an_output_has_one_slot(good: Schedule) -> None:
    """Found by the corpus: with two, its writer would clear memory behind the output's end."""
    message = refused(with_tensor(good, "embed.out", incarnations=2), Rule.INCARNATIONS)
    assert message == "embed.out: 2 incarnations of an output, which has one"


def test_an_output_of_every_layer_has_one_slot() -> None:
    """The search gave it two."""
    out, x = Tensor(name="out", width=128, output=True), Tensor(name="x", width=128, carried=True)
    parts = tuple(Part(weights=("w",), rows=128, writes=(name,)) for name in ("x", "out"))
    loop = FoldPhase(name="loop", segment=1, parts=parts, reads=("x",), row_reads=(), k=128)
    graph = make_graph([(1, [map_of("first", x)]), (4, [loop])], [x, out])
    schedule = schedule_of(graph)
    assert schedule.tensor("out").incarnations == 1
    simulate(graph, schedule, 4)


def test_incarnations_that_would_never_be_used(good: Schedule) -> None:
    refused(with_tensor(good, "x", incarnations=9), Rule.INCARNATIONS)


def test_one_incarnation_behind_counters() -> None:
    """Enough where the readers are done before the next write."""
    schedule = schedule_of(tiny(), handoff=Handoff.RELEASE_ACQUIRE)
    verify_schedule(tiny(), with_tensor(schedule, "wq", incarnations=1), FEW)


@pytest.mark.parametrize(
    ("phase", "changes"),
    [
        ("wq+wk+wv", {"reads": ("wo",)}),  # before it is written
        ("embed", {"reads": ("x", "wq")}),  # after its loop, of which only the last iteration's is left
        ("wo", {"parts": (Part(weights=("wo",), rows=128, writes=("wo", "x")),)}),  # the state twice
        ("wo", {"parts": (Part(weights=("wo",), rows=64, writes=("wo",)),)}),  # not all of it
    ],
)
def test_who_writes_a_tensor_and_when(good: Schedule, phase: str, changes: dict[str, Any]) -> None:
    graph = with_phase(tiny(), phase, **changes)
    halved = with_plan(good, "wo", tasks=(((0, 0), (0, 0), (0, 0), (0, good.plan("wo").split_k)),))
    refused(halved if graph.phase("wo").rows == 64 else good, Rule.WRITER, graph)


# Shared memory.


def test_shared_memory_must_be_as_the_model_says(good: Schedule) -> None:
    message = refused(dataclasses.replace(good, smem_bytes=good.smem_bytes - 1024), Rule.SHARED_MEMORY)
    assert f"the schedule says {good.smem_bytes - 1024} bytes, the model" in message


def test_shared_memory_over_the_limit(good: Schedule) -> None:
    more = 10
    large = dataclasses.replace(good, num_stages=good.num_stages + more, smem_bytes=good.smem_bytes + more * good.stage_bytes)
    message = refused(large, Rule.SHARED_MEMORY)
    assert message.startswith(f"shared memory: {large.smem_bytes} bytes of h200's 232448:\n  ring ")
