"""Events between phases: counters that workers signal when they are done with a phase, and wait for before they read what it wrote."""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from mkdsl.graph import Phase
from mkdsl.lower import _ptx
from mkdsl.lower._machine import Machine, i32
from mkdsl.lower._ptx import COUNTER_STRIDE


def wait(m: Machine, phase: Phase, l: Any) -> None:
    """Waits for the events of the phases that this one reads from; a fence, which takes as long as a trip to memory, comes first."""
    plan, order = m.schedule.plan(phase.name), m.graph.order
    if not m.concurrent:
        return
    if plan.fence:
        _ptx.fence()
    for before in map(m.graph.phase, plan.waits):
        if before.segment != phase.segment:
            _spin(m, before, m.graph.iterations(before), None if m.graph.iterations(phase) == 1 else l == 0)
        elif order[before.name] < order[phase.name]:
            _spin(m, before, l + 1, None)
        else:
            _spin(m, before, l, l > 0)


def _spin(m: Machine, before: Phase, times: Any, condition: Any) -> None:
    workers = len(m.schedule.plan(before.name).participants)

    def spin() -> None:
        _ptx.wait_for(_counter(m, before), jnp.asarray(times * workers, i32), acquire=_orders(m, before))

    spin() if condition is None else pl.when(condition)(spin)


def signal(m: Machine, phase: Phase) -> None:
    """Says that this worker is done with a phase, unless nobody reads what that writes."""
    if m.concurrent and not all(m.graph.tensors[t].output for t in phase.writes):
        _ptx.count_up(_counter(m, phase), release=_orders(m, phase))


def _orders(m: Machine, phase: Phase) -> bool:
    """Whether a phase's event releases what was written before it: data that does not prove itself."""
    return any(m.schedule.tensor(t).handoff == "counter" for t in phase.writes if not m.graph.tensors[t].output)


def _counter(m: Machine, phase: Phase) -> Any:
    index = [p.name for p in m.graph.phases].index(phase.name)
    return m.refs["counters"].at[pl.ds(index * COUNTER_STRIDE, 1)]
