"""Plays a schedule and predicts its time.

In: a graph, a schedule, a profile. Out: a `Timeline`. It reads `graph` and `schedule` only, and never imports the search that asks for it.
"""

from mkdsl.simulate._simulate import simulate
from mkdsl.simulate._timeline import PARTS, Span, Timeline, observed
from mkdsl.simulate._trace import trace_events
from mkdsl.simulate._work import Work, Workload

__all__ = ["PARTS", "Span", "Timeline", "Work", "Workload", "observed", "simulate", "trace_events"]
