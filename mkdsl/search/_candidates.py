"""What may be decided of one phase: its candidates, as plans without tasks."""

import dataclasses
import math
from collections.abc import Sequence

from mkdsl.graph import OpGraph, Phase
from mkdsl.search._assign import items, shares, weights
from mkdsl.search._schedule import PhasePlan
from mkdsl.search._smem import ROWS, phase_extents

PARTS = (8, 4, 2, 1)
PIECES = (1, 2, 4, 8, 16, 32, 64)
GROUP = 16  # tiles that finish together, at most
FINISHED = 16 * 1024  # bytes of finished rows, about: half a stage
CHUNK = 256  # elements: a box row of 512 bytes; longer rows gain nothing
MMA_K = 16  # elements of the streamed axis per mma


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to tile a phase. `busiest`: items of the busiest worker, per part; `folded`: those that it folds, for its cluster too. bytes: of
    shared memory that live in this phase only."""

    plan: PhasePlan
    busiest: tuple[int, ...]
    folded: tuple[int, ...]
    padded_batch: int
    bytes: int = 0


def padded(batch: int) -> int:
    """The batch as the kernel computes it: the next power of two.

    Raises:
      ValueError: no kernel holds that many columns.
    """
    if not 1 <= batch <= 16:
        raise ValueError(f"batch={batch} is out of range: a kernel decodes 1 to 16 sequences; run larger batches in several steps")
    return 1 << (batch - 1).bit_length()


def chunks_of(piece: int, stage_bytes: int) -> list[int]:
    """Choices of elements per mma row of one unit: the most, up to 256, that divide a piece and fit a stage.

    Of multiples of 64 first, whose swizzle suits the mma best; of 32 and then 16 where those allow longer box rows.
    A stage is a whole number of 8-row blocks of every view it is seen through, so that stages lie equally far apart in all of them.
    """
    most = min(CHUNK, stage_bytes // (ROWS * 2))
    out: list[int] = []
    for step in (64, 32, MMA_K):
        fitting = [c for c in range(step, most + 1, step) if piece % c == 0 and stage_bytes % (16 * c) == 0]
        out += [max(fitting)] if fitting and max(fitting) > max(out, default=0) else []
    return out


def candidates(
    graph: OpGraph,
    phase: Phase,
    *,
    batch: int,
    stage_bytes: int,
    workers: int,
    smem_bytes: int,
    clusters: Sequence[int] = (1,),
    instructions: Sequence[str] = ("mma",),
) -> list[Candidate]:
    """All candidates of a phase whose own extents leave room for a ring of two stages. clusters, instructions: as the GPU has them."""
    shared = tuple(n for n in clusters if n == 1 or _after_signals(graph, phase))
    make = {"fold": _folds, "attention": _attentions, "map": _maps}[phase.kind]
    plans = make(graph, phase, batch, stage_bytes, workers, shared)
    if phase.kind == "fold" and phase.parallel:  # a fold of the user's own does without tensor cores
        plans = [dataclasses.replace(plan, instruction=i) for plan in plans for i in instructions]
    found = [_measured(phase, plan, batch, workers) for plan in plans]
    room = smem_bytes - 2 * stage_bytes
    return [c for c in dict.fromkeys(found) if c.bytes <= room]


def _measured(phase: Phase, plan: PhasePlan, batch: int, workers: int) -> Candidate:
    busiest, pad = busiest_counts(phase, plan, batch, workers), padded(batch)
    own = phase_extents(phase, plan, slots_of(phase, plan, busiest, workers), plan.sets_if(max(busiest) > plan.group), pad)
    return Candidate(plan, busiest, busiest_counts(phase, plan, batch, workers, plan.cluster), pad, sum(e.total for e in own))


def _after_signals(graph: OpGraph, phase: Phase) -> bool:
    """Whether all phases that may come before signal: those that write outputs only do not."""
    looped = graph.iterations(phase) > 1
    at = graph.order[phase.name]
    before = [p for p in graph.phases if p.segment < phase.segment or (p.segment == phase.segment and (looped or graph.order[p.name] < at))]
    return all(any(not graph.tensors[t].output for t in p.writes) for p in before)


def slots_of(phase: Phase, plan: PhasePlan, busiest: tuple[int, ...], workers: int) -> int:
    """`PhasePlan.slots` of the tasks that will be assigned; at most that many where workers share several parts."""
    matrices = [len(part.weights) for part in phase.parts]
    if max(busiest) > plan.group:
        return plan.group * max(matrices)
    each = [n * m for n, m in zip(busiest, matrices, strict=True)]
    return max(each) if len(each) <= workers else sum(each)


def busiest_counts(phase: Phase, plan: PhasePlan, batch: int, workers: int, cluster: int = 1) -> tuple[int, ...]:
    """Items of the busiest worker of each part, or cluster of workers: a single part's are spread over all clusters first."""
    counts = items(phase, plan, batch)
    if len(counts) == 1:
        return (-(-counts[0] // min(counts[0], workers // cluster)),)
    return tuple(-(-n * cluster // given) for n, given in zip(counts, shares(counts, weights(phase), workers), strict=True))


def _folds(graph: OpGraph, phase: Phase, batch: int, stage_bytes: int, workers: int, clusters: tuple[int, ...]) -> list[PhasePlan]:
    out = []
    for parts in PARTS if phase.parallel else (1,):
        rows = ROWS // parts
        if phase.k % (MMA_K * parts) or any(part.rows % rows for part in phase.parts):
            continue
        for pieces, cluster in _splits_of_k(phase, clusters):
            piece, rest = divmod(phase.k // parts, pieces * cluster)
            for chunk in [] if rest else chunks_of(piece, stage_bytes):
                plan = PhasePlan(name=phase.name, rows=rows, parts=parts, chunk=chunk, pieces=pieces, cluster=cluster, tasks=(), waits=())
                out += [dataclasses.replace(plan, group=group) for group in groups(phase, plan, batch, workers)]
    return out


def _splits_of_k(phase: Phase, clusters: tuple[int, ...]) -> list[tuple[int, int]]:
    """(pieces, workers of a cluster): K split in time or in space, not at all if the carry is the user's own, which stays in registers from
    first to last unit. In space where the prologue's columns do not wait for each other."""
    if not phase.parallel:
        return [(1, 1)]
    return [(pieces, 1) for pieces in PIECES] + [(1, n) for n in clusters if n > 1 and phase.separable]


def groups(phase: Phase, plan: PhasePlan, batch: int, workers: int) -> list[int]:
    """Choices of how many tiles finish together: as many as finished rows have room for, since each group has a finish of its own.

    A resident in several pieces is staged anew for each group: there the whole of a worker's tiles is a choice too.
    """
    most = max(busiest_counts(phase, plan, batch, workers))
    slot = max(len(part.weights) for part in phase.parts) * padded(batch) * ROWS * 4
    limit = max(1, min(GROUP, FINISHED // slot))
    balanced = -(-most // -(-most // limit))
    return sorted({balanced, most} if plan.pieces > 1 else {balanced}, reverse=True)


def _attentions(graph: OpGraph, phase: Phase, batch: int, stage_bytes: int, workers: int, clusters: tuple[int, ...]) -> list[PhasePlan]:
    rows = phase.heads // phase.kv_heads * phase.head_dim
    splittable = may_split(graph, phase.writes[0])
    out = []
    for chunk in range(64, phase.k + 1, 64):
        if phase.k % chunk == 0 and stage_bytes % (16 * phase.head_dim) == 0 and chunk * phase.head_dim * phase.itemsize <= stage_bytes:
            blocks = phase.k // chunk
            splits = _splits(blocks, batch * phase.kv_heads, workers) if splittable else (1,)
            plans = [PhasePlan(name=phase.name, rows=rows, chunk=chunk, splits=n, tasks=(), waits=()) for n in splits]
            out += [dataclasses.replace(p, cluster=n) for p in plans for n in clusters if n == 1 or p.splits * n <= blocks]
    return out


def may_split(graph: OpGraph, tensor: str) -> bool:
    """Only folds that stage an attention's result as their resident merge its splits."""
    users = [p for p in graph.phases if tensor in p.row_reads or (tensor in p.reads and p.kind != "fold")]
    return not users


def _splits(blocks: int, heads: int, workers: int) -> list[int]:
    """Powers of two, and what just fills the workers once or twice."""
    powers = {1 << i for i in range(blocks.bit_length())}
    filling = {turns * workers // heads for turns in (1, 2)}
    return sorted(s for s in powers | filling if 1 <= s <= blocks)


def _maps(graph: OpGraph, phase: Phase, batch: int, stage_bytes: int, workers: int, clusters: tuple[int, ...]) -> list[PhasePlan]:
    common = math.gcd(*(part.rows for part in phase.parts))
    sizes = [64 << i for i in range(common.bit_length()) if common % (64 << i) == 0]
    widths = [graph.tensors[t].width for t in (*phase.reads, *phase.row_reads)]
    parts = 8 if all(w % (8 * MMA_K) == 0 for w in widths) else 1  # how a reduction's vector is laid over rows
    return [PhasePlan(name=phase.name, rows=rows, parts=parts, tasks=(), waits=()) for rows in sizes]
