"""The rules of a schedule's execution that search, proof, simulator and kernel share, each told once.

An *instance* of a tensor is its value in one iteration of its home, the last segment that writes it. A carried tensor written in iteration i
is instance i + 1, since it is read in the next iteration; its instance 0 is written before the loop. Instance n lies in slot n % incarnations.

Iterations may be Python integers or values of a kernel that is being traced: the rules compute with both alike.
"""

import enum
from typing import Any

from mkdsl.graph import OpGraph, Phase
from mkdsl.schedule._plan import Schedule


def home(graph: OpGraph, tensor: str) -> int:
    """The segment whose iterations number a tensor's instances: the last that writes it."""
    return max(p.segment for p in graph.writers[tensor])


def written_instance(graph: OpGraph, tensor: str, phase: Phase, iteration: Any) -> Any:
    """Which instance of a tensor a phase writes in an iteration."""
    return iteration + graph.tensors[tensor].carried if phase.segment == home(graph, tensor) else 0


def read_instance(graph: OpGraph, tensor: str, phase: Phase, iteration: Any, *, repeats: int | None = None) -> Any:
    """Which instance of a tensor a phase reads in an iteration: its own iteration's, or after the loop the last. repeats: of the home
    segment, where it is not executed as often as the graph says."""
    at = home(graph, tensor)
    if phase.segment == at:
        return iteration
    if graph.tensors[tensor].carried and phase.segment > at:
        return graph.segments[at].repeats if repeats is None else repeats
    return 0


def clears(graph: OpGraph, schedule: Schedule, tensor: str, phase: Phase) -> bool:
    """Whether a phase that writes a tensor also clears the rows it wrote in the slot that the next instance will use."""
    plan = schedule.tensor(tensor)
    return plan.handoff.self_validating and plan.incarnations > 1 and phase.segment == home(graph, tensor)


def signals(graph: OpGraph, phase: Phase) -> bool:
    """Whether a phase has an event. One that writes outputs only has none: nobody in the kernel reads them."""
    return any(not graph.tensors[t].output for t in phase.writes)


def releases(graph: OpGraph, schedule: Schedule, phase: Phase) -> bool:
    """Whether a phase's event releases its stores, because one of the tensors it writes does not prove itself."""
    return any(schedule.tensor(t).handoff.releases for t in phase.writes if not graph.tensors[t].output)


class Awaited(enum.Enum):
    """Which iteration of an earlier phase the event belongs to that a phase waits for."""

    SAME = "the same iteration"
    PREVIOUS = "the iteration before, if there is one"
    LAST = "the last iteration, in the first iteration only"


def awaited(graph: OpGraph, phase: Phase, before: Phase) -> Awaited:
    """Which iteration of `before` a phase waits for. Phases that come later in the loop are waited for one iteration later; those of earlier
    segments once, when they are all done."""
    if before.segment != phase.segment:
        return Awaited.LAST
    return Awaited.SAME if graph.order[before.name] < graph.order[phase.name] else Awaited.PREVIOUS
