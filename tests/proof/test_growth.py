"""The proof takes no longer than a schedule is long, whichever way its tasks come about. Work is counted, not timed."""

import collections
import dataclasses
import itertools
import random
import sys
from typing import Any

import numpy as np
import pytest
from oracle.graphs import llama_1b, long_chain
from oracle.sources import H200

from mkdsl.graph import OpGraph
from mkdsl.proof import Execution, verify_schedule
from mkdsl.proof._classes import Pairs, VectorClock, WorkerClasses
from mkdsl.schedule import FoldPlan, Handoff, Schedule, Tasks
from mkdsl.search import search
from mkdsl.search._draft import with_memory
from mkdsl.search._handoffs import tensor_plans, with_handoffs

pytestmark = pytest.mark.medium

ON_ARRAYS = {Pairs: ("late",), VectorClock: ("joined", "event"), WorkerClasses: ("row_pairs",)}


@dataclasses.dataclass
class Work:
    """calls: of functions, Python's and C's. entries: of arrays, in the operations whose arrays are largest."""

    calls: int = 0
    entries: int = 0


def proof_of(graph: OpGraph, schedule: Schedule) -> Work:
    verify_schedule(graph, schedule, H200)  # what is cached for good is no work
    work = Work()

    def called(frame: Any, event: str, arg: Any) -> None:
        work.calls += event in ("call", "c_call")

    with pytest.MonkeyPatch.context() as patch:
        for cls, name in ((cls, name) for cls, names in ON_ARRAYS.items() for name in names):
            patch.setattr(cls, name, watched(getattr(cls, name), work))
        sys.setprofile(called)
        try:
            verify_schedule(graph, schedule, H200)
        finally:
            sys.setprofile(None)
    return work


def watched(method: Any, work: Work) -> Any:
    """The method, whose arrays are added to the work."""

    def call(self: Any, *args: Any, **named: Any) -> Any:
        work.entries += sum(value.size for value in (*vars(self).values(), *args) if isinstance(value, np.ndarray))
        return method(self, *args, **named)

    return call


def items(graph: OpGraph, schedule: Schedule) -> int:
    """How many all workers have in one decode step."""
    graph = graph.in_order(schedule.order)
    return sum(graph.iterations(graph.phase(p.name)) * n for p in schedule.phases for part in p.tasks for _, n in part)


def chain_schedule(graph: OpGraph, workers: int, scattered: bool) -> Schedule:
    """One tile a worker, or on random two thirds of them one or two: no two workers take part in the same phases."""
    r, plans = random.Random(5), []
    for phase in graph.phases:
        who = sorted(r.sample(range(workers), 2 * workers // 3)) if scattered else range(workers)
        tasks = spread(phase.rows // 8, list(who), workers)
        plans.append(FoldPlan(name=phase.name, split_k=8, tile_k=128, epilogue_tiles=2, tasks=tasks, waits=()))
    handoff = Handoff.RELEASE_ACQUIRE if scattered else Handoff.SENTINEL
    schedule = Schedule(
        target="h200", batch=1, padded_batch=1, workers=workers, num_stages=3, stage_bytes=32768, max_in_flight=2, smem_bytes=0,
        phases=tuple(plans), tensors=tensor_plans(graph, handoff, {}), predicted_us=0.0, us=tuple((p.name, 0.0) for p in graph.phases),
    )  # fmt: skip
    return with_handoffs(graph, with_memory(graph, schedule))


def spread(n: int, who: list[int], workers: int) -> Tasks:
    """n items of one part over these of the workers."""
    counts = collections.Counter(who[i * len(who) // n] for i in range(n))
    firsts = itertools.accumulate((counts[w] for w in range(workers)), initial=0)
    return (tuple((first, counts[w]) for w, first in zip(range(workers), firsts, strict=False)),)


@pytest.mark.parametrize("scattered", [False, True], ids=["everyone", "scattered"])
@pytest.mark.parametrize("repeats", [1, 4], ids=["unrolled", "loop"])
def test_work_grows_linearly_with_the_number_of_tasks(scattered, repeats):
    """Of phases no two of which are alike, on 132 workers: as many phases more cost as much more, however many there are."""
    works, tasks = [], []
    for phases in (60 // repeats, 120 // repeats, 180 // repeats):
        graph = long_chain(phases, repeats=repeats)
        schedule = chain_schedule(graph, 132, scattered)
        works.append(proof_of(graph, schedule))
        tasks.append(items(graph, schedule))
    assert tasks[2] - tasks[1] == tasks[1] - tasks[0] > 7000
    for counted in ([w.calls for w in works], [w.entries for w in works]):
        first, second = counted[1] - counted[0], counted[2] - counted[1]
        assert 0 < second <= 1.01 * first


@pytest.fixture(scope="module")
def llama_schedule() -> Schedule:
    return search(llama_1b(), batch=1, target="h200")


def test_work_does_not_depend_on_how_often_a_loop_runs(llama_schedule):
    few, many = (repeated(llama_1b(), n) for n in (8, 4000))
    assert items(many, llama_schedule) > 1_000_000
    assert proof_of(few, llama_schedule) == proof_of(many, llama_schedule)


def repeated(graph: OpGraph, repeats: int) -> OpGraph:
    """With another number of layers."""
    segments = tuple(dataclasses.replace(s, repeats=repeats if s.repeats > 1 else 1) for s in graph.segments)
    return dataclasses.replace(graph, segments=segments)


def test_workers_that_are_always_busy_are_of_few_classes(llama_schedule):
    """A step costs a matrix of classes, not of workers."""
    classes = Execution(llama_1b().in_order(llama_schedule.order), llama_schedule).classes
    assert classes.size.sum() == llama_schedule.workers == 132
    assert len(classes.size) < 20
