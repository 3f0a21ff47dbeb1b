"""A schedule in words and numbers: what was decided, what it should cost, and what bounds it."""

from collections.abc import Sequence

from mkdsl.graph import OpGraph, Phase
from mkdsl.search._cost import floor_us
from mkdsl.search._profile import KIB, Profile
from mkdsl.search._schedule import PhasePlan, Schedule
from mkdsl.search._smem import shared_memory

HEADER = ("phase", "kind", "items", "tile", "chunk", "pieces", "group", "splits", "workers", "MB", "us", "bound us", "waits for")


def explain(graph: OpGraph, schedule: Schedule, profile: Profile) -> str:
    """A readable plain-text account of a schedule.

    Args:
      graph: what it is a schedule of.
      schedule: the schedule.
      profile: the GPU it is for.

    Returns:
      One table row per phase (streamed megabytes and predicted microseconds of one execution, and the time device memory needs for it),
      the ring, shared memory by extent, hand-offs, and the predicted time of a step next to its floor. Times are the cost model's.
    """
    s = schedule
    memory = shared_memory(graph, s.phases, padded_batch=s.padded_batch, stages=s.stages, stage_bytes=s.stage_bytes)
    floor = floor_us(graph, s.batch, profile)
    copies = ", ".join(f"{t.name} {t.handoff} x{t.incarnations}" + (f" in {t.splits} splits" if t.splits > 1 else "") for t in s.tensors)
    lines = [
        f"{s.target}, batch {s.batch}" + (f" (padded to {s.padded_batch})" if s.padded_batch != s.batch else "") + f", {s.workers} workers"
    ]
    for segment in graph.segments:
        rows = [_row(graph.phase(name), s, profile) for name in segment.phases]
        lines += [f"{segment.repeats} x", *_table([HEADER, *rows])]
    lines += [f"ring: {s.stages} stages of {s.stage_bytes // KIB} KiB, {s.window} in flight", "shared memory of a worker:", str(memory)]
    lines += [f"fences in: {', '.join(p.name for p in s.phases if p.fence) or 'none'}", f"tensors: {copies}"]
    lines += [f"predicted: {s.predicted_us:.0f} us a step; floor {floor:.0f} us (streamed bytes at {profile.bandwidth / 1e12:.2f} TB/s)"]
    return "\n".join(lines)


def _row(phase: Phase, schedule: Schedule, profile: Profile) -> tuple[str, ...]:
    plan, streamed = schedule.plan(phase.name), phase.streamed_bytes(schedule.batch)
    items = "+".join(str(sum(n for _, n in part)) for part in plan.tasks)
    cells = (phase.kind, items, _tile(phase, plan), plan.chunk or "", plan.pieces, plan.group, plan.splits, len(plan.participants()))
    times = (f"{streamed / 1e6:.1f}", f"{dict(schedule.us)[phase.name]:.1f}", f"{streamed / profile.bandwidth * 1e6:.1f}")
    return (phase.name, *map(str, cells), *times, ", ".join(plan.waits) or "-")


def _tile(phase: Phase, plan: PhasePlan) -> str:
    return f"{plan.rows} x {plan.parts}" if phase.kind == "fold" else f"{plan.rows}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns padded to their widest cell; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = (0, 1, len(widths) - 1)
    out = []
    for row in rows:
        cells = [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        out.append(("  " + "  ".join(cells)).rstrip())
    return out
