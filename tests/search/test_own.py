"""Rows that a worker keeps for a later finish of its own: what the search takes, what the proof refuses."""

import dataclasses
import json

import pytest
from search_graphs import long_chain, make_graph, tiny
from search_mutations import with_plan, with_tensor
from search_simulator import Race, simulate
from search_sources import with_workers

from mkdsl.graph import OpGraph, Part, Phase, Tensor
from mkdsl.search import Schedule, ScheduleError, explain, shared_memory, verify_schedule
from mkdsl.search._draft import with_memory
from mkdsl.search._order import Execution
from mkdsl.search._own import behind, edges, keeps, kept_rows, takes, with_own
from mkdsl.search._races import Accesses
from mkdsl.search._search import find

FEW = with_workers(4)


def refused(graph: OpGraph, schedule: Schedule, match: str) -> None:
    with pytest.raises(ScheduleError, match=match):
        verify_schedule(graph, schedule, FEW)


def raced(graph: OpGraph, schedule: Schedule) -> None:
    """What is refused does fail."""
    with pytest.raises(Race):
        simulate(graph, schedule, 1)


def fetched(schedule: Schedule) -> Schedule:
    """The same, with all rows from global memory."""
    return dataclasses.replace(schedule, phases=tuple(dataclasses.replace(p, own=()) for p in schedule.phases))


@pytest.fixture(scope="module")
def good() -> Schedule:
    """wd adds what wo wrote a phase before, and wo what wd wrote an iteration before."""
    schedule = find(tiny(), 2, FEW, "data")
    assert {p.name: p.own for p in schedule.phases if p.own} == {"wo": ("x",), "wd": ("wo",)}
    return schedule


def test_what_the_search_keeps_is_proven_and_survives(good):
    verify_schedule(tiny(), good, FEW)
    simulate(tiny(), good, 8)
    assert Schedule.from_json(json.loads(json.dumps(good.to_json()))) == good


def test_tasks_of_one_for_the_other(good):
    """Where a worker does not add what it wrote, either phase may take the other's tasks, as far as they are whole tiles."""

    def tasks(schedule: Schedule) -> list[tuple]:
        return [tuple(s.plan(name).tasks[0] for name in ("wo", "wd")) for s in with_own(graph, schedule, *edge)]

    graph, plain = tiny(), fetched(good)
    edge = graph.phase("wo"), graph.phase("wd"), "wo"
    alike = plain.plan("wo").tasks[0]
    other = (alike[1], alike[0], *alike[2:])
    swapped = with_plan(plain, "wd", tasks=(other,))
    assert tasks(plain) == [(alike, alike)]
    assert tasks(swapped) == [(alike, alike), (other, other)]
    one, small = ((0, 1), (0, 0), (0, 0), (0, 0)), good.plan("wo").rows
    assert tasks(with_plan(swapped, "wd", rows=128, tasks=(one,))) == [(((0, 128 // small), (0, 0), (0, 0), (0, 0)), one)]


def test_nothing_is_kept_where_there_is_no_room(good):
    full = dataclasses.replace(FEW, smem_bytes=with_memory(tiny(), fetched(good)).smem_bytes)
    schedule = find(tiny(), 2, full, "data")
    assert schedule.smem_bytes <= full.smem_bytes
    memory = shared_memory(tiny(), good.phases, padded_batch=2, stages=good.stages, stage_bytes=good.stage_bytes)
    assert [e.bytes for e in memory.by_phase[""] if e.name.startswith("kept ")] == [1024, 1024]
    assert not [e for e in memory.extents if e.name == "added"]
    memory = shared_memory(tiny(), fetched(good).phases, padded_batch=2, stages=good.stages, stage_bytes=good.stage_bytes)
    assert [e.phase for e in memory.extents if e.name == "added"] == ["wo", "wd"]


def test_explain_says_who_takes_them(good):
    lines = explain(tiny(), good, FEW, alternatives=False).splitlines()
    table = lines[lines.index("tensors:") + 1 :]
    assert table[0].endswith("own rows of")
    assert {line.split()[0]: line.split()[-1] for line in table[1:8] if line.split()[-1] != "-"} == {"wo": "wd", "x": "wo"}
    assert any(line.startswith("  kept x ") for line in lines)


def test_no_look_no_condition(good):
    """Of all iterations but the first, whose rows were written before the loop, wo's reads of x are none of global memory."""
    accesses = Accesses(Execution(tiny(), good), tiny().tensors["x"])
    assert [step.iteration for steps in accesses.reads.values() for step in steps if step.phase.name == "wo"] == [0]
    assert not [
        s for steps in Accesses(Execution(tiny(), good), tiny().tensors["wo"]).reads.values() for s in steps if s.phase.name == "wd"
    ]
    assert good.preloads(tiny().phase("wd")) and good.plan("wd").fetched(tiny().phase("wd")) == ()
    counter = with_tensor(good, "wo", handoff="counter")
    assert counter.preloads(tiny().phase("wd")) and not fetched(counter).preloads(tiny().phase("wd"))


def test_an_own_read_is_no_evidence_that_all_was_there(good):
    """Only who reads the whole of a tensor in global memory has seen its stores."""
    execution = Execution(tiny(), good)
    accesses = Accesses(execution, tiny().tensors["wo"])
    last = execution.of["wo"][-1]
    seen = accesses._seen_whole(0, last)
    accesses.reads = {n: [s for s in steps if s.phase.name != "wg·wu"] for n, steps in accesses.reads.items()}
    assert seen.any() and not accesses._seen_whole(0, last).any()


def test_names(good):
    x, wo = tiny().phase("wo"), tiny().phase("wd")
    assert behind(tiny(), x, "x") and not behind(tiny(), wo, "wo")
    assert [takes(tiny(), x, good.plan("wo"), "x", i) for i in (0, 1)] == [False, True]
    assert keeps(tiny(), good, wo) == {"x"} and keeps(tiny(), good, tiny().phase("map")) == set()
    assert kept_rows(tiny(), good.phases) == {
        name: max(n for _, n in good.plan("wo").tasks[0]) * good.plan("wo").rows for name in ("x", "wo")
    }
    assert [(w.name, r.name, t) for w, r, t in edges(tiny())] == [("wd", "wo", "x"), ("wo", "wd", "wo")]
    assert [(w.name, r.name, t) for w, r, t in edges(tiny(1))] == [("wo", "wd", "wo")]


# What is refused.


@pytest.mark.parametrize(("name", "own"), [("wo", ("x", "attention")), ("attention", ("wq",)), ("map", ("x",)), ("wd", ("nothing",))])
def test_rows_that_are_not_added(good, name, own):
    refused(tiny(), with_plan(good, name, own=own), f"{name}: own rows of {own[-1]}: its finish adds none")


def test_a_tensor_twice(good):
    refused(tiny(), with_plan(good, "wd", own=("wo", "wo")), "wd: own rows of wo, wo: one of them twice")


def test_own_of_another_type(good):
    refused(tiny(), with_plan(good, "wd", own="wo"), "wd: own is wo, which is none that a schedule has")


def test_rows_that_another_worker_wrote(good):
    tasks = good.plan("wd").tasks[0]
    assert tasks[0][1] and tasks[1][1]
    swapped = with_plan(good, "wd", tasks=((tasks[1], tasks[0], *tasks[2:]),))
    rows = good.plan("wd").rows
    (first, n), (other, m) = ((f * rows, n * rows) for f, n in tasks[:2])
    refused(tiny(), swapped, f"wo: own rows of x: worker 0 adds {n} from row {first} on, and wrote {m} from row {other} on in wd")
    raced(tiny(), swapped)
    kept = with_plan(swapped, "wo", own=())
    refused(tiny(), kept, f"wd: own rows of wo: worker 0 adds {m} from row {other} on, and wrote {n} from row {first} on in wo")
    raced(tiny(), kept)


def test_more_rows_than_it_wrote(good):
    """One tile of another worker besides."""
    (first, n), (other, m), *rest = good.plan("wd").tasks[0]
    assert first + n == other and m > 0
    wider = with_plan(good, "wd", tasks=(((first, n + 1), (other + 1, m - 1), *rest),))
    refused(tiny(), wider, "wo: own rows of x: worker 0 adds .* and wrote .* in wd")


def test_rows_that_no_fold_of_the_segment_wrote(good):
    """embed stands after the loop, in which nobody keeps them for it."""
    graph, head = tiny(), tiny().phase("embed")
    adding = dataclasses.replace(head, parts=(dataclasses.replace(head.parts[0], rows=128),), row_reads=("x",))
    graph = dataclasses.replace(
        graph,
        phases=(*graph.phases[:-1], adding),
        tensors=graph.tensors | {"embed.out": dataclasses.replace(graph.tensors["embed.out"], width=128)},
    )
    schedule = find(graph, 2, FEW, "data")
    refused(graph, with_plan(schedule, "embed", own=("x",)), "embed: own rows of x: no fold of its segment writes them")
    raced(graph, with_plan(fetched(schedule), "embed", own=("x",)))


def test_rows_that_were_replaced_before_they_are_added():
    """The writer of the loop's state comes before another reader of what it replaces, and once it is that reader itself."""
    part = Part(weights=("w",), rows=128, writes=("x",))
    first = Phase(name="first", kind="map", segment=0, parts=(Part(weights=(), rows=128, writes=("x",)),), reads=(), row_reads=())
    state = Phase(name="state", kind="fold", segment=1, parts=(part,), reads=("x",), row_reads=("x",), k=128)
    side = dataclasses.replace(state, name="side", parts=(dataclasses.replace(part, writes=("t",)),))
    tensors = [Tensor(name="x", width=128, carried=True), Tensor(name="t", width=128)]
    graph = make_graph([(1, [first]), (4, [state, side])], tensors)
    schedule = find(graph, 1, FEW, "data")
    assert not any(p.own for p in schedule.phases)
    same = with_plan(
        schedule, "side", tasks=schedule.plan("state").tasks, rows=schedule.plan("state").rows, parts=schedule.plan("state").parts
    )
    for name in ("state", "side"):
        changed = with_plan(same, name, own=("x",))
        refused(graph, changed, f"{name}: own rows of x: state writes the next ones before it has added them")
        raced(graph, changed)


def test_parts_of_another_width():
    """A phase that adds rows to something else than they are as wide as."""
    graph = long_chain(4, rows=128, repeats=3)
    schedule = find(graph, 1, FEW, "data")
    assert schedule.plan("p2").own == ("t0",)
    wide = dataclasses.replace(graph.phase("p2"), parts=(dataclasses.replace(graph.phase("p2").parts[0], rows=192),))
    tensors = graph.tensors | {"t2": Tensor(name="t2", width=192)}
    wider = dataclasses.replace(graph, phases=tuple(wide if p.name == "p2" else p for p in graph.phases), tensors=tensors)
    changed = find(wider, 1, FEW, "data")
    refused(wider, with_plan(changed, "p2", own=("t0",)), "p2: own rows of t0: none of its parts has 128")
