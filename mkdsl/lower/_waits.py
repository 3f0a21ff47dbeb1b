"""What a worker may wait for, by number, and what the notes mean that the workers of a kernel with a deadline leave.

A note is two int32: the number of a wait with the iteration above 16 bits, and what was seen: of an event how often it had been signalled, of data
which of the phase's tensors it waited for, a bit each. Notes lie behind the counters of the events, a pair for each worker.
"""

import dataclasses
import enum
from collections.abc import Iterable
from typing import Any

import numpy as np

from mkdsl.graph import OpGraph, Phase
from mkdsl.lower.mosaic._deadline import NOTE
from mkdsl.lower.mosaic._ptx import COUNTER_STRIDE
from mkdsl.schedule import Awaited, Schedule, awaited

BITS = 16  # of a wait's number


class Wanted(enum.Enum):
    """What a worker waits for."""

    EVENT = "event"
    DATA = "data"
    PEERS = "peers"


@dataclasses.dataclass(frozen=True)
class Wait:
    """A wait of a phase: for an `event`, that of the phase so named; for data to prove itself; or for what the peers of a cluster send."""

    phase: str
    wanted: Wanted
    event: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GivenUp:
    """A worker's first wait that was not over at the deadline.

    iteration: of the phase. tensors: of data, what the load was of. wanted, seen: of an event, how many signals it waited for and how many had come.
    """

    worker: int
    wait: Wait
    iteration: int
    tensors: tuple[str, ...] = ()
    wanted: int = 0
    seen: int = 0


def waits(graph: OpGraph, schedule: Schedule) -> list[Wait]:
    """All waits, in program order."""
    found = []
    for phase in graph.phases:
        plan = schedule.plan(phase.name)
        found += [Wait(phase.name, Wanted.EVENT, before) for before in plan.waits]
        found += [Wait(phase.name, Wanted.DATA)]
        found += [Wait(phase.name, Wanted.PEERS)] if plan.cluster > 1 else []
    return found


def number(graph: OpGraph, schedule: Schedule, wait: Wait, iteration: Any) -> Any:
    """What a wait is noted as, in an iteration that may be a kernel's."""
    return iteration * (1 << BITS) + waits(graph, schedule).index(wait)


def mask(phase: Phase, tensors: Iterable[str]) -> int:
    """Some of the tensors that a phase reads, as bits."""
    return sum(1 << _tensors(phase).index(name) for name in set(tensors))


def _tensors(phase: Phase) -> list[str]:
    return list(dict.fromkeys((*phase.reads, *phase.row_reads)))


def first_note(graph: OpGraph) -> int:
    """Words of counters that come before the notes."""
    return len(graph.phases) * COUNTER_STRIDE


def given_up(graph: OpGraph, schedule: Schedule, counters: np.ndarray) -> list[GivenUp]:
    """What the workers have noted, the least advanced first: what held up the others.

    Args:
      graph: in the schedule's order.
      schedule: of the kernel.
      counters: as the kernel left them, int32.
    """
    notes = counters[first_note(graph) :].reshape(schedule.workers, NOTE)
    found = [_read(graph, schedule, worker, *map(int, note)) for worker, note in enumerate(notes) if (note != -1).any()]

    def advance(g: GivenUp) -> tuple[int, ...]:
        phase = graph.phase(g.wait.phase)
        return phase.segment, g.iteration, graph.order[phase.name], g.seen - g.wanted

    return sorted(found, key=advance)


def _read(graph: OpGraph, schedule: Schedule, worker: int, noted: int, seen: int) -> GivenUp:
    wait, iteration = waits(graph, schedule)[noted & ((1 << BITS) - 1)], (noted >> BITS) & ((1 << BITS) - 1)
    phase = graph.phase(wait.phase)
    if wait.wanted is Wanted.EVENT:
        wanted = signals_wanted(graph, schedule, phase, graph.phase(wait.event), iteration)
        return GivenUp(worker=worker, wait=wait, iteration=iteration, wanted=wanted, seen=seen + 1)  # counters begin at -1
    tensors = tuple(name for bit, name in enumerate(_tensors(phase)) if seen >> bit & 1) if wait.wanted is Wanted.DATA else ()
    return GivenUp(worker=worker, wait=wait, iteration=iteration, tensors=tensors)


def signals_wanted(graph: OpGraph, schedule: Schedule, phase: Phase, before: Phase, iteration: int) -> int:
    """How often the event of `before` has been signalled when a phase goes on in an iteration."""
    iterations = {Awaited.LAST: graph.iterations(before), Awaited.SAME: iteration + 1, Awaited.PREVIOUS: iteration}
    return iterations[awaited(graph, phase, before)] * len(schedule.plan(before.name).participants)
