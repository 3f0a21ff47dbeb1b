"""Kernels whose workers have waited for each other past their deadline, raised."""

import itertools
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

from mkdsl.graph import OpGraph
from mkdsl.lower import GivenUp, Program, Wanted

LONGEST = 86400  # seconds of a deadline
SHOWN = 4  # different waits of which the message tells
REMEDY = (
    "The results and the donated cache are lost; a new call starts afresh. A schedule is proven not to hang: report this as a bug of mkdsl."
)


class HangError(RuntimeError):
    """Workers of a kernel waited for each other past the deadline, gave up, and the kernel ended: its results and the cache mean nothing.

    Attributes:
      given_up: what each worker waited for that gave up, the least advanced first.
    """

    def __init__(self, message: str, given_up: Sequence[GivenUp]) -> None:
        super().__init__(message)
        self.given_up = tuple(given_up)


def check_deadline(deadline: float, interpret: bool) -> None:
    """Raises TypeError or ValueError for what is no deadline of a kernel."""
    if isinstance(deadline, bool) or not isinstance(deadline, numbers.Real):
        raise TypeError(f"mk.jit: {deadline=}; pass seconds, such as 1.0, or None for no deadline")
    if not 0 < deadline <= LONGEST:
        raise ValueError(f"mk.jit: {deadline=}; pass seconds, more than 0 and at most {LONGEST}, such as 1.0")
    if interpret:
        raise ValueError(
            f"mk.jit: {deadline=} with {interpret=}: an interpreted kernel is one launch per phase, which nobody waits in; leave it out"
        )


def run_in_time(executable: Any, program: Program, *args: Any) -> Any:
    """The results of a program with a deadline, once they are there. Raises HangError if its workers gave up."""
    out, counters = executable(*args)
    raise_if_hung(program, counters)
    return out


def raise_if_hung(program: Program, counters: Any) -> None:
    """Raises HangError if workers of a program with a deadline gave up; `program.watched` returns the counters, which this waits for."""
    if found := program.given_up(np.asarray(counters)):
        raise HangError(_message(program, found), found)


def _message(program: Program, found: Sequence[GivenUp]) -> str:
    waits: dict[str, list[int]] = {}
    for one in found:
        waits.setdefault(_wait(program.graph, one), []).append(one.worker)
    shown = [f"  {_workers(workers)} waited {wait}" for wait, workers in itertools.islice(waits.items(), SHOWN)]
    rest = [f"  and {len(waits) - SHOWN} other waits"] if len(waits) > SHOWN else []
    late = f"{program.deadline} s after the kernel began (deadline={program.deadline})"
    head = f"mk.jit: {len(found)} of {program.schedule.workers} workers gave up waiting for each other, {late}"
    return "\n".join([head, *shown, *rest, REMEDY])


def _wait(graph: OpGraph, g: GivenUp) -> str:
    phase = graph.phase(g.wait.phase)
    where = f"in {phase.kind} {phase.name!r}, iteration {g.iteration}{f' ({phase.where})' if phase.where else ''},"
    if g.wait.wanted is Wanted.EVENT:
        return f"{where} for the event of {g.wait.event!r}: {g.seen} of {g.wanted} signals had come"
    if g.wait.wanted is Wanted.DATA:
        return f"{where} for data of {' or '.join(map(repr, g.tensors))} that had been signalled and was not there"
    return f"{where} for what the workers of its cluster send each other"


def _workers(workers: Sequence[int]) -> str:
    """Such as: workers 0 to 2 and 5."""
    runs: list[list[int]] = []
    for w in sorted(workers):
        if runs and runs[-1][-1] == w - 1:
            runs[-1].append(w)
        else:
            runs.append([w])
    *most, last = itertools.chain.from_iterable([f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run) for run in runs)
    return f"worker{'s' if len(workers) > 1 else ''} {', '.join(most)}{' and ' if most else ''}{last}"
