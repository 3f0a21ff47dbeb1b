"""Own rows: those that a finish adds and that its own worker wrote, a phase or two before. A worker leaves them in its shared memory and takes
them from there: no load, no early look, no wait (`PhasePlan.own`).

Only workers that add exactly the rows they wrote can do so, and program order is all that it takes: the write comes before the read, and the
next write, which replaces the rows, after it. Loop state is one iteration behind: what a loop adds in its first iteration was written before
it, by whomever, and is fetched from global memory to the same place.
"""

import dataclasses
from collections.abc import Iterator, Sequence

from mkdsl.graph import OpGraph, Part, Phase
from mkdsl.search._schedule import PhasePlan, Range, Schedule


def objections(graph: OpGraph, schedule: Schedule) -> Iterator[str]:
    """Why workers do not find the rows that a schedule has them take from their own shared memory."""
    for plan in schedule.phases:
        if len(set(plan.own)) < len(plan.own):
            yield f"{plan.name}: own rows of {', '.join(plan.own)}: one of them twice"
        for tensor in plan.own:
            reason = _objection(graph, schedule, graph.phase(plan.name), tensor)
            if reason:
                yield f"{plan.name}: own rows of {tensor}: {reason}"


def _objection(graph: OpGraph, schedule: Schedule, reader: Phase, tensor: str) -> str | None:
    if reader.kind != "fold" or tensor not in reader.row_reads:
        return "its finish adds none"
    writer = keeper(graph, reader, tensor)
    if writer is None:
        return "no fold of its segment writes them"
    if behind(graph, reader, tensor) and graph.order[writer.name] <= graph.order[reader.name]:
        return f"{writer.name} writes the next ones before it has added them"
    return _unlike(schedule, writer, reader, tensor, graph.tensors[tensor].width)


def keeper(graph: OpGraph, reader: Phase, tensor: str) -> Phase | None:
    """The fold of a reader's segment that writes a tensor."""
    return next((p for p in graph.writers[tensor] if p.segment == reader.segment and p.kind == "fold"), None)


def behind(graph: OpGraph, reader: Phase, tensor: str) -> bool:
    """Whether a reader adds rows that were written in the iteration before, or before the loop: loop state, where it is carried."""
    return graph.tensors[tensor].carried and reader.segment == max(p.segment for p in graph.writers[tensor])


def takes(graph: OpGraph, reader: Phase, plan: PhasePlan, tensor: str, iteration: int) -> bool:
    """Whether the rows that a reader adds in an iteration are in its worker's shared memory, and not yet in global memory only."""
    return tensor in plan.own and (iteration > 0 or not behind(graph, reader, tensor))


def keeps(graph: OpGraph, schedule: Schedule, writer: Phase) -> set[str]:
    """Tensors of which a phase's workers leave the rows that they write in their shared memory."""
    readers = graph.segments[writer.segment].phases
    return {t for name in readers for t in schedule.plan(name).own if t in writer.writes}


def kept_rows(graph: OpGraph, plans: Sequence[PhasePlan]) -> dict[str, int]:
    """By tensor that is kept: rows of its busiest worker, which are as many as that adds."""
    out: dict[str, int] = {}
    for plan in plans:
        parts = graph.phase(plan.name).parts
        for tensor in plan.own:
            adding = _adding(parts, graph.tensors[tensor].width)
            out[tensor] = max(out.get(tensor, 0), *(plan.rows * n for part in adding for _, n in plan.tasks[part]), 0)
    return out


def _adding(parts: Sequence[Part], width: int) -> list[int]:
    """The parts of a phase that may add rows of a tensor: those with as many."""
    return [i for i, part in enumerate(parts) if part.rows == width]


def _making(writer: Phase, tensor: str) -> int:
    """The part of a phase that writes a tensor."""
    return next(i for i, part in enumerate(writer.parts) if tensor in part.writes)


def _unlike(schedule: Schedule, writer: Phase, reader: Phase, tensor: str, width: int) -> str | None:
    """Of workers that add other rows than they wrote the first."""
    wrote = _rows(schedule.plan(writer.name), _making(writer, tensor))
    adding = _adding(reader.parts, width)
    if not adding:
        return f"none of its parts has {width}"
    for part in adding:
        for worker, (mine, own) in enumerate(zip(_rows(schedule.plan(reader.name), part), wrote, strict=True)):
            if mine != own:
                return f"worker {worker} adds {mine[1]} from row {mine[0]} on, and wrote {own[1]} from row {own[0]} on in {writer.name}"
    return None


def _rows(plan: PhasePlan, part: int) -> list[Range]:
    """Each worker's rows of a part."""
    return [(first * plan.rows, n * plan.rows) if n else (0, 0) for first, n in plan.tasks[part]]


# What the search may try.


def edges(graph: OpGraph) -> Iterator[tuple[Phase, Phase, str]]:
    """(writer, reader, tensor) of rows that may be own, given the tasks for it. State of a loop that is run once is never read back."""
    for reader in graph.phases:
        for tensor in reader.row_reads:
            writer = keeper(graph, reader, tensor)
            if writer and graph.iterations(reader) > behind(graph, reader, tensor):
                yield writer, reader, tensor


def with_own(graph: OpGraph, schedule: Schedule, writer: Phase, reader: Phase, tensor: str) -> Iterator[Schedule]:
    """The schedules in which an edge's rows are own, besides those that are already: with tasks as they are or, where those do not do, with
    the writer's given to the reader, or the reader's to the writer. All else is as it was: fit to be simulated only."""
    plan = schedule.plan(reader.name)
    as_is = _with_plan(schedule, dataclasses.replace(plan, own=(*plan.own, tensor)))
    if not any(objections(graph, as_is)):
        yield as_is
        return
    making, adding = (writer, [_making(writer, tensor)]), (reader, _adding(reader.parts, graph.tensors[tensor].width))
    for (giver, given), (taker, taken) in ((making, adding), (adding, making)):
        changed = as_is
        for part in taken if given else ():
            changed = _with_plan(changed, _given(schedule.plan(giver.name), given[0], changed.plan(taker.name), part))
        if not any(objections(graph, changed)):
            yield changed


def _given(giver: PhasePlan, given: int, taker: PhasePlan, part: int) -> PhasePlan:
    """The taker's plan, a part of which goes to those who have the same rows of the giver's; as far as they are whole tiles."""
    tasks = tuple((first // taker.rows, n // taker.rows) for first, n in _rows(giver, given))
    return dataclasses.replace(taker, tasks=(*taker.tasks[:part], tasks, *taker.tasks[part + 1 :]))


def _with_plan(schedule: Schedule, plan: PhasePlan) -> Schedule:
    return dataclasses.replace(schedule, phases=tuple(plan if p.name == plan.name else p for p in schedule.phases))
