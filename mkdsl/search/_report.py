"""A schedule in words and numbers: a summary, what was decided and what came second, where time should go and what bounds it, shared memory."""

from collections.abc import Iterator, Sequence

from mkdsl.graph import OpGraph, Phase
from mkdsl.schedule import KIB, Profile, Schedule, TensorPlan
from mkdsl.search._account import Account, Summary, accounts, summary
from mkdsl.search._alternatives import Alternative, runners_up
from mkdsl.simulate import PARTS, Timeline, simulate

# Headings of tables; below one with ">" stand numbers, to the right.
CHOSEN = ("phase", ">runs", "kind", ">items", ">workers", "tiling", "waits for", "fence")
TENSORS = ("tensor", "hand-off", ">slots", ">splits", "dtype")
OF_A_WORKER = tuple(f">{name}" for name, *_ in PARTS)
TIMES = ("phase", ">MB", ">us", ">bytes us", ">compute us", *OF_A_WORKER, "bound by")
MEASURED = ("phase", ">us", ">predicted", *OF_A_WORKER)
SECOND = ("phase or tensor", "instead", ">us", "")

WORDS = (
    ("phase", "what workers do between two hand-offs: a fold streams weights, an attention a cache, a map nothing; with all that is fused into it"),
    ("hand-off", "a result on its way from the workers that wrote it to those that wait for it"),
    ("runs, items", "how often a step runs a phase; the pieces of its work (of each part of it), spread over the workers"),
    ("us", "microseconds of one run, from the last signal of the phases before to its own last"),
    ("bytes us", "what device memory alone needs for the run's bytes; a run may be shorter, since its first are in shared memory already"),
    ("compute us", "what the busiest worker's arithmetic needs"),
    ("bound by", "bytes or compute, if that is most of us; else hand-off: waiting for results and short dependent steps, and how long they show"),
    ("wait ... epilogue", "what the median worker does: waits for its input, reads it, folds, finishes and signals"),
    ("slots, splits", "copies of a tensor that iterations use in turn; partial results of it, which its readers merge"),
)  # fmt: skip


def explain(
    graph: OpGraph, schedule: Schedule, profile: Profile, *, alternatives: bool = True, model: str = "", measured: Timeline | None = None
) -> str:
    """A readable plain-text account of a schedule.

    Args:
      graph: what it is a schedule of.
      schedule: the schedule.
      profile: the GPU it is for.
      alternatives: also what came second for each phase and tensor, which takes another search or so.
      model: a name for what is decoded.
      measured: what a kernel's own stamps said, to stand beside the prediction.

    Returns:
      A summary of a few lines and the words that the rest uses. Then tables of what was decided per phase, of hand-offs, of the predicted time of one
      run in the steady state of its loop, and shared memory over the schedule. Times are the simulator's, in microseconds.
    """
    graph = graph.in_order(schedule.order)
    found = accounts(graph, schedule, profile, simulate(graph, schedule, profile))
    about = summary(graph, schedule, profile, found)
    lines = [*_summary(about, schedule, model, measured), "words (docs/explain.md says more):"]
    lines += [f"  {word:<18} {text}" for word, text in WORDS]
    lines += ["what was decided:", *_table([CHOSEN, *(_chosen(p, graph, schedule) for p in graph.phases)])]
    lines += ["what crosses phases:", *_tensors(graph, schedule)]
    lines += ["where time goes, as predicted:", *_table([TIMES, *map(_times, found)])]
    if measured is not None:
        lines += ["where time went, by the kernel's own stamps:", *_measured(found, accounts(graph, schedule, profile, measured))]
    if alternatives:
        lines += ["what came second (us more a step, all else as it is; of phases by the cost model, of tensors by the simulator):"]
        lines += _table([SECOND, *map(_second, runners_up(graph, schedule, profile))])
    return "\n".join([*lines, "shared memory of a worker, over the schedule:", str(about.memory)])


def _summary(s: Summary, schedule: Schedule, model: str, measured: Timeline | None) -> Iterator[str]:
    padding = f" (padded to {s.padded_batch})" if s.padded_batch != s.batch else ""
    yield f"{model + ' on ' if model else ''}{s.target}: batch {s.batch}{padding}, context {s.context}, {s.workers} workers, each an SM of its own"
    yield f"  time           {s.us:.0f} us a step, predicted; {s.us / s.floor_us:.2f} x the floor"
    if measured is not None:
        yield f"  measured       {measured.us:.0f} us, in the kernel with stamps; predicted {s.us / measured.us - 1:+.1%}"
    yield f"  floor          {s.floor_us:.0f} us: {s.streamed / 1e6:.1f} MB a step at {s.bandwidth / 1e12:.2f} TB/s"
    total = sum(us for us, _ in s.bounds.values())
    yield "  bound by       " + "; ".join(f"{b}, {us / total:.0%} of the time{_binds(of)}" for b, (us, of) in s.bounds.items())
    ring = f"the ring is {schedule.num_stages} stages of {_kib(schedule.stage_bytes)}, {schedule.max_in_flight} in flight"
    over = " (more than there is)" if s.memory.total > s.smem_limit else ""
    yield f"  shared memory  {_kib(s.memory.total)} of {_kib(s.smem_limit)}{over} at the peak, in {s.memory.peak}; {ring}"


def _binds(phases: Sequence[str]) -> str:
    return f" (binds {', '.join(phases)})" if phases else ""


def _kib(size: int) -> str:
    return f"{size / KIB:.1f} KiB".replace(".0 ", " ")


def _chosen(phase: Phase, graph: OpGraph, schedule: Schedule) -> tuple[str, ...]:
    plan, runs = schedule.plan(phase.name), f"{graph.iterations(phase)} x"
    items = "+".join(str(sum(n for _, n in part)) for part in plan.tasks)
    waits = ", ".join(plan.waits) or "-"
    return phase.name, runs, phase.kind, items, str(len(plan.participants)), plan.tiling, waits, "yes" if plan.fence else "-"


def _tensors(graph: OpGraph, schedule: Schedule) -> list[str]:
    def row(t: TensorPlan) -> tuple[str, ...]:
        return t.name, "output" if graph.tensors[t.name].output else t.handoff, str(t.incarnations), str(t.splits), t.dtype

    return _table([TENSORS, *map(row, schedule.tensors)])


def _times(a: Account) -> tuple[str, ...]:
    bound = f"hand-off ({a.exposed_us:.1f} us)" if a.bound == "hand-off" else a.bound
    return a.phase, f"{a.streamed / 1e6:.1f}", *(f"{x:.1f}" for x in (a.us, a.bytes_us, a.compute_us, *a.parts.values())), bound


def _measured(predicted: Sequence[Account], found: Sequence[Account]) -> list[str]:
    rows = [(a.phase, *(f"{x:.1f}" for x in (a.us, p.us, *a.parts.values()))) for p, a in zip(predicted, found, strict=True)]
    return _table([MEASURED, *rows])


def _second(a: Alternative) -> tuple[str, ...]:
    return a.of, a.what, f"{a.shown_us:.1f}", a.why


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell."""
    columns = []
    for heading, *cells in zip(*rows, strict=True):
        number, cells = heading.startswith(">"), [heading.removeprefix(">"), *cells]
        width = max(map(len, cells))
        columns.append([c.rjust(width) if number else c.ljust(width) for c in cells])
    return [("  " + "  ".join(row)).rstrip() for row in zip(*columns, strict=True)]
