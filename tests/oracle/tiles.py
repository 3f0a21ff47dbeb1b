"""What a schedule's tiles compute, checked the slow way: every row of every part in exactly one item, every element of the streamed axis in
exactly one unit, every unit inside its stage, everything inside the memory of a worker. Written down from what the kernel does with these
numbers, without looking at the proof."""

from mkdsl.graph import AttentionPhase, FoldPhase, MapPhase, OpGraph, Phase
from mkdsl.schedule import AttentionPlan, FoldPlan, MapPlan, PhasePlan, Profile, Schedule, shared_memory
from oracle.operations import Miscompute, Overflow
from oracle.program import item_rows


def check_tiles(graph: OpGraph, schedule: Schedule, gpu: Profile) -> None:
    """Raises Miscompute or Overflow."""
    _resident(schedule, gpu)
    for phase in graph.phases:
        plan = schedule.plan(phase.name)
        _tile(schedule, phase, plan, gpu)
        _items(schedule, phase, plan)
    _memory(graph, schedule, gpu)
    for reader in graph.phases:
        for tensor in (t for t in reader.reads if schedule.tensor(t).splits > 1):
            _merge(schedule, reader, graph.tensors[tensor].heads)


def _require(holds: bool, phase: Phase, what: str) -> None:
    if not holds:
        raise Miscompute(f"{phase.name}: {what}")


def _resident(s: Schedule, gpu: Profile) -> None:
    if s.padded_batch < s.batch or s.padded_batch not in (1, 2, 4, 8, 16):
        raise Miscompute("sequences beyond the columns of the mma")
    sizes = {plan.cluster for plan in s.phases} - {1}
    if s.workers > gpu.workers or len(sizes) > 1 or any(s.workers % n or gpu.held(n) < s.workers for n in sizes):
        raise Overflow("workers that never start")


def _memory(graph: OpGraph, s: Schedule, gpu: Profile) -> None:
    needs = shared_memory(graph, s.phases, padded_batch=s.padded_batch, num_stages=s.num_stages, stage_bytes=s.stage_bytes).total
    if not 0 < needs <= min(s.smem_bytes, gpu.smem_bytes):
        raise Overflow("shared memory")


def _tile(s: Schedule, phase: Phase, plan: PhasePlan, gpu: Profile) -> None:
    match phase, plan:
        case FoldPhase(), FoldPlan():
            _fold(s, phase, plan, gpu)
        case AttentionPhase(), AttentionPlan():
            _attention(s, phase, plan)
        case MapPhase(), MapPlan():
            _map(phase, plan)
        case _:
            raise Miscompute(f"{phase.name}: runs as another kind of phase")


def _fold(s: Schedule, phase: FoldPhase, plan: FoldPlan, gpu: Profile) -> None:
    _require(min(plan.split_k, plan.k_stages, plan.tile_k, plan.epilogue_tiles) >= 1, phase, "nothing to fold")
    _require(plan.split_k in (1, 2, 4, 8), phase, "no mma operand")
    _require(phase.parallel or plan.split_k == plan.k_stages == 1, phase, "an ordered fold out of order")
    shared = phase.separable and phase.parallel and plan.k_stages == 1
    _require(plan.cluster == 1 or shared, phase, "stretches of a resident that is made whole")
    stretch = phase.k // plan.split_k // plan.cluster // plan.k_stages
    seen = plan.split_k * plan.cluster * plan.k_stages * (stretch // plan.tile_k) * plan.tile_k
    _require(seen == phase.k, phase, f"{seen} elements of {phase.k}")
    _require(plan.tile_k % 16 == 0, phase, "no whole mma step")
    by_wgmma = gpu.capability[0] == 9 and phase.parallel
    _require(plan.instruction == "mma" or (plan.instruction == "wgmma" and by_wgmma), phase, "an instruction that is not there")
    if 64 * plan.tile_k * phase.itemsize > s.stage_bytes or s.stage_bytes % (16 * plan.tile_k):
        raise Overflow(f"{phase.name}: a unit reaches into the next stage")


def _attention(s: Schedule, phase: AttentionPhase, plan: AttentionPlan) -> None:
    _require(plan.block >= 64 and plan.block % 64 == 0, phase, "no whole block of scores")
    _require(plan.splits >= 1, phase, "positions that nobody folds")
    if plan.block * phase.head_dim * phase.itemsize > s.stage_bytes or s.stage_bytes % (16 * phase.head_dim):
        raise Overflow(f"{phase.name}: a unit reaches into the next stage")
    if s.tensor(phase.writes[0]).splits != plan.splits:
        raise Overflow(f"{phase.name}: results in slots that are not there, or slots that nobody fills")


def _map(phase: MapPhase, plan: MapPlan) -> None:
    _require(plan.rows >= 64 and plan.rows % 64 == 0 and all(p.rows % plan.rows == 0 for p in phase.parts), phase, "rows of an item")
    _require(plan.split_k in (1, 2, 4, 8), phase, "columns that are not there")


def _merge(s: Schedule, reader: Phase, heads: int) -> None:
    plan = s.plan(reader.name)
    if not isinstance(reader, FoldPhase) or not isinstance(plan, FoldPlan) or not heads:
        raise Miscompute(f"{reader.name}: does not merge splits")
    columns = 16  # of one weight at least
    _require(plan.tile_k % columns == 0 and reader.k // heads % columns == 0, reader, "merges features of two heads as one")


def _items(s: Schedule, phase: Phase, plan: PhasePlan) -> None:
    """Each item has one owner."""
    _require(len(plan.tasks) == len(phase.parts), phase, "tasks of another number of parts")
    each = item_rows(phase, plan)
    for part, tasks in zip(phase.parts, plan.tasks, strict=True):
        _require(len(tasks) == s.workers, phase, "tasks of another number of workers")
        sequences = 1 if isinstance(phase, FoldPhase) else s.batch
        rows = part.rows * sequences * (plan.splits if isinstance(plan, AttentionPlan) else 1)
        owners = [0] * (rows // each)
        for first, n in tasks:
            _require(n >= 0 and (not n or 0 <= first <= len(owners) - n), phase, "items that are not there")
            for item in range(first, first + n):
                owners[item] += 1
        _require(rows % each == 0 and all(n == 1 for n in owners), phase, "items that nobody or several have")
