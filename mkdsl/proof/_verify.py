"""`verify_schedule`: a proof, without a GPU, that a schedule is safe to run. It reads the graph and the schedule and trusts no search."""

import dataclasses
import itertools
import math
import typing
from collections.abc import Callable
from typing import Any

from mkdsl.graph import OpGraph, Phase, Tensor
from mkdsl.proof._errors import Rule, ScheduleError, require
from mkdsl.proof._legality import check_plan, check_unsplit
from mkdsl.proof._order import Execution
from mkdsl.proof._races import Accesses, exchanges, overtakings
from mkdsl.schedule import AttentionPlan, FoldPlan, Handoff, MapPlan, PhasePlan, Profile, Schedule, TensorPlan, home, shared_memory, signals

MOST_SEQUENCES = 16


def verify_schedule(graph: OpGraph, schedule: Schedule, profile: Profile) -> None:
    """Proves structure, coverage, freedom from deadlock and races, and that shared memory fits.

    Args:
      graph: what the schedule is for.
      schedule: by whomever.
      profile: the GPU it is to run on.

    Raises:
      ScheduleError: something does not hold.
    """
    _check_types(schedule)
    graph = graph.in_order(schedule.order)
    _check_names(graph, schedule)
    _check_ring(schedule, profile)
    _check_resident(schedule, profile)
    for phase in graph.phases:
        plan = schedule.plan(phase.name)
        check_plan(graph, schedule, phase, profile)
        _check_coverage(schedule, phase, plan)
        _check_waits(graph, phase, plan)
    for tensor in graph.tensors.values():
        _check_tensor(graph, schedule, tensor)
    _check_smem(graph, schedule, profile)
    _check_order(graph, schedule)


# Structure.


def _check_types(schedule: Schedule) -> None:
    """Every field is what its annotation says: a schedule may come from a file, and 2.0 items or workers true would compute."""
    for entry in itertools.chain((schedule,), schedule.phases, schedule.tensors):
        of = f"{entry.name}: " if isinstance(entry, PhasePlan | TensorPlan) else ""
        for name, is_kind in _FIELDS[type(entry)]:
            value = getattr(entry, name)
            require(is_kind(value), Rule.TYPE, f"{of}{name} is {str(value)[:80]}, which is none that a schedule has")


def _is(kind: Any) -> Callable[[Any], bool]:
    """Whether a value is of a type, nothing derived from it; times are finite and not negative."""
    if typing.get_origin(kind) is tuple:
        inner = [_is(k) for k in typing.get_args(kind) if k is not Ellipsis]
        if len(inner) < len(typing.get_args(kind)):
            return lambda x: type(x) is tuple and all(map(inner[0], x))
        return lambda x: type(x) is tuple and len(x) == len(inner) and all(f(v) for f, v in zip(inner, x, strict=True))
    if kind is PhasePlan:
        return lambda x: type(x) in (FoldPlan, AttentionPlan, MapPlan)
    if kind is float:
        return lambda x: type(x) in (int, float) and math.isfinite(x) and x >= 0
    return lambda x: type(x) is kind


_FIELDS: dict[type, list[tuple[str, Callable[[Any], bool]]]] = {
    entry: [(f.name, _is(typing.get_type_hints(entry)[f.name])) for f in dataclasses.fields(entry)]
    for entry in (Schedule, FoldPlan, AttentionPlan, MapPlan, TensorPlan)
}


def _check_names(graph: OpGraph, schedule: Schedule) -> None:
    listed = [p.name for p in graph.phases] == list(graph.order)
    require(listed, Rule.NAMES, "the graph's phases are not listed in the order of its segments")
    same = list(graph.order) == list(schedule.order)
    require(same, Rule.NAMES, f"the graph's phases are {list(graph.order)}, the schedule's {list(schedule.order)}")
    for what, wanted, found in (
        ("tensors", list(graph.tensors), [t.name for t in schedule.tensors]),
        ("timed phases", [p.name for p in graph.phases], [name for name, _ in schedule.us]),
    ):
        require(sorted(wanted) == sorted(found), Rule.NAMES, f"the graph's {what} are {wanted}, the schedule's {found}")


def _check_ring(schedule: Schedule, profile: Profile) -> None:
    s = schedule
    padded = 1 <= s.batch <= s.padded_batch and s.padded_batch & (s.padded_batch - 1) == 0
    require(padded, Rule.BATCH, f"batch {s.batch} padded to {s.padded_batch}: not to a power of two")
    few = s.padded_batch <= MOST_SEQUENCES
    require(few, Rule.BATCH, f"batch {s.batch} padded to {s.padded_batch}: a kernel decodes 1 to {MOST_SEQUENCES} sequences")
    require(s.num_stages >= 2, Rule.RING, f"a ring of {s.num_stages} stages: at least 2, one to fill and one to fold")
    require(s.stage_bytes > 0, Rule.RING, f"a stage of {s.stage_bytes} bytes")
    within = 1 <= s.max_in_flight <= s.num_stages
    require(within, Rule.RING, f"{s.max_in_flight} units in flight: from 1 to the ring's {s.num_stages} stages")


def _check_resident(schedule: Schedule, profile: Profile) -> None:
    """All workers run at once, or one that runs could wait for one that never starts."""
    s, most = schedule, profile.workers
    require(1 <= s.workers <= most, Rule.RESIDENT, f"{s.workers} workers: {profile.name} holds {most} at once, and all must be resident")
    sizes = {p.cluster for p in s.phases}
    require(min(sizes) >= 1, Rule.RESIDENT, f"a cluster of {min(sizes)} workers")
    require(len(sizes - {1}) <= 1, Rule.RESIDENT, f"clusters of {sorted(sizes - {1})}: a launch has one size")
    size, most = s.cluster, profile.held(s.cluster)
    known = [n for n, *_ in profile.clusters if profile.held(n)]
    require(most > 0, Rule.RESIDENT, f"clusters of {size}: {profile.name} holds none such, but {known} with {profile.workers} SMs")
    require(s.workers <= most, Rule.RESIDENT, f"{s.workers} workers: {profile.name} holds {most} in clusters of {size}")
    require(s.workers % size == 0, Rule.RESIDENT, f"{s.workers} workers in clusters of {size}")


# Coverage.


def _check_coverage(schedule: Schedule, phase: Phase, plan: PhasePlan) -> None:
    require(len(plan.tasks) == len(phase.parts), Rule.COVERAGE, f"{phase.name}: tasks for {len(plan.tasks)} parts of {len(phase.parts)}")
    for number, (part, wanted) in enumerate(zip(phase.parts, plan.items(phase, schedule.batch), strict=True)):
        of = f"{phase.name}, part {number} ({', '.join(part.writes)})"
        whole = not isinstance(plan, FoldPlan) or part.rows % plan.rows == 0
        require(whole, Rule.TILE, f"{of}: {part.rows} rows are no whole tiles, {plan.tiling}")
        require(
            len(plan.tasks[number]) == schedule.workers,
            Rule.COVERAGE,
            f"{of}: tasks for {len(plan.tasks[number])} workers of {schedule.workers}",
        )
        _check_ranges(of, plan.tasks[number], wanted)


def _check_ranges(of: str, tasks: tuple[tuple[int, int], ...], wanted: int) -> None:
    """Every item below `wanted` once: in order of their first items, each range begins where the last ended."""
    for worker, (first, n) in enumerate(tasks):
        if not (n >= 0 and 0 <= first <= wanted - n):
            raise ScheduleError(Rule.COVERAGE, f"{of}: worker {worker} has items {first} to {first + n - 1} of {wanted}")
    end, last = 0, None
    for first, n, worker in sorted((first, n, worker) for worker, (first, n) in enumerate(tasks) if n):
        require(first <= end, Rule.COVERAGE, f"{of}: nobody has items {end} to {first - 1}; worker {worker} begins at {first}")
        require(first == end, Rule.COVERAGE, f"{of}: workers {last} and {worker} both have item {first}")
        end, last = first + n, worker
    require(end == wanted, Rule.COVERAGE, f"{of}: nobody has items {end} to {wanted - 1}")


# Waits and tensors.


def _check_waits(graph: OpGraph, phase: Phase, plan: PhasePlan) -> None:
    """Every wait is for an event of an earlier step. Workers walk all steps in one order, so the first step that is not yet complete
    waits for complete ones only: no deadlock."""
    for name in plan.waits:
        require(name in graph.order, Rule.WAIT, f"{phase.name}: waits for {name}, which is no phase")
        before = graph.phase(name)
        require(before.segment <= phase.segment, Rule.WAIT, f"{phase.name}: waits for {name} of a later segment: it could never come")
        require(signals(graph, before), Rule.WAIT, f"{phase.name}: waits for {name}, which signals nothing: it writes outputs only")


def _check_tensor(graph: OpGraph, schedule: Schedule, tensor: Tensor) -> None:
    plan, name = schedule.tensor(tensor.name), tensor.name
    wide = plan.dtype == "float32" or (plan.dtype == "bfloat16" and tensor.rounds and plan.splits == 1)
    require(wide, Rule.DTYPE, f"{name}: crosses as {plan.dtype} in {plan.splits} splits, but is read as float32")
    writers = graph.writers[name]
    require(bool(writers), Rule.WRITER, f"{name}: nothing writes it")
    splits = schedule.plan(writers[0].name).splits if tensor.heads else 1
    require(plan.splits == splits, Rule.SPLITS, f"{name}: {plan.splits} splits, its writer {writers[0].name} makes {splits}")
    _check_writers(graph, tensor, writers)
    _check_incarnations(graph, tensor, plan)
    for reader in graph.readers[name]:
        _check_reader(graph, schedule, tensor, reader)


def _check_incarnations(graph: OpGraph, tensor: Tensor, plan: TensorPlan) -> None:
    n, instances = plan.incarnations, graph.segments[home(graph, tensor.name)].repeats + tensor.carried
    if tensor.output:
        require(n == 1, Rule.INCARNATIONS, f"{tensor.name}: {n} incarnations of an output, which has one")
        return
    enough = n > 1 or (n == 1 and (instances == 1 or plan.handoff is Handoff.RELEASE_ACQUIRE))
    require(
        enough,
        Rule.INCARNATIONS,
        f"{tensor.name}: {n} incarnations of {instances} instances: a cleared slot besides the written one needs 2",
    )
    require(
        n <= instances + 1, Rule.INCARNATIONS, f"{tensor.name}: {n} incarnations of {instances} instances: the rest would never be used"
    )


def _check_writers(graph: OpGraph, tensor: Tensor, writers: tuple[Phase, ...]) -> None:
    segments = [p.segment for p in writers]
    once = len(set(segments)) == len(segments) <= 1 + tensor.carried and all(p.writes.count(tensor.name) == 1 for p in writers)
    require(once, Rule.WRITER, f"{tensor.name}: written by {[p.name for p in writers]}, more than once")
    first = all(graph.segments[s].repeats == 1 for s in segments if s != max(segments))
    require(first, Rule.WRITER, f"{tensor.name}: its first instance is written in a loop")
    for part in (part for p in writers for part in p.parts if tensor.name in part.writes):
        require(part.rows == tensor.width, Rule.WRITER, f"{tensor.name}: width {tensor.width}, but {part.rows} rows are written")


def _check_reader(graph: OpGraph, schedule: Schedule, tensor: Tensor, reader: Phase) -> None:
    """A reader that looks until the data is there looks forever if no earlier step writes it."""
    name, segment = tensor.name, home(graph, tensor.name)
    require(not tensor.output, Rule.WRITER, f"{reader.name}: reads {name}, an output")
    if name in reader.row_reads:
        check_unsplit(schedule, reader, (name,))
    order, writers = graph.order, graph.writers[name]
    if reader.segment > segment:
        single = tensor.carried or graph.segments[segment].repeats == 1
        require(
            single, Rule.WRITER, f"{reader.name}: reads {name} after its loop: only the last of {graph.segments[segment].repeats} is left"
        )
    elif tensor.carried:
        first = min(order[w.name] for w in writers) < order[reader.name] and len(writers) == 2
        require(first, Rule.WRITER, f"{reader.name}: reads {name} before it is first written")
    else:
        require(order[writers[0].name] < order[reader.name], Rule.WRITER, f"{reader.name}: reads {name} before {writers[0].name} writes it")


# Shared memory and order.


def _check_smem(graph: OpGraph, schedule: Schedule, profile: Profile) -> None:
    s = schedule
    memory = shared_memory(graph, s.phases, padded_batch=s.padded_batch, num_stages=s.num_stages, stage_bytes=s.stage_bytes)
    require(memory.total == s.smem_bytes, Rule.SHARED_MEMORY, f"shared memory: the schedule says {s.smem_bytes} bytes, the model\n{memory}")
    limit = profile.smem_bytes
    require(memory.total <= limit, Rule.SHARED_MEMORY, f"shared memory: {memory.total} bytes of {profile.name}'s {limit}:\n{memory}")


def _check_order(graph: OpGraph, schedule: Schedule) -> None:
    execution = Execution(graph, schedule)
    fenced = execution.fenced_after({p.name for p in schedule.phases if p.fence})
    found = itertools.chain(overtakings(execution), exchanges(execution))
    for tensor in graph.tensors.values():
        accesses = Accesses(execution, tensor)
        found = itertools.chain(found, accesses.violations(), accesses.unfenced(fenced))
    for violation in found:
        raise ScheduleError(violation.rule, str(violation))
