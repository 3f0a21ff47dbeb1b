"""What a schedule's tiles compute, checked the slow way: every row of every part in exactly one item, every element of the streamed axis in
exactly one unit, every unit inside its stage, everything inside the memory of a worker. Written down from what the kernel does with these
numbers, without looking at the proof."""

import math

from oracle.program import Miscompute, Overflow

from mkdsl.graph import OpGraph, Phase
from mkdsl.schedule import PhasePlan, Profile, Schedule
from mkdsl.schedule._shared_memory import shared_memory


def check_tiles(graph: OpGraph, schedule: Schedule, gpu: Profile) -> None:
    """Raises Miscompute or Overflow."""
    s = schedule
    if s.padded_batch < s.batch or s.padded_batch not in (1, 2, 4, 8, 16):
        raise Miscompute("sequences beyond the columns of the mma")
    sizes = {plan.cluster for plan in s.phases} - {1}
    if s.workers > gpu.workers or len(sizes) > 1 or any(s.workers % n or gpu.held(n) < s.workers for n in sizes):
        raise Overflow("workers that never start")
    for phase in graph.phases:
        plan = s.plan(phase.name)
        {"fold": _fold, "attention": _attention, "map": _map}[phase.kind](s, phase, plan)
        _items(s, phase, plan)
    needs = shared_memory(graph, s.phases, padded_batch=s.padded_batch, stages=s.stages, stage_bytes=s.stage_bytes).total
    if not 0 < needs <= min(s.smem_bytes, gpu.smem_bytes):
        raise Overflow("shared memory")
    for reader in graph.phases:
        for tensor in (t for t in reader.reads if s.tensor(t).splits > 1):
            _merge(graph, s, reader, graph.tensors[tensor].heads)


def _require(holds: bool, phase: Phase, what: str) -> None:
    if not holds:
        raise Miscompute(f"{phase.name}: {what}")


def _fold(s: Schedule, phase: Phase, plan: PhasePlan) -> None:
    _require(min(plan.rows, plan.parts, plan.pieces, plan.chunk, plan.group) >= 1, phase, "nothing to fold")
    _require(plan.rows * plan.parts == 64 and plan.parts in (1, 2, 4, 8), phase, "no mma operand")
    _require(phase.parallel or plan.parts == plan.pieces == 1, phase, "an ordered fold out of order")
    _require(
        plan.cluster == 1 or (phase.separable and phase.parallel and plan.pieces == 1), phase, "parts of a resident that is made whole"
    )
    piece = phase.k // plan.parts // plan.cluster // plan.pieces
    seen = plan.parts * plan.cluster * plan.pieces * (piece // plan.chunk) * plan.chunk
    _require(seen == phase.k, phase, f"{seen} elements of {phase.k}")
    _require(plan.chunk % 16 == 0, phase, "no whole mma step")
    if 64 * plan.chunk * phase.itemsize > s.stage_bytes or s.stage_bytes % (16 * plan.chunk):
        raise Overflow(f"{phase.name}: a unit reaches into the next stage")


def _attention(s: Schedule, phase: Phase, plan: PhasePlan) -> None:
    _require(plan.chunk >= 64 and plan.chunk % 64 == 0, phase, "no whole block of scores")
    _require(plan.splits >= 1 and phase.k // plan.chunk * plan.chunk == phase.k, phase, "positions that nobody folds")
    _require(plan.rows == phase.heads // phase.kv_heads * phase.head_dim, phase, "rows of an item")
    if plan.chunk * phase.head_dim * phase.itemsize > s.stage_bytes or s.stage_bytes % (16 * phase.head_dim):
        raise Overflow(f"{phase.name}: a unit reaches into the next stage")
    if s.tensor(phase.writes[0]).splits != plan.splits:
        raise Overflow(f"{phase.name}: results in slots that are not there, or slots that nobody fills")


def _map(s: Schedule, phase: Phase, plan: PhasePlan) -> None:
    _require(plan.rows >= 64 and plan.rows % 64 == 0 and all(p.rows % plan.rows == 0 for p in phase.parts), phase, "rows of an item")
    _require(plan.parts in (1, 2, 4, 8), phase, "columns that are not there")


def _merge(graph: OpGraph, s: Schedule, reader: Phase, heads: int) -> None:
    plan = s.plan(reader.name)
    _require(reader.kind == "fold" and heads > 0, reader, "does not merge splits")
    block = math.gcd(plan.chunk, 64)  # columns of one weight
    _require(block % 16 == 0 and reader.k // heads % block == 0, reader, "merges parts of two heads as one")


def _items(s: Schedule, phase: Phase, plan: PhasePlan) -> None:
    """Each item has one owner."""
    _require(len(plan.tasks) == len(phase.parts), phase, "tasks of another number of parts")
    for part, tasks in zip(phase.parts, plan.tasks, strict=True):
        _require(len(tasks) == s.workers, phase, "tasks of another number of workers")
        sequences = 1 if phase.kind == "fold" else s.batch
        rows = part.rows * sequences * (plan.splits if phase.kind == "attention" else 1)
        owners = [0] * (rows // plan.rows)
        for first, n in tasks:
            _require(n >= 0 and (not n or 0 <= first <= len(owners) - n), phase, "items that are not there")
            for item in range(first, first + n):
                owners[item] += 1
        _require(rows % plan.rows == 0 and all(n == 1 for n in owners), phase, "items that nobody or several have")
