"""Hand-offs of a schedule: which events a phase waits for, how many incarnations a tensor has, where workers fence.

Starts from as few waits and fences as reads suggest, and adds what the proof in `_races` finds missing.
"""

import bisect
import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

from mkdsl.graph import MapPhase, OpGraph, Phase, Tensor
from mkdsl.proof import Accesses, Execution, Rule, ScheduleError, Violation, exchanges, overtakings
from mkdsl.schedule import Handoff, Schedule, TensorPlan, home, narrowest

MOST_CHOICES = 1000  # of phases that fence, to try one by one


def tensor_plans(graph: OpGraph, handoff: Handoff, splits: dict[str, int]) -> tuple[TensorPlan, ...]:
    """Two incarnations of what a loop writes. Three of loop state that is still read when its next instance is written: the writer then
    clears the slot of the instance before, which all have read. One of an output, which nobody waits for."""
    out = []
    for tensor in graph.tensors.values():
        looped = not tensor.output and (tensor.carried or graph.segments[home(graph, tensor.name)].repeats > 1)
        incarnations = 3 if _read_while_written(graph, tensor) else 2 if looped else 1
        n = splits.get(tensor.name, 1)
        dtype = narrowest(tensor, n)
        out.append(TensorPlan(name=tensor.name, handoff=handoff, incarnations=incarnations, splits=n, dtype=dtype))
    return tuple(out)


def _read_while_written(graph: OpGraph, tensor: Tensor) -> bool:
    writer = max(graph.order[p.name] for p in graph.writers[tensor.name])
    at_home = [p for p in graph.readers[tensor.name] if p.segment == home(graph, tensor.name)]
    return tensor.carried and any(graph.order[p.name] >= writer for p in at_home)


def producers(graph: OpGraph, phase: Phase, tensors: Iterable[str]) -> tuple[str, ...]:
    """The phases that write these tensors before `phase` reads them. Inside its loop, loop state has two: of its first instance, and of
    each next one, whose event is the one of the iteration before."""

    def before(writer: Phase, name: str) -> bool:
        latest = min(phase.segment, home(graph, name))
        return writer.segment == latest or writer.segment < latest == phase.segment

    return tuple(sorted({p.name for t in tensors for p in graph.writers[t] if before(p, t)}, key=lambda name: graph.order[name]))


def with_producers(graph: OpGraph, schedule: Schedule) -> Schedule:
    """The schedule in which each phase waits for those whose results it needs to begin, and for no more."""
    return _with(schedule, _first_waits(graph), fences=())


def _first_waits(graph: OpGraph) -> dict[str, tuple[str, ...]]:
    """By phase: those that write what it reads whole. A map has nothing else to do before its rows are there."""
    return {p.name: producers(graph, p, (*p.reads, *p.row_reads) if isinstance(p, MapPhase) else p.reads) for p in graph.phases}


def with_handoffs(graph: OpGraph, schedule: Schedule) -> Schedule:
    """The schedule with waits and fences under which it is safe.

    Where neither can make it so, a tensor is handed over by release and acquire instead. That happens where workers take part in few phases: one that
    looks at older rows before it waits may not know of a clear in time, whatever it waits for.
    """
    waits = _first_waits(graph)
    while True:
        schedule = _with(schedule, waits, fences=())
        execution = Execution(graph, schedule)
        accesses = [Accesses(execution, t) for t in graph.tensors.values()]
        missing = [*overtakings(execution), *exchanges(execution), *(v for a in accesses for v in a.violations())]
        if not missing:
            everywhere = execution.fenced_after({p.name for p in graph.phases})
            missing = [v for a in accesses for v in a.unfenced(everywhere)]
        if not missing:
            fences = _fewest_fences(graph, schedule, execution, accesses)
            return _without_implied_waits(graph, _with(schedule, waits, fences))
        added = [v for v in missing if v.rule is not Rule.EARLY and _add_wait(waits, v)]
        if not added:
            schedule = _released(schedule, missing[0].tensor)


def other_handoffs(graph: OpGraph, schedule: Schedule) -> Iterator[tuple[str, Schedule]]:
    """(tensor, the schedule in which it is handed over the other way), with waits and fences as they were: fit to be simulated only."""
    for tensor in schedule.tensors:
        if not graph.tensors[tensor.name].output:
            yield tensor.name, handed_over(schedule, tensor.name, tensor.handoff.other)


def made_safe(graph: OpGraph, schedule: Schedule) -> Schedule | None:
    """`with_handoffs`, if that is possible without changing how tensors are handed over."""
    with contextlib.suppress(ScheduleError):
        safe = with_handoffs(graph, schedule)
        return safe if safe.tensors == schedule.tensors else None


def handed_over(schedule: Schedule, name: str, handoff: Handoff) -> Schedule:
    """The schedule in which one tensor is handed over so."""
    tensors = tuple(dataclasses.replace(t, handoff=handoff) if t.name == name else t for t in schedule.tensors)
    return dataclasses.replace(schedule, tensors=tensors)


def _released(schedule: Schedule, name: str) -> Schedule:
    changed = handed_over(schedule, name, Handoff.RELEASE_ACQUIRE)
    if changed == schedule:
        raise ScheduleError(Rule.FENCE, f"neither waits nor a fence nor release-acquire make the hand-off of {name} safe")
    return changed


def _without_implied_waits(graph: OpGraph, schedule: Schedule) -> Schedule:
    """Drops each wait for what the phase's other waits imply: every look at a counter is a trip to L2 on the critical path.
    The order stays what it was, so one execution tells for all."""
    execution, waits = Execution(graph, schedule), {p.name: p.waits for p in schedule.phases}
    for plan in schedule.phases:
        for name in plan.waits:
            others = tuple(w for w in waits[plan.name] if w != name)
            if execution.implies(plan.name, others, name):
                waits[plan.name] = others
    return _with(schedule, waits, [p.name for p in schedule.phases if p.fence])


def _add_wait(waits: dict[str, tuple[str, ...]], violation: Violation) -> bool:
    """Has the later step's phase wait for the earlier one's; whether that is new."""
    later, earlier = violation.then.phase.name, violation.first.phase.name
    if earlier in waits[later]:
        return False
    waits[later] = (*waits[later], earlier)
    return True


def _with(schedule: Schedule, waits: dict[str, tuple[str, ...]], fences: Iterable[str]) -> Schedule:
    chosen = set(fences)
    phases = tuple(dataclasses.replace(p, waits=waits[p.name], fence=p.name in chosen) for p in schedule.phases)
    return dataclasses.replace(schedule, phases=phases)


def _fewest_fences(graph: OpGraph, schedule: Schedule, execution: Execution, accesses: Sequence[Accesses]) -> tuple[str, ...]:
    """The fewest phases whose fences suffice, given that all of them do; among as few, those that stream most.
    Where there are too many choices to try, as few as none can be spared of."""

    def suffice(chosen: Sequence[str]) -> bool:
        fenced = execution.fenced_after(set(chosen))
        return not any(v for a in accesses for v in a.unfenced(fenced))

    by_stream = [p.name for p in sorted(graph.phases, key=lambda p: (graph.iterations(p) == 1, -p.streamed_bytes(schedule.batch)))]
    sizes = itertools.takewhile(lambda n: math.comb(len(by_stream), n) <= MOST_CHOICES, range(len(by_stream) + 1))
    for chosen in itertools.chain.from_iterable(itertools.combinations(by_stream, n) for n in sizes):
        if suffice(chosen):
            return chosen
    needed: list[str] = []
    while not suffice(needed):  # the last of the shortest prefix that suffices together with those is needed too
        shortest = bisect.bisect_left(range(len(by_stream)), True, key=lambda n: suffice([*by_stream[:n], *needed]))
        needed.append(by_stream[shortest - 1])
    return tuple(needed)
