"""What the plan of one phase may be: legal tiles that fit a stage, and neutral values of what its kind does not use."""

from mkdsl.graph import OpGraph, Phase
from mkdsl.search._profile import Profile
from mkdsl.search._schedule import PhasePlan, Schedule
from mkdsl.search._smem import ROWS

MMA_K = 16
PARTS = (1, 2, 4, 8)  # of a tile: columns of the mma's smallest right-hand side that a sequence may take


class ScheduleError(ValueError):
    """A schedule that must not run. The message names the phase, worker or tensor, and the numbers."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ScheduleError(message)


def check_plan(graph: OpGraph, schedule: Schedule, phase: Phase, profile: Profile) -> None:
    """Raises ScheduleError for what no phase of its kind can be."""
    plan = schedule.plan(phase.name)
    {"fold": _check_fold, "attention": _check_attention, "map": _check_map}[phase.kind](graph, schedule, phase, plan)
    _check_instruction(phase, plan, profile)


def _check_fold(graph: OpGraph, schedule: Schedule, phase: Phase, plan: PhasePlan) -> None:
    name, p = phase.name, plan
    require(p.rows * p.parts == ROWS, f"{name}: {p.rows} rows x {p.parts} parts: a tile has {ROWS} mma rows")
    require(p.parts in PARTS, f"{name}: {p.parts} parts: a tile has 1, 2, 4 or 8")
    require(phase.parallel or p.parts == 1, f"{name}: {p.parts} parts of a fold that folds whole rows")
    require(phase.parallel or p.pieces == 1, f"{name}: {p.pieces} pieces of a fold whose carry goes from a row's first to its last element")
    divides = min(p.parts, p.pieces, p.chunk, p.group) >= 1 and phase.k % (p.parts * p.cluster * p.pieces * p.chunk) == 0
    pieces = f"{p.pieces} pieces" if p.cluster == 1 else f"{p.cluster} workers' pieces"
    require(divides, f"{name}: {p.parts} parts x {pieces} x chunk {p.chunk} do not divide k={phase.k} (group {p.group})")
    whole = phase.parallel and phase.separable
    require(p.cluster == 1 or whole, f"{name}: a cluster of {p.cluster} for a fold that needs its whole prologue, or whole rows, at once")
    require(p.cluster == 1 or p.pieces == 1, f"{name}: {p.pieces} pieces in a cluster of {p.cluster}: K is split in time or over a cluster")
    require(p.chunk % MMA_K == 0, f"{name}: chunk {p.chunk} is no multiple of {MMA_K}")
    _check_stage(schedule, phase, ROWS * p.chunk * phase.itemsize)
    require(p.splits == 1, f"{name}: {p.splits} splits: a fold is not split over workers")


def _check_attention(graph: OpGraph, schedule: Schedule, phase: Phase, plan: PhasePlan) -> None:
    name, p = phase.name, plan
    whole = p.chunk >= 1 and p.chunk % 64 == 0 and phase.k % p.chunk == 0
    require(whole, f"{name}: chunk {p.chunk} is no multiple of 64 that divides the context {phase.k}")
    shares = f"{p.splits} splits" if p.cluster == 1 else f"{p.splits} splits x {p.cluster} workers"
    require(1 <= p.splits * p.cluster <= phase.k // p.chunk, f"{name}: {shares} of {phase.k // p.chunk} cache blocks")
    require(p.rows == phase.heads // phase.kv_heads * phase.head_dim, f"{name}: {p.rows} rows: an item is all heads of one kv head")
    require(p.parts == p.pieces == p.group == 1, f"{name}: {p.parts} parts, {p.pieces} pieces, group {p.group}: an attention has none")
    _check_stage(schedule, phase, p.chunk * phase.head_dim * phase.itemsize)
    check_unsplit(schedule, phase, phase.reads)


def _check_map(graph: OpGraph, schedule: Schedule, phase: Phase, plan: PhasePlan) -> None:
    whole = plan.rows >= 1 and plan.rows % 64 == 0 and all(part.rows % plan.rows == 0 for part in phase.parts)
    require(whole, f"{phase.name}: {plan.rows} rows an item: no multiple of 64 that divides {[part.rows for part in phase.parts]}")
    require(plan.splits == 1, f"{phase.name}: {plan.splits} splits: a map has none")
    widths = [graph.tensors[name].width for name in phase.reads]
    even = plan.parts in PARTS and all(width % (plan.parts * MMA_K) == 0 for width in widths)
    require(even, f"{phase.name}: {plan.parts} parts do not divide the {widths} that it reduces")
    p, streams = plan, not plan.pieces == plan.cluster == plan.group == 1 or plan.chunk
    require(not streams, f"{p.name}: {p.pieces} pieces, cluster {p.cluster}, group {p.group}, chunk {p.chunk}: a map streams nothing")
    check_unsplit(schedule, phase, phase.reads)


def _check_instruction(phase: Phase, plan: PhasePlan, profile: Profile) -> None:
    known = profile.instructions if phase.kind == "fold" and phase.parallel else ("mma",)
    require(plan.instruction in known, f"{phase.name}: instruction {plan.instruction!r}: {profile.name} has {', '.join(known)} for it")


def _check_stage(schedule: Schedule, phase: Phase, unit: int) -> None:
    row = 16 * (phase.head_dim if phase.kind == "attention" else schedule.plan(phase.name).chunk)
    require(
        schedule.stage_bytes % row == 0, f"{phase.name}: a stage of {schedule.stage_bytes} bytes is no multiple of 8 rows of {row // 8}"
    )
    require(unit <= schedule.stage_bytes, f"{phase.name}: a unit of {unit} bytes does not fit a stage of {schedule.stage_bytes}")


def check_unsplit(schedule: Schedule, phase: Phase, tensors: tuple[str, ...]) -> None:
    for name in tensors:
        splits = schedule.tensor(name).splits
        require(splits == 1, f"{phase.name}: reads {name}, left in {splits} splits; only a fold's resident merges splits")
