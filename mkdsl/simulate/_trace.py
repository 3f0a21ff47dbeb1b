"""The predicted timeline for Perfetto (ui.perfetto.dev): one track per SM, in the trace event format."""

from typing import Any

from mkdsl.simulate._timeline import Span, Timeline

PARTS = (("wait", "arrived", "known"), ("read", "known", "read"), ("fold", "read", "folded"), ("epilogue", "folded", "signalled"))


def trace_events(timeline: Timeline) -> dict[str, Any]:
    """A trace as plain data for `json.dump`: each execution of a phase on each SM, and in it the wait for its input, reading it, folding,
    and its epilogue. Times in microseconds, as the format wants them."""
    events: list[dict[str, Any]] = []
    for worker in sorted(w for cohort in timeline.cohorts for w in cohort):
        events.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": worker, "args": {"name": f"SM {worker}"}})
    for span in timeline.spans:
        for worker in timeline.cohorts[span.cohort]:
            events += _slices(span, worker)
    return {"traceEvents": events, "displayTimeUnit": "ns"}


def _slices(span: Span, worker: int) -> list[dict[str, Any]]:
    whole = _slice(span.phase, worker, span.arrived, span.signalled) | {"args": {"iteration": span.iteration}}
    return [whole, *(_slice(name, worker, getattr(span, start), getattr(span, end)) for name, start, end in PARTS)]


def _slice(name: str, worker: int, start: float, end: float) -> dict[str, Any]:
    return {"ph": "X", "name": name, "pid": 0, "tid": worker, "ts": round(start, 3), "dur": round(end - start, 3)}
