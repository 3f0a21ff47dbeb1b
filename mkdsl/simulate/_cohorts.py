"""Who is simulated: cohorts of workers that have the same counts of items, and what each of them does in order."""

import collections
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mkdsl.graph import OpGraph, Phase
from mkdsl.schedule import Awaited, Profile, Schedule, awaited
from mkdsl.simulate._work import Work, Workload

Event = tuple[str, int]  # phase, iteration


class Step(NamedTuple):
    """One phase in one iteration, as one cohort sees it. waits: the events to wait for."""

    phase: Phase
    iteration: int
    work: Work
    waits: tuple[Event, ...]


class Cohort(NamedTuple):
    """Workers that do the same at the same time."""

    number: int
    workers: tuple[int, ...]
    steps: Sequence[Step]


def cohorts(graph: OpGraph, schedule: Schedule, profile: Profile, repeats: Sequence[int], paces: int) -> list[Cohort]:
    """All workers, those that have the same counts of items together, dealt out to so many paces."""
    alike: dict[tuple[tuple[int, ...], ...], list[int]] = collections.defaultdict(list)
    for worker in range(schedule.workers):
        alike[tuple(p.folded(worker) for p in schedule.phases)].append(worker)
    dtypes, splits = {t.name: t.dtype for t in schedule.tensors}, {t.name: t.splits for t in schedule.tensors}
    workload = Workload(graph, schedule.batch, schedule.padded_batch, profile, dtypes)
    found: list[Cohort] = []
    for counts, workers in alike.items():
        busy = {p.name: (p, n) for p, n in zip(schedule.phases, counts, strict=True) if any(n)}
        works = {name: workload.of(graph.phase(name), p, n, splits) for name, (p, n) in busy.items()}
        steps = list(_steps(graph, schedule, works, repeats))
        for same in filter(None, (workers[i::paces] for i in range(paces))):
            found.append(Cohort(len(found), tuple(same), steps))
    return found


def _steps(graph: OpGraph, schedule: Schedule, works: dict[str, Work], repeats: Sequence[int]) -> Iterator[Step]:
    for segment, times in zip(graph.segments, repeats, strict=True):
        for iteration in range(times):
            for name in filter(works.__contains__, segment.phases):
                phase = graph.phase(name)
                yield Step(phase, iteration, works[name], tuple(_waits(graph, schedule, phase, iteration, repeats)))


def _waits(graph: OpGraph, schedule: Schedule, phase: Phase, iteration: int, repeats: Sequence[int]) -> Iterator[Event]:
    for before in map(graph.phase, schedule.plan(phase.name).waits):
        match awaited(graph, phase, before):
            case Awaited.LAST if iteration == 0:
                yield before.name, repeats[before.segment] - 1
            case Awaited.SAME:
                yield before.name, iteration
            case Awaited.PREVIOUS if iteration:
                yield before.name, iteration - 1
