"""The page that `mkdsl explain --html` writes: everything in one file, which fetches nothing. Python says what there is, `page/` how it looks."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from mkdsl.graph import OpGraph, Phase
from mkdsl.schedule import Profile, Schedule, TensorPlan, awaited
from mkdsl.search import BOUNDS, Account, Summary, accounts, runners_up, summary
from mkdsl.simulate import Timeline, simulate

PARTS = pathlib.Path(__file__).parent / "page"
NS = 1000  # in a microsecond: times are whole nanoseconds in the page


def page(
    model: str,
    graph: OpGraph,
    schedule: Schedule,
    profile: Profile,
    *,
    measured: Timeline | None = None,
    device: str = "",
    alternatives: bool = True,
) -> str:
    """A self-contained HTML page about a schedule: summary, timeline, shared memory, a table of phases.

    Args:
      model: a name for what is decoded.
      graph: what it is a schedule of.
      schedule: the schedule.
      profile: the GPU it is for.
      measured: what a kernel's own stamps said, to stand beside the prediction.
      device: the GPU that they were taken on.
      alternatives: also what came second, which takes another search or so.
    """
    graph = graph.in_order(schedule.order)
    predicted = simulate(graph, schedule, profile, whole=True)
    found = accounts(graph, schedule, profile, predicted)
    timelines = [_timeline("predicted", graph, predicted, found)]
    if measured is not None:
        timelines.append(_timeline("measured", graph, measured, accounts(graph, schedule, profile, measured)))
    about = summary(graph, schedule, profile, found)
    second = runners_up(graph, schedule, profile) if alternatives else ()
    data = {
        "model": model,
        "device": device,
        "summary": _summary(about, schedule),
        "timelines": timelines,
        "memory": [[e.name, e.bytes, e.depth, graph.order.get(e.phase, -1)] for e in about.memory.extents],
        "second": [[a.of, a.what, a.shown_us, a.why] for a in second],
    }
    return _assembled(data | _plan(graph, schedule))


def _assembled(data: Any) -> str:
    """The page's parts in one. In the JSON no "<" may end the element that it stands in."""
    text = _read("page.html")
    for part in ("page.css", "model.js", "timeline.js", "tip.js", "report.js"):
        text = text.replace(f"/* {part} */", _read(part))
    return text.replace("/* data */", json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c"))


def _read(part: str) -> str:
    return (PARTS / part).read_text(encoding="utf-8")


def _summary(about: Summary, schedule: Schedule) -> dict[str, Any]:
    numbers = {f.name: getattr(about, f.name) for f in dataclasses.fields(about) if f.name != "memory"}
    ring = {"stages": schedule.num_stages, "bytes": schedule.stage_bytes, "in_flight": schedule.max_in_flight}
    return numbers | {"smem_peak": about.memory.total, "smem_peak_phase": about.memory.peak, "ring": ring}


def _plan(graph: OpGraph, schedule: Schedule) -> dict[str, Any]:
    def tensor(t: TensorPlan) -> list[Any]:
        return [t.name, "output" if graph.tensors[t.name].output else t.handoff, t.incarnations, t.splits, t.dtype]

    return {
        "segments": [{"repeats": s.repeats, "phases": [graph.order[name] for name in s.phases]} for s in graph.segments],
        "phases": [_phase(p, graph, schedule) for p in graph.phases],
        "tensors": [tensor(t) for t in schedule.tensors],
    }


def _phase(phase: Phase, graph: OpGraph, schedule: Schedule) -> dict[str, Any]:
    plan = schedule.plan(phase.name)
    return {
        "name": phase.name,
        "kind": phase.kind,
        "items": [sum(n for _, n in part) for part in plan.tasks],
        "workers": len(plan.participants),
        "tiling": plan.tiling,
        "waits": [[graph.order[w], awaited(graph, phase, graph.phase(w)).name] for w in plan.waits],
        "fence": plan.fence,
    }


def _timeline(name: str, graph: OpGraph, timeline: Timeline, found: Sequence[Account]) -> dict[str, Any]:
    told = [dataclasses.asdict(a) | {"bound": a.bound, "explained": {b: a.explained_us(b) for b in BOUNDS}} for a in found]
    return {"name": name, "us": timeline.us, "cohorts": list(_cohorts(graph, timeline)), "accounts": told}


def _cohorts(graph: OpGraph, timeline: Timeline) -> Iterator[list[list[int]]]:
    """Of each cohort its workers and its spans in program order, six numbers each: steps since the span before, nanoseconds from its end to this one's
    arrival (from 0 for the first), and how long it waits, reads, folds and finishes. Steps are executions of phases in program order."""
    steps = {(name, i): n for n, (name, i) in enumerate((name, i) for s in graph.segments for i in range(s.repeats) for name in s.phases)}
    spans: list[list[tuple[int, ...]]] = [[] for _ in timeline.cohorts]
    for s in timeline.spans:
        spans[s.cohort].append((steps[s.phase, s.iteration], *(round(us * NS) for us in s[3:])))
    for workers, found in zip(timeline.cohorts, spans, strict=True):
        numbers, step, now = [], 0, 0
        for at, *moments in sorted(found):
            ends = [now, *moments]
            numbers += [at - step, *(b - a for a, b in zip(ends, moments, strict=False))]
            step, now = at, moments[-1]
        yield [list(workers), numbers]
