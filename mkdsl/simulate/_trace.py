"""Timelines for Perfetto (ui.perfetto.dev): one track per SM, in the trace event format."""

from collections.abc import Iterator
from typing import Any

from mkdsl.simulate._timeline import PARTS, Span, Timeline

Event = dict[str, Any]


def trace_events(predicted: Timeline, measured: Timeline | None = None) -> dict[str, Any]:
    """A trace as plain data for `json.dump`: each execution of a phase on each SM, and in it the wait for its input, reading it, folding,
    and its epilogue. Times in microseconds, as the format wants them. What was measured is a process of its own, below what was predicted."""
    timelines = [("predicted", predicted), *([("measured", measured)] if measured else [])]
    events = [event for pid, (name, timeline) in enumerate(timelines) for event in _process(pid, name, timeline)]
    return {"traceEvents": events, "displayTimeUnit": "ns"}


def _process(pid: int, name: str, timeline: Timeline) -> Iterator[Event]:
    yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}
    yield {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}}
    for worker in sorted(w for cohort in timeline.cohorts for w in cohort):
        yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": worker, "args": {"name": f"SM {worker}"}}
    for span in timeline.spans:
        for worker in timeline.cohorts[span.cohort]:
            yield from _slices(span, pid, worker)


def _slices(span: Span, pid: int, worker: int) -> Iterator[Event]:
    def slice_of(name: str, start: float, end: float) -> Event:
        return {"ph": "X", "name": name, "pid": pid, "tid": worker, "ts": round(start, 3), "dur": round(end - start, 3)}

    yield slice_of(span.phase, span.arrived, span.signalled) | {"args": {"iteration": span.iteration}}
    yield from (slice_of(name, getattr(span, start), getattr(span, end)) for name, start, end in PARTS)
