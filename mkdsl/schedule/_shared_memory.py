"""The shared-memory model, in three dimensions: how large a buffer is, how many of it there are, and when it lives.

extent: the bytes of one copy. depth: copies in flight (the ring's stages). lifetime: the whole kernel, or one phase. Buffers of one phase
are overwritten by the next phase's, since one warpgroup stages, folds and runs epilogues, phase after phase. So the peak is what lives for the
whole kernel plus the most that any phase needs for itself, and it is reached in that phase.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence

from mkdsl.graph import AttentionPhase, FoldPhase, OpGraph
from mkdsl.schedule._phase_plans import MMA_ROWS, AttentionPlan, FoldPlan, PhasePlan

ALIGNMENT = 1024  # bytes: what a swizzled array starts at
RESERVE = 4096  # bytes: the search's allowance for scratch, exchange and barriers
SCRATCH = 2048  # bytes: Mosaic's, for reductions over the warps of a warpgroup
WORDS = 32  # bytes: a cluster's two barriers and counts
BARRIER = 8  # bytes


@dataclasses.dataclass(frozen=True)
class Extent:
    """One buffer of a worker: `depth` copies of `bytes`, live in one phase, or for the whole kernel (phase "")."""

    name: str
    bytes: int
    depth: int = 1
    phase: str = ""

    @property
    def total(self) -> int:
        return self.bytes * self.depth


@dataclasses.dataclass(frozen=True)
class SharedMemory:
    """All of one worker's shared memory over the schedule. `phases`: in program order."""

    extents: tuple[Extent, ...]
    phases: tuple[str, ...]

    @functools.cached_property
    def by_phase(self) -> dict[str, list[Extent]]:
        """What lives in each phase only; under "" what lives for the whole kernel."""
        out: dict[str, list[Extent]] = {name: [] for name in ("", *self.phases)}
        for e in self.extents:
            out[e.phase].append(e)
        return out

    def live(self, phase: str) -> tuple[Extent, ...]:
        """What lives while a phase runs."""
        return (*self.by_phase[""], *self.by_phase[phase])

    def bytes_in(self, phase: str) -> int:
        return sum(e.total for e in self.live(phase))

    @functools.cached_property
    def peak(self) -> str:
        """The phase in which most is live; of several the first."""
        return max(self.phases, key=self.bytes_in)

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self.bytes_in(self.peak)

    @property
    def allocated(self) -> int:
        """Bytes that the kernel asks for: all but the reserve."""
        return self.total - sum(e.total for e in self.by_phase[""] if e.name == "reserve")

    def __str__(self) -> str:
        lines = [_line(e.name, e.bytes, e.depth, e.total) for e in self.by_phase[""]]
        for phase in self.phases:
            own = self.by_phase[phase]
            lines += [f"  in {phase}: {self.bytes_in(phase)} bytes{', the peak' if phase == self.peak else ''}"] if own else []
            lines += ["  " + _line(e.name, e.bytes, e.depth, e.total) for e in own]
        return "\n".join(lines)


def _line(name: str, size: int, depth: int, total: int) -> str:
    return f"  {name:<14}{size:>9} x {depth:<3}= {total:>7} bytes"


def round_up(n: int, to: int) -> int:
    return -(-n // to) * to


def columns(padded_batch: int, split_k: int) -> int:
    """Columns of the mma's right-hand side: (sequence, piece of K) pairs, at least 8."""
    return round_up(padded_batch * split_k, 8)


def fold_extents(phase: FoldPhase, plan: FoldPlan, slots: int, sets: int, padded_batch: int) -> tuple[Extent, ...]:
    """What a fold needs for itself. slots, sets: as `FoldPlan` has them once its tasks are known.

    resident: one K stage of the staged operand, bfloat16. sums: of tiles that wait for their epilogue, float32, for each sequence.
    added: rows of older tensors that the epilogue adds, float32, copied to shared memory ahead of time.
    """
    sizes = {
        "resident": columns(padded_batch, plan.split_k) * plan.stage_k(phase) * 2,
        "sums": slots * sets * padded_batch * MMA_ROWS * 4,
        "added": len(phase.parts) * len(phase.row_reads) * padded_batch * plan.epilogue_tiles * plan.rows * 4,
    }
    return _extents(phase.name, sizes)


def attention_extents(phase: AttentionPhase, plan: AttentionPlan, sets: int) -> tuple[Extent, ...]:
    """What an attention needs for itself (sets: as for a fold): queries and probabilities (bfloat16), the result and the scores (float32), the new token's key and
    value (bfloat16); in a cluster also the results with their log-sum-exps that the peers send (float32)."""
    c, d = round_up(phase.queries, 8), phase.head_dim
    sizes = {
        "queries": c * d * 2,
        "probabilities": plan.block * c * 2,
        "result": d * c * 4,
        "scores": c * 4,
        "new k, v": 2 * d * 2,
        "received": sets * (d + 1) * c * 4 if plan.cluster > 1 else 0,
    }
    return _extents(phase.name, sizes)


def _extents(phase: str, sizes: dict[str, int]) -> tuple[Extent, ...]:
    return tuple(Extent(name, round_up(size, ALIGNMENT), phase=phase) for name, size in sizes.items() if size)


def phase_extents(graph: OpGraph, plan: PhasePlan, padded_batch: int) -> tuple[Extent, ...]:
    """What a phase whose tasks are known needs for itself."""
    phase = graph.phase(plan.name)
    if isinstance(plan, FoldPlan) and isinstance(phase, FoldPhase):
        return fold_extents(phase, plan, plan.slots(phase), plan.sets, padded_batch)
    if isinstance(plan, AttentionPlan) and isinstance(phase, AttentionPhase):
        return attention_extents(phase, plan, plan.sets)
    return ()


def fixed_bytes(graph: OpGraph, padded_batch: int, cluster: int) -> int:
    """What the search sets aside for `fixed_extents` before it knows the tiles and the ring's depth: never less than they take."""
    most = _statistics(graph, 8 * padded_batch, cluster)
    statistics = max(most, round_up(MMA_ROWS * 4 * max(8, padded_batch) + SCRATCH, ALIGNMENT))
    return statistics + _tasks(graph, cluster) + RESERVE


def _statistics(graph: OpGraph, rows: int, cluster: int) -> int:
    """Partial reductions over the rows (sequence, piece of K) of prologues, float32: a worker's own, and what each of its cluster sends."""
    own = max((p.reductions for p in graph.phases), default=0) * rows * 4
    return round_up(own, ALIGNMENT) + (round_up(cluster * own, ALIGNMENT) if cluster > 1 else 0)


def _tasks(graph: OpGraph, cluster: int) -> int:
    """For each of the two warpgroups the task table's rows of the cluster's workers."""
    return round_up(4 * round_up(2 * sum(len(p.parts) for p in graph.phases), 128) * 2 * cluster, ALIGNMENT)


def fixed_extents(graph: OpGraph, plans: Sequence[PhasePlan], padded_batch: int, num_stages: int) -> tuple[Extent, ...]:
    """What lives for the whole kernel besides the ring. The reserve is what is left of `fixed_bytes`; the kernel does not ask for it."""
    cluster = max(plan.cluster for plan in plans)
    sizes = {
        "statistics": _statistics(graph, columns(padded_batch, max(plan.split_k for plan in plans)), cluster),
        "tasks": _tasks(graph, cluster),
        "exchange": round_up(WORDS, ALIGNMENT) if cluster > 1 else 0,
        "scratch": SCRATCH,
        "barriers": BARRIER * 2 * num_stages,
    }
    sizes["reserve"] = fixed_bytes(graph, padded_batch, cluster) - sum(sizes.values())
    return tuple(Extent(name, size) for name, size in sizes.items() if size)


def shared_memory(graph: OpGraph, plans: Iterable[PhasePlan], *, padded_batch: int, num_stages: int, stage_bytes: int) -> SharedMemory:
    """The buffers of a schedule.

    Args:
      graph: what is scheduled.
      plans: of its phases, with their tasks.
      padded_batch: columns of the mma per piece of K.
      num_stages, stage_bytes: the ring.
    """
    plans = tuple(plans)
    ring = (Extent("ring", stage_bytes, num_stages),) if num_stages else ()
    fixed = fixed_extents(graph, plans, padded_batch, num_stages)
    own = itertools.chain.from_iterable(phase_extents(graph, plan, padded_batch) for plan in plans)
    return SharedMemory((*ring, *fixed, *own), tuple(plan.name for plan in plans))
