"""Events between phases: counters that workers signal when they are done with a phase, and wait for before they read what it wrote."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mkdsl.graph import Phase
from mkdsl.lower import _ptx
from mkdsl.lower._machine import Machine, i32
from mkdsl.lower._ptx import COUNTER_STRIDE
from mkdsl.search import signallers

Span = tuple[Any, Any]  # of events: the first, and how many more, -1 for none


def wait(m: Machine, phase: Phase, l: Any) -> None:
    """Waits for the events of the phases that this one reads from; a fence, which takes as long as a trip to memory, comes first. An attention
    waits for those of all its items at once: what it overwrites when it has folded the first may be read by any who signal them."""
    plan, order = m.schedule.plan(phase.name), m.graph.order
    if not m.concurrent:
        return
    if plan.fence:
        _ptx.fence()
    for before in map(m.graph.phase, plan.waits):
        if before.segment != phase.segment:
            _spin(m, phase, before, m.graph.iterations(before), None if m.graph.iterations(phase) == 1 else l == 0)
        elif order[before.name] < order[phase.name]:
            _spin(m, phase, before, l + 1, None)
        else:
            _spin(m, phase, before, l, l > 0)


def _spin(m: Machine, phase: Phase, before: Phase, times: Any, condition: Any) -> None:
    plan, acquire = m.schedule.plan(before.name), _orders(m, before)

    def spin() -> None:
        if plan.events == 1:
            _ptx.wait_for(_counters(m, before), jnp.asarray(times * len(plan.participants), i32), acquire=acquire)
        else:
            _ptx.wait_for_each(_counters(m, before), i32(times), signallers(before, plan), awaits(m, phase, before), acquire=acquire)

    spin() if condition is None else pl.when(condition)(spin)


def signal(m: Machine, phase: Phase) -> None:
    """Says that this worker is done with a phase, unless nobody reads what that writes."""
    if m.concurrent and not all(m.graph.tensors[t].output for t in phase.writes):
        plan, release = m.schedule.plan(phase.name), _orders(m, phase)
        if plan.events == 1:
            _ptx.count_up(_counters(m, phase), release=release)
        else:
            _ptx.count_up_each(_counters(m, phase), plan.events, signals(m, phase), release=release)


def _orders(m: Machine, phase: Phase) -> bool:
    """Whether a phase's events release what was written before them: data that does not prove itself."""
    return any(m.schedule.tensor(t).handoff == "counter" for t in phase.writes if not m.graph.tensors[t].output)


def _counters(m: Machine, phase: Phase) -> Any:
    """Of a phase's events, the first words of so many cache lines."""
    plans = [m.schedule.plan(p.name) for p in m.graph.phases]
    at = [p.name for p in plans].index(phase.name)
    first, n = sum(p.events for p in plans[:at]), plans[at].events
    return m.refs["counters"].at[pl.ds(first * COUNTER_STRIDE, (n - 1) * COUNTER_STRIDE + 1)]


def signals(m: Machine, phase: Phase) -> list[Span]:
    """Those of a phase that this worker signals."""
    plan = m.schedule.plan(phase.name)
    return [s for part, each in enumerate(plan.items_each(phase)) for s in _spans(m, phase, part, each, plan.events)]


def awaits(m: Machine, phase: Phase, before: Phase) -> list[Span]:
    """Those of a phase before that this worker waits for."""
    events, each = m.schedule.plan(before.name).events, m.schedule.items_awaiting(m.graph, phase, before)
    return [(i32(0), i32(events - 1))] if each is None else _spans(m, phase, 0, each, events)


def _spans(m: Machine, phase: Phase, part: int, each: int, events: int) -> list[Span]:
    """For each of the cluster whose items this worker folds, those that these items fall under, `each` consecutive ones under one, and after
    the last event comes the first."""
    spans = []
    for mate in m.mates(phase):
        first, n = m.tasks(phase, part, mate)
        start = lax.div(first, each)
        spans.append((lax.rem(start, events), jnp.where(n > 0, lax.div(first + n - 1, each) - start, -1)))
    return spans
