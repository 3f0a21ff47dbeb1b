"""What may be decided of one phase: its candidates, as plans without tasks."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

from mkdsl.graph import AttentionPhase, FoldPhase, MapPhase, OpGraph, Phase
from mkdsl.schedule import MMA_ROWS, AttentionPlan, FoldPlan, MapPlan, PhasePlan, attention_extents, fold_extents, signals
from mkdsl.search._assign import shares, weights

SPLIT_K = (8, 4, 2, 1)
K_STAGES = (1, 2, 4, 8, 16, 32, 64)
EPILOGUE_TILES = 16  # that are finished together, at most
EPILOGUE_BYTES = 16 * 1024  # of sums that wait for an epilogue, about: half a stage
TILE_K = 256  # elements: a box row of 512 bytes; longer rows gain nothing
MMA_K = 16  # elements of the streamed axis per mma


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to tile a phase. busiest: items of the busiest worker, per part. folded: those that it folds, for its cluster too. bytes: of
    shared memory that the phase needs for itself."""

    plan: PhasePlan
    busiest: tuple[int, ...]
    folded: tuple[int, ...]
    padded_batch: int
    bytes: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What a phase's candidates depend on besides the phase. clusters, instructions: as the GPU has them."""

    graph: OpGraph
    batch: int
    stage_bytes: int
    workers: int
    clusters: tuple[int, ...] = (1,)
    instructions: tuple[str, ...] = ("mma",)


def padded(batch: int) -> int:
    """The batch as the kernel computes it: the next power of two.

    Raises:
      ValueError: no kernel holds that many columns.
    """
    if not 1 <= batch <= 16:
        raise ValueError(f"batch={batch} is out of range: a kernel decodes 1 to 16 sequences; run larger batches in several steps")
    return 1 << (batch - 1).bit_length()


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
    """All candidates of a phase that leave room for a ring of two stages beside what they need themselves."""
    shared = tuple(n for n in clusters if n == 1 or _after_signals(graph, phase))
    setting = Setting(graph=graph, batch=batch, stage_bytes=stage_bytes, workers=workers, clusters=shared, instructions=tuple(instructions))
    found = [_measured(phase, plan, batch, workers) for plan in _plans(phase, setting)]
    room = smem_bytes - 2 * stage_bytes
    return [c for c in dict.fromkeys(found) if c.bytes <= room]


def _after_signals(graph: OpGraph, phase: Phase) -> bool:
    """Whether all phases that may come before signal. Only then does a cluster know when its shared memory is free."""
    looped = graph.iterations(phase) > 1
    at = graph.order[phase.name]
    before = [p for p in graph.phases if p.segment < phase.segment or (p.segment == phase.segment and (looped or graph.order[p.name] < at))]
    return all(signals(graph, p) for p in before)


# How much of it a worker has.


def _measured(phase: Phase, plan: PhasePlan, batch: int, workers: int) -> Candidate:
    busiest, pad = busiest_counts(phase, plan, batch, workers), padded(batch)
    sets = plan.sets_if(max(busiest) > plan.epilogue_tiles)
    extents = ()
    if isinstance(phase, FoldPhase) and isinstance(plan, FoldPlan):
        extents = fold_extents(phase, plan, slots_of(phase, plan, busiest, workers), sets, pad)
    if isinstance(phase, AttentionPhase) and isinstance(plan, AttentionPlan):
        extents = attention_extents(phase, plan, sets)
    folded = busiest_counts(phase, plan, batch, workers, plan.cluster)
    return Candidate(plan, busiest, folded, pad, sum(e.total for e in extents))


def slots_of(phase: FoldPhase, plan: FoldPlan, busiest: tuple[int, ...], workers: int) -> int:
    """`FoldPlan.slots` of the tasks that will be assigned; at most that many where workers share several parts."""
    matrices = [len(part.weights) for part in phase.parts]
    if max(busiest) > plan.epilogue_tiles:
        return plan.epilogue_tiles * max(matrices)
    each = [n * m for n, m in zip(busiest, matrices, strict=True)]
    return max(each) if len(each) <= workers else sum(each)


def busiest_counts(phase: Phase, plan: PhasePlan, batch: int, workers: int, cluster: int = 1) -> tuple[int, ...]:
    """Items of the busiest worker of each part, or cluster of workers: a single part's are spread over all clusters first."""
    counts = plan.items(phase, batch)
    if len(counts) == 1:
        return (-(-counts[0] // min(counts[0], workers // cluster)),)
    return tuple(-(-n * cluster // given) for n, given in zip(counts, shares(counts, weights(phase), workers), strict=True))


# The plans of each kind of phase.


@functools.singledispatch
def _plans(phase: Phase, setting: Setting) -> Iterator[PhasePlan]:
    raise NotImplementedError(phase.kind)


@_plans.register
def _(phase: FoldPhase, setting: Setting) -> Iterator[PhasePlan]:
    for split_k in _splits_of_rows(phase):
        for k_stages, cluster in _splits_of_k(phase, setting.clusters):
            stage_k, rest = divmod(phase.k // split_k, k_stages * cluster)
            for tile_k in [] if rest else tiles_of(stage_k, setting.stage_bytes, phase.itemsize):
                plan = FoldPlan(name=phase.name, split_k=split_k, tile_k=tile_k, k_stages=k_stages, cluster=cluster, tasks=(), waits=())
                for n in epilogue_tiles(phase, plan, setting.batch, setting.workers):
                    for instruction in setting.instructions if phase.parallel else ("mma",):  # a user's fold does without tensor cores
                        yield dataclasses.replace(plan, epilogue_tiles=n, instruction=instruction)


def _splits_of_rows(phase: FoldPhase) -> list[int]:
    """Choices of `FoldPlan.split_k`; those that take the weights where they are, if there are any."""
    whole = {s for s in SPLIT_K if all(part.rows % (MMA_ROWS // s) == 0 for part in phase.parts)}
    dividing = [s for s in (SPLIT_K if phase.parallel else (1,)) if phase.k % (MMA_K * s) == 0 and s in whole]
    return [s for s in dividing if phase.in_place(s)] or dividing


def _splits_of_k(phase: FoldPhase, clusters: tuple[int, ...]) -> list[tuple[int, int]]:
    """(K stages, workers of a cluster): K split in time or in space. Not at all in a user's fold, whose carry stays in registers from the first
    to the last unit. In space where the prologue's columns do not wait for each other."""
    if not phase.parallel:
        return [(1, 1)]
    return [(k_stages, 1) for k_stages in K_STAGES] + [(1, n) for n in clusters if n > 1 and phase.separable]


def tiles_of(stage_k: int, stage_bytes: int, itemsize: int = 2) -> list[int]:
    """Choices of `FoldPlan.tile_k`: the most, up to 256, that divide a K stage and fit a stage of the ring.

    Of multiples of 64 first, whose swizzle suits the mma best; of 32 and then 16 where those allow longer box rows.
    A stage is a whole number of 8-row blocks of every view it is seen through, so that stages lie equally far apart in all of them.
    """
    most = min(TILE_K, stage_bytes // (MMA_ROWS * itemsize))
    out: list[int] = []
    for step in (64, 32, MMA_K):
        fitting = [c for c in range(step, most + 1, step) if stage_k % c == 0 and stage_bytes % (16 * c) == 0]
        out += [max(fitting)] if fitting and max(fitting) > max(out, default=0) else []
    return out


def epilogue_tiles(phase: FoldPhase, plan: FoldPlan, batch: int, workers: int) -> list[int]:
    """Choices of how many tiles are finished together: as many as there is room for their sums, since each epilogue costs some time.

    A resident in several K stages is staged anew for each epilogue: there the whole of a worker's tiles is a choice too.
    """
    most = max(busiest_counts(phase, plan, batch, workers))
    slot = max(len(part.weights) for part in phase.parts) * padded(batch) * MMA_ROWS * 4
    limit = max(1, min(EPILOGUE_TILES, EPILOGUE_BYTES // slot))
    balanced = -(-most // -(-most // limit))
    return sorted({balanced, most} if plan.k_stages > 1 else {balanced}, reverse=True)


@_plans.register
def _(phase: AttentionPhase, setting: Setting) -> Iterator[PhasePlan]:
    splittable = may_split(setting.graph, phase.writes[0])
    for block in (b for b in range(64, phase.context + 64, 64) if -phase.context % b < 64):  # no block in vain, the last perhaps in part
        plan = AttentionPlan(name=phase.name, block=block, tasks=(), waits=())
        fits = setting.stage_bytes % (16 * phase.head_dim) == 0 and plan.unit_bytes(phase) <= setting.stage_bytes
        if not fits or not plan.meets_pages(phase):
            continue
        blocks = phase.blocks(block)
        for splits in _splits(blocks, setting.batch * phase.kv_heads, setting.workers) if splittable else (1,):
            for cluster in (n for n in setting.clusters if n == 1 or splits * n <= blocks):
                yield dataclasses.replace(plan, splits=splits, cluster=cluster)


def may_split(graph: OpGraph, tensor: str) -> bool:
    """Only folds that stage an attention's result as their resident merge its splits."""
    users = [p for p in graph.phases if tensor in p.row_reads or (tensor in p.reads and not isinstance(p, FoldPhase))]
    return not users


def _splits(blocks: int, heads: int, workers: int) -> list[int]:
    """Powers of two, and what just fills the workers once or twice."""
    powers = {1 << i for i in range(blocks.bit_length())}
    filling = {turns * workers // heads for turns in (1, 2)}
    return sorted(s for s in powers | filling if 1 <= s <= blocks)


@_plans.register
def _(phase: MapPhase, setting: Setting) -> Iterator[PhasePlan]:
    common = math.gcd(*(part.rows for part in phase.parts))
    widths = [*phase.reduced, *(setting.graph.tensors[t].width for t in (*phase.reads, *phase.row_reads))]
    split_k = 8 if all(w % (8 * MMA_K) == 0 for w in widths) else 1  # how a reduction's vector is laid over rows
    for rows in (64 << i for i in range(common.bit_length()) if common % (64 << i) == 0):
        yield MapPlan(name=phase.name, rows=rows, split_k=split_k, tasks=(), waits=())
