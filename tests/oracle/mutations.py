"""Mutations: what may be wrong with a schedule, by kind."""

import dataclasses
import itertools
import random
from collections.abc import Callable
from typing import Any

from mkdsl.graph import AttentionPhase, FoldPhase, MapPhase, OpGraph
from mkdsl.schedule import AttentionPlan, FoldPlan, MapPlan, PhasePlan, Schedule, Tasks

Random = random.Random
Mutation = Callable[[Random, OpGraph, Schedule], Schedule]


def with_plan(schedule: Schedule, name: str, **changes: Any) -> Schedule:
    return dataclasses.replace(schedule, phases=tuple(dataclasses.replace(p, **changes) if p.name == name else p for p in schedule.phases))


def with_tensor(schedule: Schedule, name: str, **changes: Any) -> Schedule:
    return dataclasses.replace(
        schedule, tensors=tuple(dataclasses.replace(t, **changes) if t.name == name else t for t in schedule.tensors)
    )


# Waits, fences, buffers.


def _waiting(r: Random, s: Schedule) -> PhasePlan:
    return r.choice([p for p in s.phases if p.waits])


def dropped_wait(r: Random, graph: OpGraph, s: Schedule) -> Schedule:
    plan = _waiting(r, s)
    gone = set(r.sample(plan.waits, r.randint(1, len(plan.waits))))
    return with_plan(s, plan.name, waits=tuple(w for w in plan.waits if w not in gone))


def other_wait(r: Random, graph: OpGraph, s: Schedule) -> Schedule:
    """Early or late: for another phase than the one that should be waited for."""
    plan = _waiting(r, s)
    old, order = r.choice(plan.waits), [p.name for p in graph.phases]
    near = order[(order.index(old) + r.choice((-2, -1, 1, 2))) % len(order)]
    return with_plan(s, plan.name, waits=tuple(near if w == old else w for w in plan.waits))


def swapped_waits(r: Random, graph: OpGraph, s: Schedule) -> Schedule:
    a, b = r.sample(s.phases, 2)
    return with_plan(with_plan(s, a.name, waits=b.waits), b.name, waits=a.waits)


def more_waits(r: Random, graph: OpGraph, s: Schedule) -> Schedule:
    """Harmless, or for what comes never; the phase itself included."""
    plan = r.choice(s.phases)
    return with_plan(s, plan.name, waits=(*plan.waits, r.choice(s.phases).name))


def dropped_fence(r: Random, graph: OpGraph, s: Schedule) -> Schedule:
    fenced = [p.name for p in s.phases if p.fence]
    return with_plan(s, r.choice(fenced), fence=False) if fenced else s


def moved_fence(r: Random, graph: OpGraph, s: Schedule) -> Schedule:
    return with_plan(dropped_fence(r, graph, s), r.choice(s.phases).name, fence=True)


def incarnations(r: Random, graph: OpGraph, s: Schedule) -> Schedule:
    """One too few, most of the time."""
    tensor = r.choice(s.tensors)
    return with_tensor(s, tensor.name, incarnations=tensor.incarnations + r.choice((-1, -1, 1, 2)))


def other_handoff(r: Random, graph: OpGraph, s: Schedule) -> Schedule:
    for tensor in r.sample(s.tensors, r.randint(1, len(s.tensors))):
        s = with_tensor(s, tensor.name, handoff=tensor.handoff.other)
    return s


def several(r: Random, graph: OpGraph, s: Schedule) -> Schedule:
    """Two to four at once: what one hides another may need."""
    kinds = (dropped_wait, other_wait, swapped_waits, more_waits, dropped_fence, moved_fence, incarnations, other_handoff, swapped_tasks)
    for _ in range(r.randint(2, 4)):
        s = r.choice(kinds)(r, graph, s) if any(p.waits for p in s.phases) else incarnations(r, graph, s)
    return s


# Tasks.


def _with_ranges(r: Random, s: Schedule, change: Callable[[list[tuple[int, int]], int, int], None]) -> Schedule:
    """Changes one part's ranges, given two workers, the first of whom has items."""
    plan = r.choice([p for p in s.phases if len(p.tasks[0]) > 1] or s.phases)
    part = r.randrange(len(plan.tasks))
    ranges = list(plan.tasks[part])
    a = r.choice([w for w, (_, n) in enumerate(ranges) if n])
    b = r.choice([w for w in range(len(ranges)) if w != a] or [a])
    change(ranges, a, b)
    return with_plan(s, plan.name, tasks=(*plan.tasks[:part], tuple(ranges), *plan.tasks[part + 1 :]))


def swapped_tasks(r: Random, graph: OpGraph, s: Schedule) -> Schedule:
    def swap(ranges: list[tuple[int, int]], a: int, b: int) -> None:
        ranges[a], ranges[b] = ranges[b], ranges[a]

    return _with_ranges(r, s, swap)


def duplicated_task(r: Random, graph: OpGraph, s: Schedule) -> Schedule:
    def duplicate(ranges: list[tuple[int, int]], a: int, b: int) -> None:
        ranges[b] = ranges[a]

    return _with_ranges(r, s, duplicate)


def overlapping_task(r: Random, graph: OpGraph, s: Schedule) -> Schedule:
    def widen(ranges: list[tuple[int, int]], a: int, b: int) -> None:
        first, n = ranges[a]
        ranges[a] = (first - 1, n + 1) if r.random() < 0.5 else (first, n + 1)

    return _with_ranges(r, s, widen)


def wrong_count(r: Random, graph: OpGraph, s: Schedule) -> Schedule:
    def shrink(ranges: list[tuple[int, int]], a: int, b: int) -> None:
        first, n = ranges[a]
        ranges[a] = r.choice([(first, n - 1), (first + 1, n - 1), (first + 1, n), (first, 0), (first, -n)])

    return _with_ranges(r, s, shrink)


def handed_on_task(r: Random, graph: OpGraph, s: Schedule) -> Schedule:
    """One worker's items to another that has none, or is its neighbour: nothing is lost, but others take part."""

    def give(ranges: list[tuple[int, int]], a: int, b: int) -> None:
        (first, n), (other, m) = ranges[a], ranges[b]
        ranges[a] = (first, 0)
        ranges[b] = (min(first, other), n + m) if m else (first, n)

    return _with_ranges(r, s, give)


# Tiles, the ring, memory.


TILING = {FoldPlan: ("split_k", "tile_k", "k_stages", "epilogue_tiles"), AttentionPlan: ("block",), MapPlan: ("rows", "split_k")}


def tiles(r: Random, graph: OpGraph, s: Schedule) -> Schedule:
    """One number of one phase's tiles."""
    plan = r.choice(s.phases)
    field = r.choice(TILING[type(plan)])
    value = getattr(plan, field)
    return with_plan(s, plan.name, **{field: r.choice((value * 2, value // 2, value + 1, value - 1, value * 3))})


def _even(s: Schedule, counts: list[int]) -> Tasks:
    """So many items of each part, spread over all workers."""
    ends = [[n * w // s.workers for w in range(s.workers + 1)] for n in counts]
    return tuple(tuple((a, b - a) for a, b in itertools.pairwise(part)) for part in ends)


def retiled(r: Random, graph: OpGraph, s: Schedule) -> Schedule:
    """Other tiles with all their items: only what a tile may be can tell whether they are right."""
    plan = r.choice(s.phases)
    phase = graph.phase(plan.name)
    if isinstance(phase, AttentionPhase):
        return with_plan(s, plan.name, block=64 * r.randint(1, 4))
    if isinstance(phase, MapPhase):
        rows = r.choice((32, 64, 128, 192))
        tasks = _even(s, [s.batch * part.rows // rows for part in phase.parts])
        return with_plan(s, plan.name, rows=rows, split_k=r.choice((0, 1, 2, 3, 5, 8, 16)), tasks=tasks)
    assert isinstance(phase, FoldPhase)
    split_k = r.choice((1, 2, 4, 8, 16, 32, 64) if phase.parallel else (1, 1, 2))
    tasks = _even(s, [part.rows * split_k // 64 for part in phase.parts])
    tile_k, k_stages, instruction = r.choice((8, 16, 32, 64)), r.choice((1, 1, 2, 4)), r.choice(("mma", "mma", "wgmma", "fma"))
    return with_plan(s, plan.name, split_k=split_k, tile_k=tile_k, k_stages=k_stages, instruction=instruction, tasks=tasks)


def splits(r: Random, graph: OpGraph, s: Schedule) -> Schedule:
    """Of the attention, of its result, or of both with all items there."""
    plan = r.choice([p for p in s.phases if isinstance(p, AttentionPlan)])
    n, tensor = plan.splits * r.choice((2, 3)), graph.phase(plan.name).writes[0]
    scaled = tuple(tuple((f * n // plan.splits, c * n // plan.splits) for f, c in part) for part in plan.tasks)
    changed = with_plan(s, plan.name, splits=n, block=64, tasks=scaled if r.random() < 0.7 else plan.tasks)
    return r.choice((changed, with_tensor(s, tensor, splits=n), with_tensor(changed, tensor, splits=n, dtype="float32")))


def clusters(r: Random, graph: OpGraph, s: Schedule) -> Schedule:
    """Folds shared by clusters that were not, or the other way round; now and then what cannot be shared."""
    for plan in r.sample(s.phases, r.randint(1, len(s.phases))):
        phase, size = graph.phase(plan.name), r.choice((1, 2, 2, 2))
        even = isinstance(phase, FoldPhase) and phase.parallel and s.workers % size == 0
        fitting = [k for k in (plan.tile_k, 64, 32, 16) if phase.k % (plan.split_k * size * k) == 0] if even else []
        if fitting:
            s = with_plan(s, plan.name, cluster=size, k_stages=1, tile_k=fitting[0])
        elif not isinstance(plan, MapPlan) and r.random() < 0.2:
            s = with_plan(s, plan.name, cluster=r.choice((0, 2, 3, 4)))
    return dropped_wait(r, graph, s) if r.random() < 0.3 and any(p.waits for p in s.phases) else s


def workers(r: Random, graph: OpGraph, s: Schedule) -> Schedule:
    change = r.choice((-1, 1))
    if r.random() < 0.3:
        return dataclasses.replace(s, workers=s.workers + change)
    more = [dataclasses.replace(p, tasks=tuple(part[:change] if change < 0 else (*part, (0, 0)) for part in p.tasks)) for p in s.phases]
    return dataclasses.replace(s, workers=s.workers + change, phases=tuple(more))


def ring(r: Random, graph: OpGraph, s: Schedule) -> Schedule:
    """Stages reused too early: more in flight than the ring holds, a ring too shallow, stages too small for a unit."""
    field = r.choice(("max_in_flight", "num_stages", "stage_bytes"))
    value = getattr(s, field)
    return dataclasses.replace(s, **{field: r.choice((1, value + s.num_stages, value // 2, value - 512, value - 1024, -value))})


def shared_memory(r: Random, graph: OpGraph, s: Schedule) -> Schedule:
    """Over the limit, or less than is needed."""
    more = r.randint(1, 20)
    return r.choice((
        dataclasses.replace(s, smem_bytes=s.smem_bytes - 1024 * more),
        dataclasses.replace(s, num_stages=s.num_stages + more, smem_bytes=s.smem_bytes + more * s.stage_bytes),
        dataclasses.replace(s, num_stages=s.num_stages + more),
    ))  # fmt: skip


def batch(r: Random, graph: OpGraph, s: Schedule) -> Schedule:
    return dataclasses.replace(s, **{r.choice(("batch", "padded_batch")): r.choice((0, 1, 2, 3, 4, 8, 32))})


def other_kind(r: Random, graph: OpGraph, s: Schedule) -> Schedule:
    """A phase with the plan of another kind, with as many items as that has."""
    plan = r.choice(s.phases)
    common = {"name": plan.name, "tasks": plan.tasks, "waits": plan.waits, "fence": plan.fence}
    others = [
        FoldPlan(**common, tile_k=16 * r.randint(1, 16), split_k=r.choice((1, 2, 4, 8)), k_stages=r.choice((1, 2)), epilogue_tiles=r.randint(1, 16)),
        AttentionPlan(**common, block=64 * r.randint(1, 2), splits=r.choice((1, 2))),
        MapPlan(**common, rows=64 * r.randint(1, 3), split_k=r.choice((1, 8))),
    ]  # fmt: skip
    other = r.choice([p for p in others if type(p) is not type(plan)])
    return dataclasses.replace(s, phases=tuple(other if p is plan else p for p in s.phases))


def types(r: Random, graph: OpGraph, s: Schedule) -> Schedule:
    """Of another type, or names that are not there."""
    plan, tensor = r.choice(s.phases), r.choice(s.tensors)
    floats = tuple(tuple((float(f), float(n)) for f, n in part) for part in plan.tasks)
    field = TILING[type(plan)][0]
    return r.choice((
        with_plan(s, plan.name, tasks=floats),
        with_plan(s, plan.name, waits=(*plan.waits, "no phase")),
        with_plan(s, plan.name, **{field: float(getattr(plan, field))}),
        with_plan(s, plan.name, fence=None),
        with_tensor(s, tensor.name, handoff="epoch"),
        dataclasses.replace(s, phases=(*s.phases, plan)),
        dataclasses.replace(s, tensors=s.tensors[1:]),
        dataclasses.replace(s, predicted_us=float("nan")),
    ))  # fmt: skip


MUTATIONS: dict[str, Mutation] = {
    f.__name__: f
    for f in (
        dropped_wait, other_wait, swapped_waits, more_waits, dropped_fence, moved_fence, incarnations, other_handoff, several,
        swapped_tasks, duplicated_task, overlapping_task, wrong_count, handed_on_task, tiles, retiled, splits, clusters, workers, ring, shared_memory, batch,
        other_kind, types,
    )
}  # fmt: skip
