"""Events between phases: counters that workers signal when they are done with a phase, and wait for before they read what it wrote."""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from mkdsl.graph import Phase
from mkdsl.lower._machine import Machine, i32
from mkdsl.lower._types import Index, Ref
from mkdsl.lower._waits import Wanted
from mkdsl.lower.mosaic import _ptx
from mkdsl.lower.mosaic._deadline import Watch
from mkdsl.schedule import Awaited, awaited, releases, signals


def wait(m: Machine, phase: Phase, iteration: Index) -> None:
    """Waits for the events of the phases that this one reads from; a fence, which takes as long as a trip to memory, comes first."""
    plan = m.schedule.plan(phase.name)
    if not m.concurrent:
        return
    if plan.fence:
        _ptx.fence()
    for before in map(m.graph.phase, plan.waits):
        watch = m.watch(phase, iteration, Wanted.EVENT, event=before.name)
        match awaited(m.graph, phase, before):
            case Awaited.LAST:
                once = m.graph.iterations(phase) == 1
                _spin(m, before, m.graph.iterations(before), None if once else iteration == 0, watch)
            case Awaited.SAME:
                _spin(m, before, iteration + 1, None, watch)
            case Awaited.PREVIOUS:
                _spin(m, before, iteration, iteration > 0, watch)


def _spin(m: Machine, before: Phase, iterations: Index, condition: Index | None, watch: Watch | None) -> None:
    """Waits, if the condition holds, until so many iterations of a phase are done."""
    workers, acquire = len(m.schedule.plan(before.name).participants), releases(m.graph, m.schedule, before)

    def spin() -> None:
        _ptx.wait_for(_counter(m, before), jnp.asarray(iterations * workers, i32), acquire=acquire, watch=watch)

    spin() if condition is None else pl.when(condition)(spin)


def signal(m: Machine, phase: Phase) -> None:
    """Says that this worker is done with a phase, unless nobody reads what that writes."""
    if m.concurrent and signals(m.graph, phase):
        _ptx.count_up(_counter(m, phase), release=releases(m.graph, m.schedule, phase))


def _counter(m: Machine, phase: Phase) -> Ref:
    """The first word of a cache line of its own."""
    index = [p.name for p in m.graph.phases].index(phase.name)
    return m.refs["counters"].at[pl.ds(index * _ptx.COUNTER_STRIDE, 1)]
