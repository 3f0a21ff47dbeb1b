"""`verify_schedule`: a proof, without a GPU, that a schedule is safe to run. It reads the graph and the schedule and trusts no search."""

import dataclasses
import itertools
import math
import typing
from collections.abc import Callable
from typing import Any

from mkdsl.graph import OpGraph, Phase, Tensor
from mkdsl.search._assign import items
from mkdsl.search._order import Execution
from mkdsl.search._plans import ScheduleError, check_plan, check_unsplit, require
from mkdsl.search._profile import Profile
from mkdsl.search._races import Accesses, exchanges, home, overtakings
from mkdsl.search._schedule import PhasePlan, Schedule, TensorPlan
from mkdsl.search._smem import shared_memory

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
    _check_clusters(schedule, profile)
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
            require(is_kind(value), f"{of}{name} is {str(value)[:80]}, which is none that a schedule has")


def _is(kind: Any) -> Callable[[Any], bool]:
    """Whether a value is of a type, nothing derived from it; times are finite and not negative."""
    if typing.get_origin(kind) is tuple:
        inner = [_is(k) for k in typing.get_args(kind) if k is not Ellipsis]
        if len(inner) < len(typing.get_args(kind)):
            return lambda x: type(x) is tuple and all(map(inner[0], x))
        return lambda x: type(x) is tuple and len(x) == len(inner) and all(f(v) for f, v in zip(inner, x, strict=True))
    if kind is float:
        return lambda x: type(x) in (int, float) and math.isfinite(x) and x >= 0
    return lambda x: type(x) is kind


_FIELDS = {
    entry: [(f.name, _is(typing.get_type_hints(entry)[f.name])) for f in dataclasses.fields(entry)]
    for entry in (Schedule, PhasePlan, TensorPlan)
}


def _check_names(graph: OpGraph, schedule: Schedule) -> None:
    require([p.name for p in graph.phases] == list(graph.order), "the graph's phases are not listed in the order of its segments")
    require(list(graph.order) == list(schedule.order), f"the graph's phases are {list(graph.order)}, the schedule's {list(schedule.order)}")
    for what, wanted, found in (
        ("tensors", list(graph.tensors), [t.name for t in schedule.tensors]),
        ("timed phases", [p.name for p in graph.phases], [name for name, _ in schedule.us]),
    ):
        require(sorted(wanted) == sorted(found), f"the graph's {what} are {wanted}, the schedule's {found}")


def _check_ring(schedule: Schedule, profile: Profile) -> None:
    s = schedule
    require(
        1 <= s.batch <= s.padded_batch and s.padded_batch & (s.padded_batch - 1) == 0,
        f"batch {s.batch} padded to {s.padded_batch}: not to a power of two",
    )
    require(
        s.padded_batch <= MOST_SEQUENCES, f"batch {s.batch} padded to {s.padded_batch}: a kernel decodes 1 to {MOST_SEQUENCES} sequences"
    )
    most = profile.workers
    require(1 <= s.workers <= most, f"{s.workers} workers: {profile.name} holds {most} at once, and all must be resident")
    require(s.stages >= 2, f"a ring of {s.stages} stages: at least 2, one to fill and one to fold")
    require(s.stage_bytes > 0, f"a stage of {s.stage_bytes} bytes")
    require(1 <= s.window <= s.stages, f"window {s.window}: from 1 to the ring's {s.stages} stages")


def _check_clusters(schedule: Schedule, profile: Profile) -> None:
    sizes = {p.cluster for p in schedule.phases}
    require(min(sizes) >= 1, f"a cluster of {min(sizes)} workers")
    require(len(sizes - {1}) <= 1, f"clusters of {sorted(sizes - {1})}: a launch has one size")
    size, most = schedule.cluster, profile.held(schedule.cluster)
    require(
        most > 0,
        f"clusters of {size}: {profile.name} holds none such, but {[n for n, *_ in profile.clusters if profile.held(n)]} with {profile.workers} SMs",
    )
    require(schedule.workers <= most, f"{schedule.workers} workers: {profile.name} holds {most} in clusters of {size}")
    require(schedule.workers % size == 0, f"{schedule.workers} workers in clusters of {size}")


# Coverage.


def _check_coverage(schedule: Schedule, phase: Phase, plan: PhasePlan) -> None:
    require(len(plan.tasks) == len(phase.parts), f"{phase.name}: tasks for {len(plan.tasks)} parts of {len(phase.parts)}")
    for number, (part, wanted) in enumerate(zip(phase.parts, items(phase, plan, schedule.batch), strict=True)):
        of = f"{phase.name}, part {number} ({', '.join(part.writes)})"
        require(phase.kind != "fold" or part.rows % plan.rows == 0, f"{of}: {part.rows} rows in tiles of {plan.rows}")
        require(len(plan.tasks[number]) == schedule.workers, f"{of}: tasks for {len(plan.tasks[number])} workers of {schedule.workers}")
        _check_ranges(of, plan.tasks[number], wanted)


def _check_ranges(of: str, tasks: tuple[tuple[int, int], ...], wanted: int) -> None:
    """Every item below `wanted` once: in order of their first items, each range begins where the last ended."""
    for worker, (first, n) in enumerate(tasks):
        if not (n >= 0 and 0 <= first <= wanted - n):
            raise ScheduleError(f"{of}: worker {worker} has items {first} to {first + n - 1} of {wanted}")
    end, last = 0, None
    for first, n, worker in sorted((first, n, worker) for worker, (first, n) in enumerate(tasks) if n):
        require(first <= end, f"{of}: nobody has items {end} to {first - 1}; worker {worker} begins at {first}")
        require(first == end, f"{of}: workers {last} and {worker} both have item {first}")
        end, last = first + n, worker
    require(end == wanted, f"{of}: nobody has items {end} to {wanted - 1}")


# Waits and tensors.


def _check_waits(graph: OpGraph, phase: Phase, plan: PhasePlan) -> None:
    """Every wait is for an event of an earlier step. Workers walk all steps in one order, so the first step that is not yet complete
    waits for complete ones only: no deadlock."""
    for name in plan.waits:
        require(name in graph.order, f"{phase.name}: waits for {name}, which is no phase")
        before = graph.phase(name)
        require(before.segment <= phase.segment, f"{phase.name}: waits for {name} of a later segment: it could never come")
        signals = any(not graph.tensors[t].output for t in before.writes)
        require(signals, f"{phase.name}: waits for {name}, which signals nothing: it writes outputs only")


def _check_tensor(graph: OpGraph, schedule: Schedule, tensor: Tensor) -> None:
    plan, name = schedule.tensor(tensor.name), tensor.name
    require(plan.handoff in ("data", "counter"), f"{name}: handed over by {plan.handoff!r}, neither data nor counter")
    wide = plan.dtype == "float32" or (plan.dtype == "bfloat16" and tensor.rounds and plan.splits == 1)
    require(wide, f"{name}: crosses as {plan.dtype} in {plan.splits} splits, but is read as float32")
    writers = graph.writers[name]
    require(bool(writers), f"{name}: nothing writes it")
    splits = schedule.plan(writers[0].name).splits if tensor.heads else 1
    require(plan.splits == splits, f"{name}: {plan.splits} splits, its writer {writers[0].name} makes {splits}")
    _check_writers(graph, tensor, writers)
    _check_incarnations(graph, tensor, plan)
    for reader in graph.readers[name]:
        _check_reader(graph, schedule, tensor, reader)


def _check_incarnations(graph: OpGraph, tensor: Tensor, plan: TensorPlan) -> None:
    n, instances = plan.incarnations, graph.segments[home(graph, tensor.name)].repeats + tensor.carried
    if tensor.output:
        require(n == 1, f"{tensor.name}: {n} incarnations of an output, which has one")
        return
    enough = n > 1 or (n == 1 and (instances == 1 or plan.handoff == "counter"))
    require(enough, f"{tensor.name}: {n} incarnations of {instances} instances: a cleared slot besides the written one needs 2")
    require(n <= instances + 1, f"{tensor.name}: {n} incarnations of {instances} instances: the rest would never be used")


def _check_writers(graph: OpGraph, tensor: Tensor, writers: tuple[Phase, ...]) -> None:
    segments = [p.segment for p in writers]
    once = len(set(segments)) == len(segments) <= 1 + tensor.carried and all(p.writes.count(tensor.name) == 1 for p in writers)
    require(once, f"{tensor.name}: written by {[p.name for p in writers]}, more than once")
    first = all(graph.segments[s].repeats == 1 for s in segments if s != max(segments))
    require(first, f"{tensor.name}: its first instance is written in a loop")
    for part in (part for p in writers for part in p.parts if tensor.name in part.writes):
        require(part.rows == tensor.width, f"{tensor.name}: width {tensor.width}, but {part.rows} rows are written")


def _check_reader(graph: OpGraph, schedule: Schedule, tensor: Tensor, reader: Phase) -> None:
    """A reader that looks until the data is there looks forever if no earlier step writes it."""
    name, segment = tensor.name, home(graph, tensor.name)
    require(not tensor.output, f"{reader.name}: reads {name}, an output")
    if name in reader.row_reads:
        check_unsplit(schedule, reader, (name,))
    order, writers = graph.order, graph.writers[name]
    if reader.segment > segment:
        single = tensor.carried or graph.segments[segment].repeats == 1
        require(single, f"{reader.name}: reads {name} after its loop: only the last of {graph.segments[segment].repeats} is left")
    elif tensor.carried:
        require(
            min(order[w.name] for w in writers) < order[reader.name] and len(writers) == 2,
            f"{reader.name}: reads {name} before it is first written",
        )
    else:
        require(order[writers[0].name] < order[reader.name], f"{reader.name}: reads {name} before {writers[0].name} writes it")


# Shared memory and order.


def _check_smem(graph: OpGraph, schedule: Schedule, profile: Profile) -> None:
    s = schedule
    memory = shared_memory(graph, s.phases, padded_batch=s.padded_batch, stages=s.stages, stage_bytes=s.stage_bytes)
    require(memory.total == s.smem_bytes, f"shared memory: the schedule says {s.smem_bytes} bytes, the model\n{memory}")
    limit = profile.smem_bytes
    require(memory.total <= limit, f"shared memory: {memory.total} bytes of {profile.name}'s {limit}:\n{memory}")


def _check_order(graph: OpGraph, schedule: Schedule) -> None:
    execution = Execution(graph, schedule)
    fenced = execution.fenced_after({p.name for p in schedule.phases if p.fence})
    found = itertools.chain(overtakings(execution), exchanges(execution))
    for tensor in graph.tensors.values():
        accesses = Accesses(execution, tensor)
        found = itertools.chain(found, accesses.violations(), accesses.unfenced(fenced))
    for violation in found:
        raise ScheduleError(str(violation))
