"""Own rows: those that a finish adds and that its own worker wrote, a phase or two before. A worker leaves them in its shared memory and takes
them from there: no load, no early look, no wait (`PhasePlan.own`).

Only workers that add exactly the rows they wrote can do so, and program order is all that it takes: the write comes before the read, and the
next write, which replaces the rows, after it. Loop state is one iteration behind: what a loop adds in its first iteration was written before
it, by whomever, and is fetched from global memory to the same place.
"""

from collections.abc import Sequence

from mkdsl.graph import OpGraph, Part, Phase
from mkdsl.search._schedule import PhasePlan, Range, Schedule


def objection(graph: OpGraph, schedule: Schedule, reader: Phase, tensor: str) -> str | None:
    """Why a phase's workers cannot take their rows of a tensor from their own shared memory; None if they can."""
    if reader.kind != "fold" or tensor not in reader.row_reads:
        return "its finish adds none"
    writer = next((p for p in graph.writers[tensor] if p.segment == reader.segment), None)
    if writer is None or writer.kind != "fold":
        return "no fold of its segment writes them"
    if behind(graph, reader, tensor) and graph.order[writer.name] <= graph.order[reader.name]:
        return f"{writer.name} writes the next ones before it has added them"
    return _unlike(schedule, writer, reader, tensor, graph.tensors[tensor].width)


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


def _unlike(schedule: Schedule, writer: Phase, reader: Phase, tensor: str, width: int) -> str | None:
    """Of workers that add other rows than they wrote the first."""
    made = next(i for i, part in enumerate(writer.parts) if tensor in part.writes)
    wrote = _rows(schedule.plan(writer.name), made)
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
